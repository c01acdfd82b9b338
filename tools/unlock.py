"""The command ``unlock``: folders of StreamingDatasets that killed runs left as in use."""

from pathlib import Path
from typing import Annotated

import typer

from .console import reported

__all__ = ["unlock_command"]


def unlock_command(
    not_shared: Annotated[
        bool,
        typer.Option(
            "--not-shared",
            help="No process outside of this container uses its shared memory (/dev/shm). It cannot see these: so in a "
            "container nothing is removed without this. Not for docker's --ipc=host, or a pod that shares it.",
        ),
    ] = False,
) -> None:
    """Free the local folders of StreamingDatasets whose processes were killed ("Reused local directory")."""
    with reported():
        from infobatch_stream.sources.mds.stale_memory import remove_stale_memory

        removed, kept = remove_stale_memory(not_shared=not_shared)
    for state in removed:
        typer.echo(f"free: {_named(state.folders)}")
    for state in kept:
        users = ", ".join(f"{process} ({_command(process)})" for process in state.processes)
        typer.echo(f"in use: {_named(state.folders)}, by process {users}")
    if kept:
        typer.echo(
            "A process also has open what was there before it began. If a folder above is of a run that ended, and its "
            "process is of another, wait for that, or give the new run a link to the folder as its local=."
        )
    if not removed and not kept:
        typer.echo("no shared memory of StreamingDatasets is here")


def _named(folders: tuple[str, ...]) -> str:
    return ", ".join(folders) or "a dataset that was closed"


def _command(process: int) -> str:
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return "it has ended"
    return b" ".join(words).decode(errors="replace").strip()[:80]
