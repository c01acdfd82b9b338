"""The command ``infobatch-stream report``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from .console import reported, say
from .scores import Cache, Store

__all__ = ["report_command"]


def report_command(
    store: Store,
    *,
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="SHARDS",
            help="Show samples of these shards, those that the run read: a folder or url of MDS shards, or tars: a "
            "folder, a pattern, braces, urls.",
        ),
    ] = None,
    cache: Cache = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the page goes.")] = Path("report.html"),
    samples: Annotated[int, typer.Option(min=1, max=1000, help="Samples in a gallery, at most.")] = 32,
) -> None:
    """Make one HTML file of a run: what was saved, how scores moved, the hardest samples; also while it goes on."""
    with reported():
        from infobatch_stream.report.page import write

        size = write(store, out, dataset=dataset, count=samples, cache=cache)
    say(f"{out}: {decimal(size)}")
