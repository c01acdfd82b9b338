"""The raw samples of a list of tars, read by index."""

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache, partial
from itertools import groupby
from operator import itemgetter, methodcaller
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from infobatch_stream._urls import AnyPath, is_remote, local_path
from infobatch_stream.errors import DataError
from infobatch_stream.formats.tar_headers import length_in
from infobatch_stream.formats.tar_index import TarIndex
from infobatch_stream.sources.per_process import PerProcess
from infobatch_stream.sources.remote.ranges import Held
from infobatch_stream.sources.remote.shard_cache import ShardCache
from infobatch_stream.sources.shard_file import MOST_OPEN, ShardFile, changed
from infobatch_stream.sources.webdataset.cached_tar import CachedTar
from infobatch_stream.sources.webdataset.index_cache import load_index
from infobatch_stream.sources.webdataset.ranges import Wanted, read_samples
from infobatch_stream.sources.webdataset.raw_samples import (
    Copy,
    are_small,
    complete,
    raw_sample,
    small_samples,
    span_of,
)

__all__ = ["Tar", "TarShards", "open_tar", "readable"]

T = TypeVar("T")

_INDEXES = 256  # kept per process
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

    _own = "_index", "_file", "_held"

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
        self._held = Held()

    def close(self) -> None:
        """Close files that must not stay open."""
        if not self._keep_open:
            self._file.cache_clear()

    def readahead(self, numbers: Iterable[int]) -> None:
        """Have the system read the samples ``numbers`` ahead, unless the first of them is in memory.

        Those of shards that are not local, or cannot stay open, are left out.
        """
        for place, number in enumerate(numbers):
            shard, row = self._place(number)
            if not self._keep_open or not self.tars[shard].is_here():
                continue
            index, _, file = self._opened(shard)
            members = index.members(row)
            if members and not file.readahead(*span_of(members)) and place == 0:
                return

    def read(self, number: int) -> dict[str, Any]:
        """Sample ``number``, 0 <= number < N, as webdataset yields it before any stage."""
        held: dict[str, Any] | None = self._held.samples.get(number)
        if held is not None:
            return held.copy()
        shard, row = self._place(number)
        index, url, file = self._opened(shard)
        return raw_sample(index, row, url, file, partial(self._compare, shard, file))

    def read_many(self, numbers: list[int], *, large: bool) -> list[dict[str, Any] | None]:
        """Samples ``numbers``, ascending, as `read` gives each, in less time.

        Without ``large``, None for those of a shard with a longer one among them, so that not all of them are in memory
        at once. Raises as `read` does, for one of them.
        """
        if self._held.samples:  # there are few such batches
            return [None] * len(numbers)
        found: list[dict[str, Any] | None] = []
        later: list[Copy] = []
        shards = np.searchsorted(self.ends, numbers, side="right").tolist()
        for shard, group in groupby(zip(shards, numbers, strict=True), key=itemgetter(0)):
            rows = np.array([number for _, number in group]) - (self.ends[shard - 1] if shard else 0)
            small = are_small(self._index(self.tars[shard]), rows)
            if not (small or large):
                found += [None] * len(rows)
                continue
            index, url, file = self._opened(shard)
            check = partial(self._compare, shard, file)
            if small:
                found += small_samples(index, rows, url, file, check)
            else:
                found += [raw_sample(index, row, url, file, check, later) for row in rows.tolist()]
        complete(later)
        return found

    def by_ranges(self, numbers: Iterable[int]) -> AbstractContextManager[None] | None:
        """Download those of the samples ``numbers`` alone whose shards are not here; within, `read` has them.

        None where that does not pay, or is not possible. May raise anything.
        """
        wanted: list[Wanted] = []
        for number in sorted(set(numbers)):
            shard, row = self._place(number)
            tar = self.tars[shard]
            if not tar.is_here():
                if not isinstance(tar, CachedTar) or not tar.has_ranges or tar.size is None:
                    return None  # to index it would be to download it
                wanted.append((number, tar, self._index(tar), row))
        samples = read_samples(wanted)
        return None if samples is None else self._held.holding(samples)

    def _compare(self, shard: int, file: ShardFile, header: bytes, length: int) -> None:
        """Raise DataError if the index of ``shard`` is wrong, of which a ``header`` may say another ``length``.

        Then all of the index is compared, once: an extended header may say otherwise than the header.
        """
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

    def _place(self, number: int) -> tuple[int, int]:
        """The shard and row of sample ``number``."""
        shard = bisect_right(self.ends, number)
        return shard, number - (self.ends[shard - 1] if shard else 0)

    def _opened(self, shard: int) -> tuple[TarIndex, str, ShardFile]:
        """Index, url and file of ``shard``."""
        index: TarIndex = self._index(self.tars[shard])
        if self._checks_counts and len(index) != self.sizes[shard]:
            raise DataError(
                f"{self.urls[shard]} has {len(index):,} samples, but counts says {self.sizes[shard]:,}. Mend the "
                "counts, and begin with a new score store."
            )
        return index, self.urls[shard], self._file(self.tars[shard])


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
