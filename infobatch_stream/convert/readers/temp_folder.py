"""Folders for what a set of samples unpacks or fetches."""

import os
import shutil
import tempfile
import weakref

__all__ = ["temporary_folder"]


def temporary_folder(owner: object) -> str:
    """A new folder, which is removed when ``owner`` is dropped, or this process ends."""
    folder = tempfile.mkdtemp(prefix="infobatch-stream-")
    weakref.finalize(owner, _remove, folder, os.getpid())
    return folder


def _remove(folder: str, process: int) -> None:
    if os.getpid() == process:  # a child of a fork has the owner, too
        shutil.rmtree(folder, ignore_errors=True)
