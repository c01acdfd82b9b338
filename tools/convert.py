"""The command ``infobatch-stream convert``."""

import dataclasses
import json
from enum import StrEnum
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.progress import TaskID

from infobatch_stream._formatting import visible
from infobatch_stream._validation import bytes_of
from infobatch_stream.convert.label_images import AUTO
from infobatch_stream.convert.manifest import Conversion, ConversionProgress
from infobatch_stream.convert.writers import ShardFormat
from infobatch_stream.errors import ConfigError

from .console import counted, progress, reported, say

__all__ = ["convert_command", "parse_size"]

_SHOWN = 10  # problems; --json has all
_SHOWN_CLASSES = 8
_LOST = 3  # the exit code where whole shards were passed over


def parse_size(text: str) -> int:
    """``64MB`` -> bytes; see `bytes_of`."""
    try:
        return bytes_of("SIZE", text)
    except ConfigError:
        raise typer.BadParameter(f"{text!r} is no size; write it as 64MB, 512KB, 1GB or a number of bytes.") from None


class OnError(StrEnum):
    """What to do with a sample that cannot be read."""

    RAISE = "raise"
    SKIP = "skip"


def parse_pairs(option: str, texts: list[str] | None, *, alone: bool = True) -> dict[str, str] | None:
    """``["image=jpg;png", "label"]`` -> a dict. alone: whether a name without a value stands for itself.

    Else it needs a value, which may be empty. A name may begin or end with a space.
    """
    pairs = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not name or (value.startswith("=") if alone else not equals):
            message = f"{texts}: write it as NAME=VALUE, and repeat the option for more."
            raise typer.BadParameter(message, param_hint=option)
        pairs[name] = value or text if alone else value
    return pairs or None


def parse_columns(texts: list[str] | None) -> dict[str, str] | None:
    """``["image", "mask=nearest"]`` -> how each column is made smaller."""
    return {text.partition("=")[0]: text.partition("=")[2] or AUTO for text in texts or ()} or None


def convert_command(
    src: Annotated[
        str,
        typer.Argument(
            help="Images, SRC/<class>/**/<image>; idx files (MNIST); CIFAR's Python files; tars; MDS; Parquet or CSV; "
            "a Hugging Face dataset saved on disk: a folder, a file, or a pattern as 'data/*.parquet'."
        ),
    ],
    dst: Annotated[str, typer.Argument(help="Folder for the shards, which appears when complete; or s3://, gs:// ...")],
    *,
    format: Annotated[ShardFormat, typer.Option(help="mds: mosaicml-streaming. wds: WebDataset tars.")],
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=SOURCE", help="A field to take, e.g. 'image=jpg;png'; repeat it.  [default: all]"),
    ] = None,
    encoding: Annotated[
        list[str] | None, typer.Option(metavar="NAME=ENCODING", help="MDS encoding, where not as inferred; repeat it.")
    ] = None,
    extension: Annotated[
        list[str] | None, typer.Option(metavar="NAME=EXTENSION", help="Extension in tars, likewise; repeat it.")
    ] = None,
    keys: Annotated[
        bool, typer.Option("--keys/--no-keys", help="Keep the keys of samples that have some, or number them anew.")
    ] = True,
    fill: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="What stands where a column of a table is empty; repeat it."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the shuffle; the same seed gives the same bytes.")] = 0,
    shuffle: Annotated[
        bool | None,
        typer.Option("--shuffle/--no-shuffle", help="One global shuffle.  [default: unless SRC are shards]"),
    ] = None,
    shard_size: Annotated[
        int,
        typer.Option(
            parser=parse_size,
            metavar="SIZE",
            help="The largest size of a shard: KB, MB, GB are powers of 1024.",
        ),
    ] = "64MB",  # type: ignore[assignment]  # typer parses a default as it does an argument
    shard_samples: Annotated[int | None, typer.Option(min=1, help="The most samples of a shard.")] = None,
    compression: Annotated[str | None, typer.Option(help="Of MDS shards, e.g. zstd:3.")] = None,
    hashes: Annotated[str, typer.Option(help="Of MDS shards, e.g. sha1,xxh64; '' for none.")] = "xxh64",
    resize: Annotated[int | None, typer.Option(min=1, help="Pixels of an image's shorter side, at most.")] = None,
    resize_column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=nearest|smooth]",
            help="A column to make smaller, and how: nearest for label images; repeat it.  [default: all, by looks]",
        ),
    ] = None,
    quality: Annotated[int | None, typer.Option(min=1, max=95, help="JPEG quality of images encoded again.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Decode each image, to find those that are damaged.")] = False,
    on_error: Annotated[OnError, typer.Option(help="What to do with a sample that cannot be read.")] = OnError.RAISE,
    allow_empty: Annotated[
        bool, typer.Option("--allow-empty", help="Let class folders without images keep their numbers.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the shards in DST, once the new ones are complete.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a conversion that was broken off; images may be mended before.")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Work on this Ray cluster: auto, local, or host:port.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")] = False,
) -> None:
    """Convert data into shards. Bytes are copied, not encoded again; the same arguments give the same shards.

    Exit code 0: done; 1: an error; 2: a wrong option; 3: done, but for whole shards that could not be read.
    """
    with reported(), progress("samples") as bar:
        tasks: dict[str, TaskID] = {}

        def show(now: ConversionProgress) -> None:
            if now.title not in tasks:
                tasks[now.title] = bar.add_task(visible(now.title) or "converting", total=now.total, bytes=0)
            bar.update(tasks[now.title], completed=now.samples, bytes=now.bytes)

        from infobatch_stream.convert import convert

        done = convert(
            src, dst, format,
            columns=parse_pairs("--column", column), encodings=parse_pairs("--encoding", encoding),
            extensions=parse_pairs("--extension", extension), keys=keys,
            fill=parse_pairs("--fill", fill, alone=False), seed=seed, shuffle=shuffle,
            shard_bytes=shard_size, shard_samples=shard_samples, compression=compression,
            hashes=[name.strip() for name in hashes.split(",") if name.strip()],
            resize=resize, resize_columns=parse_columns(resize_column), quality=quality, check=check,
            on_error=on_error.value, allow_empty=allow_empty,
            overwrite=overwrite, resume=resume, workers=workers, ray=ray, on_progress=show,
        )  # fmt: skip
    if as_json:
        typer.echo(json.dumps({**dataclasses.asdict(done), "seconds": round(done.seconds, 3)}, default=str))
    else:
        _print(done)
    if done.lost:
        raise typer.Exit(_LOST)


def _print(done: Conversion) -> None:
    for part in done.parts:
        # By the first of the classes one sees whether it was the right folder.
        names = ", ".join(done.classes[:_SHOWN_CLASSES]) + (", ..." if len(done.classes) > _SHOWN_CLASSES else "")
        classes = f" of {len(done.classes):,} classes ({names})" if done.classes else ""
        say(f"{part.path}: {part.samples:,} samples{classes} in {counted(part.shards, 'shard')}, {decimal(part.bytes)}")
    total, size = sum(part.samples for part in done.parts), sum(part.bytes for part in done.parts)
    seconds = done.seconds
    say(f"{seconds:.1f} s, {total / seconds:,.0f} samples/s, {decimal(int(size / seconds))}/s")
    for note in done.notes:
        say(f"note: {note}.")
    for shard in done.lost:
        say(f"skipped: {shard}", err=True)
    for problem in done.problems[:_SHOWN]:
        say(f"skipped: {problem}", err=True)
    if len(done.problems) > _SHOWN:
        say(f"skipped: {len(done.problems) - _SHOWN:,} more; --json lists all", err=True)
