"""Temporary files and folders of processes that may be killed.

Each is locked (flock) as long as its process lives; one without a lock was left behind and can be removed.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ["abandoned", "hold", "remove_abandoned"]


def hold(path: Path) -> int:
    """Lock a file or folder that this process has just made, until the descriptor that is returned is closed."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    with suppress(OSError):  # a file system without locks: what is left there stays
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def abandoned(folder: Path, prefix: str) -> Iterator[Path]:
    """What begins with ``prefix`` in ``folder`` and is locked by no process; locked here until the next one."""
    for entry in sorted(folder.iterdir()):
        if not entry.name.startswith(prefix):
            continue
        with suppress(OSError):
            descriptor = os.open(entry, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield entry
            finally:
                os.close(descriptor)


def remove_abandoned(folder: Path, prefix: str) -> None:
    """Remove what `abandoned` finds."""
    for entry in abandoned(folder, prefix):
        with suppress(OSError):
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()
