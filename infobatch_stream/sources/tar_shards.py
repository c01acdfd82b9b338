"""The raw samples of a list of tars, read by index."""

from bisect import bisect_right
from collections.abc import Iterable
from functools import lru_cache, partial
from typing import Any

import numpy as np

from infobatch_stream.errors import DataError
from infobatch_stream.sources.shard_file import MOST_OPEN, ShardFile, changed
from infobatch_stream.sources.tar_index import AnyPath, TarIndex, load_index
from infobatch_stream.sources.urls import local_path

__all__ = ["TarShards"]

_INDEXES = 256  # kept per process
_BLOCK = 2**14  # bytes: a sample that is no longer is read at once; of a longer one each member, which is not copied


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
        self.ends: list[int] = np.cumsum(self.sizes).tolist()
        if self.ends[-1] == 0:
            raise DataError(f"There is no sample in {len(urls)} shard(s), the first {urls[0]}; check the path.")
        self._open_caches()

    def _open_caches(self) -> None:
        self._index = lru_cache(_INDEXES)(partial(load_index, cache_dir=self._cache_dir))
        self._file = lru_cache(MOST_OPEN)(ShardFile)

    def __getstate__(self) -> dict[str, Any]:
        """State without indexes and open files: each process has its own."""
        return {name: value for name, value in vars(self).items() if name not in ("_index", "_file")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The state, with nothing open yet."""
        vars(self).update(state)
        self._open_caches()

    def announce(self, numbers: Iterable[int]) -> None:
        """Have the system fetch the samples ``numbers`` at once, unless it has the first of them in memory."""
        for place, number in enumerate(numbers):
            _, _, file, members = self._find(number)
            if members and not file.announce(*_span(members)) and place == 0:
                return

    def read(self, number: int) -> dict[str, Any]:
        """Sample ``number``, 0 <= number < N, as webdataset yields it before any stage."""
        key, url, file, members = self._find(number)
        sample: dict[str, Any] = {"__key__": key, "__url__": url}
        if not members:
            return sample
        start, size = _span(members)
        block = file.read(start, size) if size <= _BLOCK else None
        for extension, offset, length in members:
            source, at = file.view(offset, length) if block is None else (block, offset - start)
            sample[extension] = source[at : at + length]
            sample["__local_path__"] = file.path  # webdataset has it behind the first field
        return sample

    def _find(self, number: int) -> tuple[str, str, ShardFile, list[tuple[str, int, int]]]:
        """Key and url of sample ``number``, the file that has it, and its members there."""
        shard = bisect_right(self.ends, number)
        path, stamp = self.paths[shard], self._stamps[shard]
        index: TarIndex = self._index(path)
        if index.stamp != stamp:
            raise changed(path)
        row = number - (self.ends[shard - 1] if shard else 0)
        return index.key(row), self.urls[shard], self._file(path, stamp), index.members(row)


def _span(members: list[tuple[str, int, int]]) -> tuple[int, int]:
    """Where the members of a sample begin, and how many bytes there are to the end of the last."""
    start, (_, last, length) = members[0][1], members[-1]
    return start, last + length - start
