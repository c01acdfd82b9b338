"""The raw samples of a list of tars, read by index."""

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from operator import methodcaller
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from infobatch_stream._urls import AnyPath, is_remote, local_path
from infobatch_stream.errors import DataError
from infobatch_stream.formats.tar_headers import HEADER, LENGTH_AT, LENGTH_DIGITS, length_in
from infobatch_stream.formats.tar_index import TarIndex
from infobatch_stream.sources.per_process import PerProcess
from infobatch_stream.sources.remote.shard_cache import ShardCache
from infobatch_stream.sources.shard_file import MOST_OPEN, ShardFile, changed
from infobatch_stream.sources.webdataset.cached_tar import CachedTar
from infobatch_stream.sources.webdataset.index_cache import load_index

__all__ = ["Tar", "TarShards", "open_tar", "readable"]

T = TypeVar("T")

_INDEXES = 256  # kept per process
_BLOCK = 2**14  # bytes: a sample that is no longer is read at once; of a longer one each member, which is not copied
_THREADS = 16  # that wait for servers at once


class LocalTar:
    """A tar that lies on this machine, uncompressed."""

    is_remote = False

    def __init__(self, url: str, cache: ShardCache) -> None:
        self.url = url
        self._path = local_path(url)
        self._place = str(Path(self._path).absolute())  # wherever the process may go
        self._cache = cache
        self._stamp: tuple[int, int] | None = None  # since it was opened

    def index(self) -> TarIndex:
        """Its index, kept beside it if possible. Raises DataError if it is another than the first time."""
        index = load_index(self._place, self._cache.folder)
        if self._stamp not in (None, index.stamp):
            raise changed(self._path)
        self._stamp = index.stamp
        return index

    def file(self) -> ShardFile:
        """It, open; it must be what it was when it was first indexed."""
        return ShardFile(self._path, self._stamp or self.index().stamp, self._place)

    @property
    def size(self) -> int | None:
        """Its bytes, once it was indexed."""
        return self._stamp[0] if self._stamp else None

    def ensure_local(self) -> None:
        """Nothing: it is local."""

    def is_here(self) -> bool:
        """It is."""
        return True


Tar = LocalTar | CachedTar
"""One shard. It holds nothing open; threads may share it."""


def open_tar(url: str, cache: ShardCache) -> Tar:
    """The plain tar at ``url``, wherever that is."""
    return CachedTar(url, cache) if is_remote(url) else LocalTar(url, cache)


class TarShards(PerProcess):
    """The raw samples of a list of shards. Holds a few numbers per shard; indexes and files open when needed.

    tars: what to read by, instead of the urls as they are. counts: how many samples each has, if the indexes are not
    to be asked now; then ``probes`` are 0.
    """

    _own = "_index", "_file"

    def __init__(
        self,
        urls: list[str],
        cache: ShardCache | AnyPath | None = None,
        *,
        tars: Sequence[Tar] | None = None,
        counts: Sequence[int] | None = None,
    ) -> None:
        cache = cache if isinstance(cache, ShardCache) else ShardCache(cache)
        self.urls = urls
        self.tars = [open_tar(url, cache) for url in urls] if tars is None else list(tars)
        self.is_remote = any(tar.is_remote for tar in self.tars)
        # An evicted shard takes room on the disk as long as it is open. So under a limit none is open between batches.
        self._keep_open = cache.limit is None or not self.is_remote
        self._checks_counts = counts is not None
        if counts is None:
            facts = _in_threads(_facts, self.tars) if self.is_remote else list(map(_facts, self.tars))
            counts, self.probes = ([fact[n] for fact in facts] for n in (0, 1))
        else:
            self.probes = [0] * len(urls)
        self.sizes = np.array(counts, np.int64)
        self.ends: list[int] = np.cumsum(self.sizes).tolist()
        if self.ends[-1] == 0:
            raise DataError(f"There is no sample in {len(urls)} shard(s), the first {urls[0]}; check the path.")
        self._cache = cache
        self._compared: set[str] = set()
        self._renew()

    @property
    def capacity(self) -> int | None:
        """How many shards the cache keeps at least, whichever they are; None if all."""
        if self._keep_open:
            return None
        assert self._cache.limit is not None
        return max(1, self._cache.limit // max(tar.size or self._cache.limit for tar in self.tars if tar.is_remote))

    def _renew(self) -> None:
        # Not methods of this object: the cycle would keep its files open.
        self._index = lru_cache(_INDEXES)(methodcaller("index"))
        self._file = lru_cache(MOST_OPEN if self._keep_open else 1)(methodcaller("file"))

    def close(self) -> None:
        """Close files that must not stay open."""
        if not self._keep_open:
            self._file.cache_clear()

    def readahead(self, numbers: Iterable[int]) -> None:
        """Have the system read the samples ``numbers`` ahead, unless the first of them is in memory.

        Those of shards that are not local, or cannot stay open, are left out.
        """
        for place, number in enumerate(numbers):
            if not self._keep_open or not self.tars[bisect_right(self.ends, number)].is_here():
                continue
            _, _, file, members = self._find(number)
            if members and not file.readahead(*_span(members)) and place == 0:
                return

    def read(self, number: int) -> dict[str, Any]:
        """Sample ``number``, 0 <= number < N, as webdataset yields it before any stage."""
        key, url, file, members = self._find(number)
        sample: dict[str, Any] = {"__key__": key, "__url__": url}
        if not members:
            return sample
        start, size = _span(members)
        start, size = start - HEADER, size + HEADER
        block = file.read(start, size) if size <= _BLOCK else None
        for extension, offset, length in members:
            before = offset - HEADER
            # With its header, whose page is read anyway.
            source, at = file.view(before, HEADER + length) if block is None else (block, before - start)
            if source[at + LENGTH_AT : at + LENGTH_AT + LENGTH_DIGITS] != b"%011o" % length:
                self._compare(number, file, source[at : at + HEADER], length)
            sample[extension] = source[at + HEADER : at + HEADER + length]
            sample["__local_path__"] = file.path  # webdataset has it behind the first field
        return sample

    def _compare(self, number: int, file: ShardFile, header: bytes, length: int) -> None:
        """Raise DataError if the index of sample ``number`` is wrong, of which ``header`` may say another ``length``.

        Then all of the index is compared, once: an extended header may say otherwise than the header.
        """
        shard = bisect_right(self.ends, number)
        url = self.urls[shard]
        if url in self._compared or length_in(header) == length:
            return
        if not self._index(self.tars[shard]).has_members_of(file.place):
            raise DataError(
                f"The index of {url} does not say where its members lie, though its size and time are "
                f"those of the shard. Remove {file.path}.index.npz, or what the cache has for it, and open the dataset "
                "again; with a new score store, if there are other samples then."
            )
        self._compared.add(url)

    def _find(self, number: int) -> tuple[str, str, ShardFile, list[tuple[str, int, int]]]:
        """Key and url of sample ``number``, the file that has it, and its members there."""
        shard = bisect_right(self.ends, number)
        index: TarIndex = self._index(self.tars[shard])
        if self._checks_counts and len(index) != self.sizes[shard]:
            raise DataError(
                f"{self.urls[shard]} has {len(index):,} samples, but counts says {self.sizes[shard]:,}. Mend the "
                "counts, and begin with a new score store."
            )
        row = number - (self.ends[shard - 1] if shard else 0)
        return index.key(row), self.urls[shard], self._file(self.tars[shard]), index.members(row)


def readable(urls: list[str], cache: ShardCache) -> tuple[list[str], list[str]]:
    """Those of the tars that can be read by index, and why the others cannot. Raises DataError where none can."""
    good, bad = [], []
    for url in urls:
        try:
            open_tar(url, cache).index()
            good.append(url)
        except DataError as error:
            bad.append(error)
    if not good:
        raise bad[0]
    return good, list(map(str, bad))


def _facts(tar: Tar) -> tuple[int, int]:
    """Samples and probe."""
    index = tar.index()
    return len(index), int(index.probe[0])


def _in_threads(function: Callable[[Tar], T], tars: list[Tar]) -> list[T]:
    """What ``function`` gives for each of the tars, several at once; of its errors the first by their order.

    When it is left early (by Ctrl-C, say), nobody waits for the threads.
    """
    found: dict[int, T] = {}
    errors: dict[int, BaseException] = {}
    left = iter(range(len(tars)))
    lock = threading.Lock()

    def work() -> None:
        while not errors:
            with lock:
                number = next(left, None)
            if number is None:
                return
            try:
                found[number] = function(tars[number])
            except BaseException as error:
                errors[number] = error

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(_THREADS, len(tars)))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException as error:
        errors[-1] = error
        raise
    if errors:
        raise errors[min(errors)]
    return [found[number] for number in range(len(tars))]


def _span(members: list[tuple[str, int, int]]) -> tuple[int, int]:
    """Where the members of a sample begin, and how many bytes there are to the end of the last."""
    start, (_, last, length) = members[0][1], members[-1]
    return start, last + length - start
