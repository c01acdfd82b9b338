"""The command ``infobatch-stream demo``."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .console import reported

__all__ = ["demo_command"]


class Optimizer(StrEnum):
    """The optimizers that the demo can train with."""

    ADAMW = "adamw"
    SGD = "sgd"


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
        from infobatch_stream.demo.demo import demo

        demo(data, nproc=nproc, epochs=epochs, seeds=seeds, optimizer=optimizer.value, out=out, console=Console())
