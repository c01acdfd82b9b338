"""The commands of ``infobatch-stream``. What they do is in the modules they import, when they are called."""

from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .console import reported
from .convert import convert_command
from .report import report_command
from .scores import export_command, inspect_command, simulate_command
from .shards import index_command, verify_command
from .unlock import unlock_command

__all__ = ["app"]

app = typer.Typer(
    help="Prepare sharded datasets for InfoBatch: convert data to shards, verify and index them; and a demo.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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


app.command("convert")(convert_command)
app.command("verify")(verify_command)
app.command("index")(index_command)
app.command("inspect")(inspect_command)
app.command("report")(report_command)
app.command("simulate")(simulate_command)
app.command("export")(export_command)
app.command("unlock")(unlock_command)


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
        from infobatch_stream.demo.demo import demo

        demo(data, nproc=nproc, epochs=epochs, seeds=seeds, optimizer=optimizer.value, out=out, console=Console())
