"""The commands of ``infobatch-stream``. What they do is in the modules they import, when they are called."""

import re
import time
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal

from infobatch_stream.errors import ConfigError, DataError

from .console import progress, reported
from .writers import ShardFormat

__all__ = ["app"]

app = typer.Typer(
    help="Prepare sharded datasets for InfoBatch: convert images to shards, index tars; and a demo.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_UNITS = {"": 1, "KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30}


def parse_size(text: str) -> int:
    """``64MB`` -> bytes; units KB, MB, GB (powers of 1024, as in mosaicml-streaming) or none."""
    match = re.fullmatch(r"(\d+)\s*([KMG]B|)", text.strip().upper())
    if match is None:
        raise typer.BadParameter(f"{text!r} is no size; write it as 64MB, 512KB, 1GB or a number of bytes.")
    return int(match[1]) * _UNITS[match[2]]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"infobatch-stream {version('infobatch-stream')}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Options of the command itself; they are handled by their callbacks."""


@app.command("convert")
def convert_command(
    src: Annotated[
        Path,
        typer.Argument(
            help="A tree of images, SRC/<class>/**/<image>, or a folder of idx files (MNIST): "
            "train-images-idx3-ubyte[.gz] with train-labels-idx1-ubyte[.gz], and t10k likewise."
        ),
    ],
    dst: Annotated[Path, typer.Argument(help="Folder for the shards; it appears only when complete.")],
    *,
    format: Annotated[ShardFormat, typer.Option(help="mds: mosaicml-streaming. wds: WebDataset tars.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of the shuffle; the same seed gives the same bytes.")] = 0,
    no_shuffle: Annotated[
        bool, typer.Option("--no-shuffle", help="Keep the samples sorted by class and path.")
    ] = False,
    shard_size: Annotated[
        int,
        typer.Option(
            parser=parse_size,
            metavar="SIZE",
            help="The largest size of a shard: KB, MB, GB are powers of 1024.",
        ),
    ] = "64MB",  # type: ignore[assignment]  # typer parses a default as it does an argument
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the shards in DST, once the new ones are complete.")
    ] = False,
) -> None:
    """Convert images into shards. Image files are copied byte for byte, in one global, seeded shuffle."""
    start = time.monotonic()
    with reported(), progress("samples") as bar:
        from .convert import convert

        done = convert(
            src, dst, format, seed=seed, shuffle=not no_shuffle, shard_bytes=shard_size, overwrite=overwrite,
            track=lambda samples, total, title: bar.track(samples, total, description=title),
        )  # fmt: skip
    seconds = time.monotonic() - start
    for part in done.parts:
        shards = "1 shard" if part.shards == 1 else f"{part.shards:,} shards"
        typer.echo(
            f"{part.path}: {part.samples:,} samples of {len(done.classes):,} classes in {shards}, {decimal(part.bytes)}"
        )
    total = sum(part.samples for part in done.parts)
    skipped = f"; skipped {done.skipped:,} files that are no images in class folders" if done.skipped else ""
    typer.echo(f"{seconds:.1f} s, {total / seconds:,.0f} samples/s{skipped}")


@app.command("index")
def index_command(
    shards: Annotated[
        list[str],
        typer.Argument(help="Tars, folders of tars, or patterns: 'data/shard-{000000..000099}.tar', 'data/*.tar'."),
    ],
) -> None:
    """Build the index of each tar, <shard>.index.npz, where there is none or the tar has changed since."""
    built = fresh = samples = 0
    failures: list[str] = []
    with reported(), progress("shards") as bar:
        from infobatch_stream.sources.tar_index import is_fresh, load_index
        from infobatch_stream.sources.urls import expand_shards

        paths = list(dict.fromkeys(expand_shards(shards)))
        for path in bar.track(paths, description="indexing"):
            try:
                was_fresh = is_fresh(path)
                samples += len(load_index(path))
            except (ConfigError, DataError, OSError) as error:
                failures.append(str(error))
            else:
                fresh += was_fresh
                built += not was_fresh
    typer.echo(f"{built:,} built, {fresh:,} already fresh, {samples:,} samples in total")
    for failure in failures:
        typer.echo(f"error: {failure}", err=True)
    if failures:
        typer.echo(f"{len(failures):,} of {len(paths):,} shards could not be indexed", err=True)
        raise typer.Exit(1)


class Optimizer(StrEnum):
    """The optimizers that the demo can train with."""

    ADAMW = "adamw"
    SGD = "sgd"


@app.command("demo")
def demo_command(
    *,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of idx files (Fashion-MNIST) to train on; default: scikit-learn's digits."),
    ] = None,
    nproc: Annotated[int, typer.Option(min=1, help="Processes; more than one run under torchrun with gloo.")] = 1,
    epochs: Annotated[int | None, typer.Option(min=2, help="Epochs of each run.  [default: digits 20, idx 12]")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How often every run is repeated, with another seed.")] = 2,
    optimizer: Annotated[Optimizer, typer.Option(help="sgd with momentum, as the paper, or adamw.")] = Optimizer.SGD,
    out: Annotated[Path, typer.Option(help="Where the plot goes.")] = Path("infobatch-demo.png"),
) -> None:
    """Train a small CNN on real images, in full and with InfoBatch, over MDS and WebDataset shards."""
    with reported():
        from .demo import demo

        demo(data, nproc=nproc, epochs=epochs, seeds=seeds, optimizer=optimizer.value, out=out, console=Console())
