"""What the commands show on a terminal: progress, and errors that a user can mend."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from infobatch_stream._formatting import visible
from infobatch_stream.errors import InfoBatchError

__all__ = ["AsJson", "counted", "progress", "reported", "say"]

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def say(text: object, *, err: bool = False) -> None:
    """Print a line or several, in which no name or content of a file can move the cursor."""
    typer.echo("\n".join(map(visible, str(text).split("\n"))), err=err)


def counted(number: int, noun: str) -> str:
    """``1 shard``, ``2,000 shards``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@contextmanager
def reported() -> Iterator[None]:
    """Turn what users can mend into one line on stderr (and a line for each note), and exit code 1."""
    try:
        yield
    except (InfoBatchError, OSError) as error:
        say(f"error: {error}", err=True)
        _echo_notes(error)
        raise typer.Exit(1) from None
    except (KeyboardInterrupt, SystemExit) as error:
        _echo_notes(error)
        raise


def _echo_notes(error: BaseException) -> None:
    for note in getattr(error, "__notes__", ()):
        say(note, err=True)


class _Rates(ProgressColumn):
    """Items per second, and bytes per second where a task counts them in its field ``bytes``."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        text = f"{task.finished_speed or task.speed or 0:,.0f} {self._unit}/s"
        if done := task.fields.get("bytes"):
            text += f"  {decimal(int(done / (task.finished_time or task.elapsed or 1)))}/s"
        return Text(text)


def progress(unit: str) -> Progress:
    """A progress bar on stderr; nothing where that is no terminal, since logs keep every line.

    ``update(task, advance=..., bytes=...)``: bytes are all that were done so far.
    """
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _Rates(unit),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
