"""The commands of ``infobatch-stream``. What they do is in the modules they import, when they are called."""

from importlib.metadata import version
from typing import Annotated

import typer

from .convert import convert_command
from .demo import demo_command
from .scores import export_command, inspect_command, report_command, simulate_command
from .seed import seed_command
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
app.command("seed")(seed_command)
app.command("unlock")(unlock_command)
app.command("demo")(demo_command)
