"""Temporary files and folders of processes that may be killed.

Each is locked (flock) as long as its process lives; one without a lock was left behind and can be removed.
"""

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ["abandoned", "hold", "make_held", "mark", "remove_abandoned"]

# Another process may have put anything there: a pipe would wait for ever, a link lead elsewhere.
_LOOK = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
_TRIES = 100
_MARKED = re.compile(r"(?=[0-9]*[a-f])[0-9a-f]{8,16}(-[0-9]+)?")  # any other name, a date say, may be a user's backup


def mark() -> str:
    """What makes a name one of ours, and of this process: hexadecimal digits, and a letter among them."""
    return secrets.token_hex(4)[1:] + secrets.choice("abcdef")


def hold(path: Path) -> int:
    """Lock a file or folder that no other process holds, until the descriptor that is returned is closed."""
    descriptor = os.open(path, _LOOK)
    _lock(descriptor)
    return descriptor


def make_held(make: Callable[[], Path]) -> tuple[Path, int]:
    """What ``make`` makes, and a `hold` on it.

    Between the two another process may take it for one that was left behind; then it is made anew.
    """
    for _ in range(_TRIES):
        path = make()
        with suppress(FileNotFoundError):
            descriptor = os.open(path, _LOOK)
            if _lock(descriptor) and _is_at(descriptor, path):  # nobody removes what he could not lock
                return path, descriptor
            os.close(descriptor)
    raise FileNotFoundError(errno.ENOENT, "removed by another process as soon as it was made", str(path))


def _lock(descriptor: int) -> bool:
    """Whether no other process has locked it; where a file system has no locks, nothing that is left is removed."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        there, held = path.lstat(), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (held.st_dev, held.st_ino)


def abandoned(folder: Path, prefix: str) -> Iterator[Path]:
    """Files and folders in ``folder`` that are named ``prefix`` and a `mark`, and locked by no process.

    Each is locked here until the next one.
    """
    for entry in sorted(folder.iterdir()):
        if not entry.name.startswith(prefix) or not _MARKED.fullmatch(entry.name.removeprefix(prefix)):
            continue
        with suppress(OSError):
            descriptor = os.open(entry, _LOOK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                mode = os.fstat(descriptor).st_mode
                if (stat.S_ISDIR(mode) or stat.S_ISREG(mode)) and _is_at(descriptor, entry):
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
