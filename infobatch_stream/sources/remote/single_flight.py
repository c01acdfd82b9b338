"""One process of a node makes a file; the others wait for it, and learn if it fails, or dies."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infobatch_stream._files import lock, unlock
from infobatch_stream.errors import DataError

__all__ = ["claim_of", "claimed"]

_BEGUN = b"\n"  # stands in a claim from its beginning; then the reason, if it failed


def claim_of(file: Path) -> Path:
    """Where the claim on ``file`` lies: it is there while the file is made, and stays when its maker is killed."""
    return file.with_name(file.name + ".claim")


@contextmanager
def claimed(file: Path) -> Iterator[bool]:
    """Only one thread of all processes is within, for each ``file``; whether the one before died there is given.

    Waits while another is within. If that one then leaves by an error, DataError with its text is raised here too, so
    that what takes long to fail does not fail once for each that waits. What a process left that died within is not
    to be trusted. Raises OSError when the folder cannot be written.
    """
    path = claim_of(file)
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
