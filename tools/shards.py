"""The commands that look at shards: ``verify`` and ``index``."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated

import typer
from rich.filesize import decimal

from infobatch_stream._pool import default_workers

from .console import AsJson, counted, progress, reported, say

__all__ = ["index_command", "verify_command"]

_LINES = 100  # problems that are printed; --json has all that are listed

Shards = Annotated[
    list[str],
    typer.Argument(help="Tars, folders of tars, or patterns: 'data/shard-{000000..000099}.tar', 'data/*.tar'."),
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Processes; 1 works in this one.  [default: processor cores, at most 8]")
]


def verify_command(
    shards: Annotated[
        list[str], typer.Argument(help="MDS folders (with index.json), folders of tars, tars, or patterns of tars.")
    ],
    *,
    columns: Annotated[
        str,
        typer.Option(
            metavar="NAMES", help="Columns each sample must have: image,label (tars: also extensions: 'jpg;png,cls')"
        ),
    ] = "",
    duplicates: Annotated[
        bool,
        typer.Option(
            "--duplicates",
            help="Look for samples of the same content, first under different labels: by the image, else by all but "
            "key, name and label; or by --columns.",
        ),
    ] = False,
    decode: Annotated[bool, typer.Option("--decode", help="Decode images, arrays, JSON, numbers too.")] = False,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Say what is wrong with shards, and where. Exit code 1 if anything is; warnings alone are no error."""
    start = time.monotonic()
    with reported(), _shard_progress("verifying") as show_progress:
        from infobatch_stream.verify.verify import verify

        names = tuple(name for part in columns.split(",") if (name := part.strip()))
        report = verify(
            shards, columns=names, duplicates=duplicates, decode=decode, workers=workers or default_workers(),
            on_progress=show_progress,
        )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(asdict(report)))
    else:
        for problem in report.problems[:_LINES]:
            say(problem)
        if len(report.problems) > _LINES:
            typer.echo(f"... and {len(report.problems) - _LINES:,} more lines (--json has them)")
        found = [(report.errors, "error"), (report.warnings, "warning"), (report.notes, "note")]
        summary = ", ".join(counted(number, noun) for number, noun in found)
        typer.echo(f"{_done(report.shards, report.samples, report.size, start)}: {summary}")
    if report.errors:
        raise typer.Exit(1)


def index_command(
    shards: Shards,
    *,
    checksums: Annotated[
        bool, typer.Option("--checksums", help="Store a checksum of each whole tar, which reads all of it.")
    ] = False,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Build the index of each tar, <shard>.index.npz, where there is none or the tar has changed since."""
    start = time.monotonic()
    with reported(), _shard_progress("indexing") as show_progress:
        from infobatch_stream.verify.build_indexes import index_shards

        done = index_shards(
            shards, checksums=checksums, workers=workers or default_workers(), on_progress=show_progress
        )
    total = done.built + done.fresh + len(done.failures)
    if as_json:
        typer.echo(json.dumps(asdict(done)))
    else:
        typer.echo(f"{done.built:,} built, {done.fresh:,} already fresh, {done.samples:,} samples in total")
        typer.echo(_done(total, done.samples, done.size, start))
        for failure in done.failures:
            say(f"error: {failure}", err=True)
    if done.failures:
        typer.echo(f"{len(done.failures):,} of {total:,} shards could not be indexed", err=True)
        raise typer.Exit(1)


@contextmanager
def _shard_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar, as a callback for after each shard: how many there are, bytes of this one."""
    size = 0
    with progress("shards") as bar:
        task = bar.add_task(title, total=None, bytes=0)

        def show_progress(total: int, more: int) -> None:
            nonlocal size
            size += more
            bar.update(task, advance=1, total=total, bytes=size)

        yield show_progress


def _done(shards: int, samples: int, size: int, start: float) -> str:
    seconds = time.monotonic() - start
    return (
        f"{counted(shards, 'shard')}, {counted(samples, 'sample')}, {decimal(size)} in {seconds:.1f} s "
        f"({decimal(int(size / seconds))}/s)"
    )
