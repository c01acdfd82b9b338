"""The raw samples of a list of tars, read by index."""

import os
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any, NoReturn

import numpy as np

from infobatch_stream.errors import DataError
from infobatch_stream.sources.tar_index import AnyPath, TarIndex, load_index
from infobatch_stream.sources.urls import local_path

__all__ = ["TarShards"]

_INDEXES, _FILES = 256, 128  # kept open per process; the usual limit of open files is 1024
_GAP = 2**20  # bytes between a sample's members that are read along with them rather than skipped


class TarShards:
    """The raw samples of a list of shards. Holds a few numbers per shard; indexes and files open when needed."""

    def __init__(self, urls: list[str], cache_dir: AnyPath | None) -> None:
        self.urls = urls
        self.paths = [local_path(url) for url in urls]
        self._cache_dir = cache_dir
        self._stamps: list[tuple[int, int]] = []
        self.probes: list[int] = []
        sizes = []
        for path in self.paths:
            index = load_index(path, cache_dir)
            sizes.append(len(index))
            self._stamps.append(index.stamp)
            self.probes.append(int(index.probe[0]))
        self.sizes = np.array(sizes, np.int64)
        self.ends = np.cumsum(self.sizes)
        if self.ends[-1] == 0:
            raise DataError(f"There is no sample in {len(urls)} shard(s), the first {urls[0]}; check the path.")
        self._open_caches()

    def _open_caches(self) -> None:
        # Of the files' position nothing is shared, since pread is told where to read: so files that are open at
        # a fork serve both processes, and several threads. An evicted file stays open until its readers are done.
        self._index = lru_cache(_INDEXES)(partial(load_index, cache_dir=self._cache_dir))
        self._file = lru_cache(_FILES)(_ShardFile)

    def __getstate__(self) -> dict[str, Any]:
        """State without indexes and open files: each process has its own."""
        return {name: value for name, value in vars(self).items() if name not in ("_index", "_file")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The state, with nothing open yet."""
        vars(self).update(state)
        self._open_caches()

    def read(self, number: int) -> dict[str, Any]:
        """Sample ``number``, 0 <= number < N, as webdataset yields it before any stage."""
        shard = int(self.ends.searchsorted(number, side="right"))
        path, stamp = self.paths[shard], self._stamps[shard]
        index: TarIndex = self._index(path)
        if index.stamp != stamp:
            _refuse_changed(path)
        row = number - int(self.ends[shard] - self.sizes[shard])
        sample: dict[str, Any] = {"__key__": index.key(row), "__url__": self.urls[shard]}
        for extension, payload in self._file(path, stamp).read(index.members(row)):
            sample[extension] = payload
            sample["__local_path__"] = path  # webdataset has it behind the first field
        return sample


class _ShardFile:
    """A shard open for reading, closed with its last reference."""

    def __init__(self, path: str, stamp: tuple[int, int]) -> None:
        self._fd = -1
        self._path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            stat = os.fstat(self._fd)
        except OSError as error:
            raise DataError(
                f"Shard {path} cannot be read ({error.strerror}); it could when the dataset was opened."
            ) from error
        if (stat.st_size, stat.st_mtime_ns) != stamp:
            _refuse_changed(path)
        if hasattr(os, "posix_fadvise"):
            # Reading ahead fetches what the next random read does not want.
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if self._fd >= 0:
            close(self._fd)

    def read(self, members: list[tuple[str, int, int]]) -> Iterator[tuple[str, bytes]]:
        """Extension and payload of each of ``members`` (extension, offset, length), ascending in the file."""
        if not members:
            return
        start, (_, last, length) = members[0][1], members[-1]
        if last + length - start - sum(length for _, _, length in members) > _GAP:
            for extension, offset, length in members:
                yield extension, self._pread(offset, length)
            return
        block = self._pread(start, last + length - start)
        for extension, offset, length in members:
            yield extension, block[offset - start : offset - start + length]

    def _pread(self, offset: int, length: int) -> bytes:
        data = b""
        while len(data) < length:  # one call gives 2 GiB at most
            try:
                part = os.pread(self._fd, length - len(data), offset + len(data))
            except OSError as error:
                raise DataError(f"Shard {self._path} cannot be read at {offset:,} ({error.strerror}).") from error
            if not part:
                raise DataError(
                    f"Shard {self._path} was cut short after it was indexed: {length:,} bytes expected at "
                    f"{offset:,}, {len(data):,} found. Restore the shard and open the dataset again."
                )
            data = data + part if data else part
        return data


def _refuse_changed(path: str) -> NoReturn:
    raise DataError(
        f"Shard {path} changed (size or time) after the dataset was opened, so an index may mean another sample "
        "now. Open the dataset again, with a new score store if the samples are others."
    )
