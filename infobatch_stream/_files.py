"""Locks, atomic writes and stale temporary files, for processes that share folders and may be killed at any moment.

The only module that calls flock. A lock belongs to an open file, which a forked child has open too: the lock ends when
the last of them has closed the file, or ended.
"""

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from infobatch_stream.errors import ConfigError

__all__ = [
    "abandoned", "hold", "lock", "locked", "make_held", "mark", "remove_abandoned", "replacing", "sync", "unlock",
    "whole_file",
]  # fmt: skip

# Another process may have put anything there: opening a pipe could block for ever, and links lead elsewhere.
_LOOK = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
_TRIES = 100
_MARKED = re.compile(r"(?=[0-9]*[a-f])[0-9a-f]{8,16}(-[0-9]+)?")  # other names, as dates, may be a user's backups


def lock(descriptor: int, *, wait: bool = False, shared: bool = False) -> bool:
    """Lock an open file or folder; returns whether that succeeded, which with ``wait`` it does in the end.

    Raises OSError on a file system without locks.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def unlock(descriptor: int) -> None:
    """End a `lock`. Closing the file is not enough if a child was forked meanwhile."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)


@contextmanager
def locked(path: Path, flags: int) -> Iterator[None]:
    """Hold an exclusive lock on a file or folder, also among threads. flags: for os.open."""
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        lock(descriptor, wait=True)
        try:
            yield
        finally:
            unlock(descriptor)
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's entries, to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(place: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yields a new file beside ``place`` to write to. It replaces ``place`` at the end, or is removed after an error.

    durable: flush the file and its new name to the disk. An OSError names ``place``.
    """
    new = place.with_name(f".{place.name[:200]}.{mark()}.tmp")
    try:
        with new.open("xb"):
            pass
        yield new
        if durable:
            sync(new)
        new.replace(place)
        if durable:
            sync(place.parent)
    except OSError as error:
        if error.filename == str(new):  # a temporary name means nothing to the user
            error.filename, error.filename2 = str(place), None
        raise
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def whole_file(out: Path) -> Iterator[Path]:
    """Yields a new file beside ``out`` to write to. It replaces ``out`` at the end, or is removed after an error.

    If ``out`` is a link, its target is replaced; a pipe or a device is written to directly. Raises ConfigError at once
    if ``out`` is a folder, or its folder does not exist; an OSError names ``out``.
    """
    if out.is_dir():
        raise ConfigError(f"{out} is a folder; give the name of a file, as {out / 'NAME'}.")
    if out.exists() and not out.is_file():
        yield out
        return
    place = Path(os.path.realpath(out))
    if not place.parent.is_dir():
        raise ConfigError(
            f"{out} cannot be written: there is no folder {place.parent}. Make it, or name another place."
        )
    try:
        with replacing(place) as new:
            yield new
    except OSError as error:
        if error.filename == str(place):
            error.filename = str(out)
        raise


def mark() -> str:
    """A random ending for names of temporary files: hexadecimal digits with at least one letter."""
    return secrets.token_hex(4)[1:] + secrets.choice("abcdef")


def hold(path: Path) -> int:
    """Open and lock a file or folder that no other process uses; the lock ends when the descriptor is closed."""
    descriptor = os.open(path, _LOOK)
    _lock(descriptor)
    return descriptor


def make_held(make: Callable[[], Path]) -> tuple[Path, int]:
    """Make a file or folder, and `hold` it; returns the path and the descriptor.

    Before it is locked, another process may remove it as abandoned; then it is made again.
    """
    for _ in range(_TRIES):
        path = make()
        with suppress(FileNotFoundError):
            descriptor = os.open(path, _LOOK)
            if _lock(descriptor) and _is_at(descriptor, path):  # only what can be locked is removed
                return path, descriptor
            os.close(descriptor)
    raise FileNotFoundError(errno.ENOENT, "removed by another process as soon as it was made", str(path))


def _lock(descriptor: int) -> bool:
    """Whether it could be locked, or the file system has no locks; then no process removes what is abandoned."""
    try:
        return lock(descriptor)
    except OSError:
        return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        there, held = path.lstat(), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (held.st_dev, held.st_ino)


def abandoned(folder: Path, prefix: str) -> Iterator[Path]:
    """Files and folders in ``folder`` whose names are ``prefix`` and a `mark`, and that no process holds.

    Each is locked until the next one is asked for.
    """
    for entry in sorted(folder.iterdir()):
        if not entry.name.startswith(prefix) or not _MARKED.fullmatch(entry.name.removeprefix(prefix)):
            continue
        with suppress(OSError):
            descriptor = os.open(entry, _LOOK)
            try:
                mode = os.fstat(descriptor).st_mode
                is_plain = stat.S_ISDIR(mode) or stat.S_ISREG(mode)
                if is_plain and lock(descriptor) and _is_at(descriptor, entry):
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
