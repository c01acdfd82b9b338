"""One remote tar: its index is read at once, its bytes are downloaded to the cache when they are needed."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from infobatch_stream.errors import DataError
from infobatch_stream.formats.tar_index import TarIndex
from infobatch_stream.sources.remote.download import BadBytesError, NotThereError, SpoiledError, download, size_of
from infobatch_stream.sources.remote.shard_cache import ShardCache
from infobatch_stream.sources.shard_file import ShardFile

__all__ = ["CachedTar"]

_ATTEMPTS = 20  # a shard may be removed between its download and its use, when the cache limit is tight
_LARGEST_INDEX = 2**30  # bytes
_REMEMBERED = 60.0  # seconds for which a download that failed is not tried again, if it took more than one


class CachedTar:
    """The tar at ``url``, which can be downloaded any time. Travels to other processes; threads may share it.

    Its index is that in the cache; else ``<url>.index.npz``, if the server has it and it is of a shard of this size;
    else the shard is downloaded and indexed.
    """

    is_remote = True
    has_ranges = True  # whether its bytes are those at the url

    def __init__(self, url: str, cache: ShardCache) -> None:
        self.url = url
        self._key = url  # by which the cache knows it
        self._times = 1  # its size is what it takes to make it
        self._cache = cache
        self._facts: tuple[int, int, int] | None = None  # size in bytes, samples, probe, since it was opened
        self._failure: tuple[float, str] | None = None  # when, and how

    def __getstate__(self) -> dict[str, Any]:
        """State for another process, which tries for itself."""
        return {**vars(self), "_failure": None}

    @property
    def size(self) -> int | None:
        """Its bytes, once it was indexed."""
        return self._facts[0] if self._facts else None

    def index(self) -> TarIndex:
        """Its index. Raises DataError when it cannot be had, or is another than at first; ConfigError for the limit."""
        place = self._cache.place(self._key, ".index.npz")
        index = TarIndex.read(place)
        if index is None:
            self._cache.fill(place, self.url, self._make_index, lambda: TarIndex.read(place) is not None)
            index = TarIndex.read(place)
        if index is None:
            raise DataError(f"{place} was damaged or removed just now; leave the cache folder alone.")
        facts = (index.stamp[0], len(index), int(index.probe[0]))
        if self._facts not in (None, facts):
            raise DataError(
                f"{self.url} changed after the dataset was opened, so an index may mean another sample now. Open the "
                "dataset again, with a new score store if the samples are others."
            )
        self._cache.check(self.url, facts[0])
        self._facts = facts
        return index

    @property
    def place(self) -> str:
        """Where it lies, or will lie."""
        return str(self._cache.place(self._key))

    def ensure_local(self) -> str:
        """The path at which it is now, whole. Raises DataError when it cannot be downloaded."""
        if self.size is not None and (found := self._cache.find(self._key, self.size)):
            return found
        if self._failure is not None and time.monotonic() < self._failure[0] + _REMEMBERED:
            raise DataError(self._failure[1])
        begun = time.monotonic()
        try:
            index = self.index()
            size = index.stamp[0]
            place = self._cache.place(self._key)
            self._cache.fill(
                place,
                self.url,
                lambda part, need: self._make_known(part, need, index),
                lambda: self._cache.find(self._key, size) is not None,
                self._times * size,
            )
            return str(place)
        except DataError as error:
            if time.monotonic() > begun + 1:
                self._failure = time.monotonic(), str(error)
            raise

    def file(self) -> ShardFile:
        """It, open for reading; downloaded first if need be."""
        for _ in range(_ATTEMPTS):
            path = self.ensure_local()
            try:
                return ShardFile(path, _stamp(path))
            except (DataError, OSError):  # removed since, or downloaded anew
                continue
        raise DataError(
            f"{self.url} was removed from the cache {_ATTEMPTS} times before it could be read: cache_limit is too "
            "small for the processes that read at once. Raise it, to a few hundred shards if you can."
        )

    def is_here(self) -> bool:
        """Whether it can be read without a download."""
        return self._cache.place(self._key).exists()

    def _make(self, part: Path, need: Callable[[int], None], index: TarIndex | None) -> None:
        """Write it to ``part``, and compare it with the ``index``, if known. Raises SpoiledError if it differs."""

        def check(place: Path) -> None:
            if index is not None and (what := index.differs_from(place)):
                raise BadBytesError(what)

        download(self.url, part, None if index is None else index.stamp[0], need=need, check=check)

    def _make_known(self, part: Path, need: Callable[[int], None], index: TarIndex) -> None:
        try:
            self._make(part, need, index)
        except SpoiledError:
            with suppress(OSError):  # so that the next to open it does not believe it either
                self._cache.place(self._key, ".index.npz").unlink()
            raise

    def _make_index(self, part: Path, _: Callable[[int], None]) -> None:
        if self._fetch_index(part):
            return

        def make(shard: Path, need: Callable[[int], None]) -> None:
            self._make(shard, need, None)
            TarIndex.build(str(shard), self.url, checksum=True).save(part)

        self._cache.fill(self._cache.place(self._key), self.url, make, lambda: False, None)

    def _fetch_index(self, part: Path) -> bool:
        """Whether there is an index beside the shard, which is now at ``part``."""

        def need(size: int) -> None:
            if size > _LARGEST_INDEX:
                raise NotThereError(f"The index of {self.url} has over {_LARGEST_INDEX:,} bytes.")

        path, query, rest = self.url.partition("?" if self.url.lower().startswith("http") else "\0")
        try:
            download(f"{path}.index.npz{query}{rest}", part, need=need)
        except NotThereError:  # some answer so for what one may not know of
            return False
        if TarIndex.read(part, size_of(self.url)) is not None:
            return True
        part.unlink()
        return False


def _stamp(path: str) -> tuple[int, int]:
    stat = os.stat(path)  # noqa: PTH116
    return stat.st_size, stat.st_mtime_ns
