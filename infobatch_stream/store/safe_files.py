"""The files inside a store, opened only where they are: through no link, and only regular ones.

Whoever can put a file into a store must not make a run write to another file, nor wait for a pipe. The store itself may
be reached through links; every folder below it, and the file, is opened with O_NOFOLLOW.
"""

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

__all__ = ["link_inside", "names_in", "open_inside", "read_inside", "replace_inside"]

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def open_inside(root: Path, name: str, flags: int = os.O_RDONLY) -> int:
    """A descriptor of the file ``name``, as "pending/owner.json", of the store at ``root``; ``flags`` as of os.open.

    Raises OSError, also for a link on the way and for anything but a regular file.
    """
    *way, last = name.split("/")
    folder = _folder(root, way)
    try:
        found = _open(last, flags | os.O_NONBLOCK | os.O_CLOEXEC, folder)
    finally:
        os.close(folder)
    if not stat.S_ISREG(os.fstat(found).st_mode):
        os.close(found)
        raise OSError(errno.EINVAL, "not a regular file", str(root / name))
    return found


def read_inside(root: Path, name: str, limit: int) -> bytes:
    """All of a file of at most ``limit`` bytes. Raises OSError, as `open_inside` or for a larger one (EFBIG)."""
    with os.fdopen(open_inside(root, name), "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit:,} bytes", str(root / name))
    return data


def replace_inside(root: Path, name: str, data: bytes) -> None:
    """Put a file of ``data`` in the place of ``name``, with the folders that it needs; whole, or not at all.

    To be called by one process at a time. Raises OSError.
    """
    *way, last = name.split("/")
    folder, new = _folder(root, way, make=True), f".{last}.new"
    try:
        with suppress(FileNotFoundError):
            os.unlink(new, dir_fd=folder)  # of a process that was killed
        with os.fdopen(_open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, folder), "wb") as file:
            file.write(data)
        os.replace(new, last, src_dir_fd=folder, dst_dir_fd=folder)
    finally:
        os.close(folder)


def link_inside(old: Path, new: Path, name: str) -> None:
    """Give the file ``name`` of the store at ``old`` the same name in that at ``new``. Raises OSError."""
    os.close(open_inside(old, name))  # regular
    *way, last = name.split("/")
    source = _folder(old, way)
    try:
        target = _folder(new, way, make=True)
        try:
            os.link(last, last, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
        finally:
            os.close(target)
    finally:
        os.close(source)


def names_in(root: Path, name: str) -> list[str]:
    """What lies in the folder ``name`` of the store at ``root``, sorted; nothing when there is none."""
    try:
        folder = _folder(root, name.split("/"))
    except FileNotFoundError:
        return []
    try:
        return sorted(entry.name for entry in os.scandir(folder))
    finally:
        os.close(folder)


def _folder(root: Path, way: list[str], *, make: bool = False) -> int:
    found = os.open(root, _FOLDER)
    for name in way:
        outer = found
        try:
            if make:
                with suppress(FileExistsError):
                    os.mkdir(name, dir_fd=outer)
            found = _open(name, _FOLDER, outer)
        finally:
            os.close(outer)
    return found


def _open(name: str, flags: int, folder: int) -> int:
    try:
        return os.open(name, flags | os.O_NOFOLLOW, 0o644, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            with suppress(FileNotFoundError):
                if stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                    raise OSError(
                        errno.ELOOP, "a symbolic link; only the store as a whole may be reached by one", name
                    ) from error
        raise
