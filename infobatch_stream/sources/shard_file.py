"""A file of samples that is open for reading."""

import os
from collections.abc import Callable
from itertools import repeat
from mmap import MADV_RANDOM, PROT_READ, mmap

from infobatch_stream.errors import DataError

__all__ = ["MOST_OPEN", "ShardFile", "changed"]

# Files that a source keeps open per process. The usual limit of open files is 1024, and a map takes one too.
MOST_OPEN = 128
_LARGE = 2**15  # bytes, from which on a map is quicker than a read, if they are in memory
_NOWAIT = getattr(os, "RWF_NOWAIT", 0)
_ANYWHERE = [bytearray(1)]  # for a byte that nobody looks at


class ShardFile:
    """A shard open for reading, closed with its last reference.

    Of the files' position nothing is shared, since `pread` is given the offset: so a file that is open at a fork
    serves both processes, and several threads. Unlike a memory map it gives an error and no SIGBUS when the file is
    cut short or the disk fails, and does not wait page by page. But for large samples that the system has in memory it
    takes twice as long; those are copied from a map, after a look at whether they are there.

    path: as it is called. stamp: size in bytes and modification time in ns that the file must have. place: where it is,
    if ``path`` is relative and may have been given in another working folder. Raises DataError when it has another
    stamp, or cannot be read.
    """

    def __init__(self, path: str, stamp: tuple[int, int], place: str | None = None) -> None:
        self._fd = -1
        self.path = path
        self.place = place or path
        self.size = stamp[0]
        self._map: mmap | None = None
        try:
            self._fd = os.open(self.place, os.O_RDONLY | os.O_CLOEXEC)
            stat = os.fstat(self._fd)
        except OSError as error:
            raise DataError(
                f"Shard {path} cannot be read ({error.strerror}); it could when the dataset was opened."
            ) from error
        if (stat.st_size, stat.st_mtime_ns) != stamp:
            raise changed(path)
        if hasattr(os, "posix_fadvise"):
            # Reading ahead fetches what the next random read does not want.
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        """Close the file."""
        if self._fd >= 0:
            close(self._fd)

    def view(self, offset: int, length: int) -> tuple[bytes | mmap, int]:
        """Something that has the bytes offset..offset+length-1, and where in it they begin. Slices of it are bytes.

        Raises DataError as `read` does.
        """
        if length >= _LARGE and self._is_in_memory(offset, length):
            try:
                return self._mapped(), offset
            except (OSError, ValueError):  # no maps here, or too many; or the file was cut elsewhere
                pass
        return self.read(offset, length), 0

    def readahead(self, offset: int, length: int) -> bool:
        """Have the system read the bytes offset..offset+length-1 ahead; False when they are in memory already."""
        if not length or self._is_in_memory(offset, length):
            return False
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)
        return True

    def _mapped(self) -> mmap:
        if self._map is None:
            self._map = mmap(self._fd, self.size, prot=PROT_READ)
            self._map.madvise(MADV_RANDOM)
        return self._map

    def _is_in_memory(self, offset: int, length: int) -> bool:
        """Whether the middle is, and the end not cut off. (The pages at both ends are the neighbours' too.)"""
        if not _NOWAIT or os.lseek(self._fd, 0, os.SEEK_END) < offset + length:  # nobody reads from the position
            return False
        try:
            return os.preadv(self._fd, _ANYWHERE, offset + length // 2, _NOWAIT) == 1
        except OSError:  # it is not, or the file system does not tell
            return False

    def read_each(self, offsets: list[int], lengths: list[int]) -> list[bytes]:
        """As many parts of the file, as `read` gives each; a third of its time where they are small."""
        try:
            parts = list(map(os.pread, repeat(self._fd), lengths, offsets))
        except OSError:
            parts = []
        if list(map(len, parts)) == lengths:
            return parts
        return [self.read(offset, length) for offset, length in zip(offsets, lengths, strict=True)]

    def read(self, offset: int, length: int) -> bytes:
        """The bytes offset..offset+length-1. Raises DataError when the file has not so many, or fails."""
        try:
            data = os.pread(self._fd, length, offset)
            while len(data) < length:  # one call gives 2 GiB at most
                part = os.pread(self._fd, length - len(data), offset + len(data))
                if not part:
                    raise DataError(
                        f"Shard {self.path} was cut short after it was indexed: {length:,} bytes expected at "
                        f"{offset:,}, {len(data):,} found. Restore the shard and open the dataset again."
                    )
                data += part
        except OSError as error:
            raise DataError(f"Shard {self.path} cannot be read at {offset:,} ({error.strerror}).") from error
        return data


def changed(path: str) -> DataError:
    """The error for a file at ``path`` that is not what it was when it was indexed."""
    return DataError(
        f"Shard {path} changed (size or time) after the dataset was opened, so an index may mean another sample "
        "now. Open the dataset again, with a new score store if the samples are others."
    )
