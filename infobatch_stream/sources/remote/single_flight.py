"""One process of a machine makes a file; the others wait, and learn when it fails or dies."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infobatch_stream._files import lock, unlock
from infobatch_stream.errors import DataError

__all__ = ["lock_path", "single_flight"]

_BEGUN = b"\n"  # written to the lock file at first; the reason follows if it failed


def lock_path(file: Path) -> Path:
    """The lock file of ``file``: it exists while the file is made, and stays when its maker is killed."""
    return file.with_name(file.name + ".claim")


@contextmanager
def single_flight(file: Path) -> Iterator[bool]:
    """A lock for making ``file``, held by one thread of all processes; gives whether its last holder died.

    Waits while another holds it. If that one fails, DataError with its text is raised here too, so that a download
    that takes long to fail does not fail once for each waiter. Do not trust what a holder that died has left. Raises
    OSError when the folder cannot be written.
    """
    path = lock_path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _take(path)
    try:
        begun = os.pread(descriptor, 1, 0)
        os.pwrite(descriptor, _BEGUN, 0)
        try:
            yield bool(begun)
        except DataError as error:
            os.pwrite(descriptor, _BEGUN + str(error).encode(), 0)
            raise
        finally:
            path.unlink(missing_ok=True)
            unlock(descriptor)
    finally:
        os.close(descriptor)


def _take(path: Path) -> int:
    """A locked descriptor of the file at ``path``, made if need be."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            lock(descriptor, wait=True)
            if os.path.exists(path) and os.path.samestat(os.fstat(descriptor), os.stat(path)):  # noqa: PTH110, PTH116
                return descriptor
            # Who had it is through, and has removed it.
            if text := os.pread(descriptor, 2**16, 0).strip():
                raise DataError(text.decode(errors="replace"))
        except FileNotFoundError:  # removed between the two looks
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
