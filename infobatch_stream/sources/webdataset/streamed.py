"""WebDataset tars that are compressed, or the output of commands: kept as plain tars in the cache, and read there."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from infobatch_stream._urls import AnyPath, base_name, is_compressed, is_pipe, is_remote, local_path
from infobatch_stream._validation import whole_number
from infobatch_stream.errors import ConfigError, DataError
from infobatch_stream.formats.tar_index import TarIndex
from infobatch_stream.sources.remote.download import SpoiledError, download
from infobatch_stream.sources.remote.shard_cache import ShardCache
from infobatch_stream.sources.urls import expand_shards
from infobatch_stream.sources.webdataset.cached_tar import CachedTar
from infobatch_stream.sources.webdataset.dataset import IndexedWebDataset, need_webdataset
from infobatch_stream.sources.webdataset.decompress import BadStreamError, command_output, decompress
from infobatch_stream.sources.webdataset.shards import TarShards, open_tar

__all__ = ["StreamedWebDataset"]

Counts = int | Sequence[int] | Mapping[str, int] | AnyPath


class StreamedWebDataset(IndexedWebDataset):
    """An `IndexedWebDataset` of compressed tars (.tgz, .tar.gz, .bz2, .xz, .zst) and of commands (``pipe:...``) too.

    Such a shard is decompressed once, and its plain tar is kept in the cache. Samples are read from there by index, so
    an epoch decodes only the samples that it keeps.

    Args:
        urls: As for `IndexedWebDataset`; also compressed tars and commands.
        counts: Samples per shard: one number for all, a list in the order of the shards, a dict by url (or its last
            part), or the path of a JSON file of one of these. None: each shard is read when it is opened for the first
            time; later openings have its index.
        cache_dir: As for `IndexedWebDataset`.
        cache_limit: As for `IndexedWebDataset`; it counts the plain tars. What was removed is decompressed again.

    Raises:
        ConfigError: As for `IndexedWebDataset`; also for ``counts`` that do not fit the shards.
        DataError: As for `IndexedWebDataset`. When it is read, also for a shard that cannot be decompressed, whose
            command fails, or that has another number of samples than ``counts`` says.
    """

    def __init__(
        self,
        urls: AnyPath | Iterable[AnyPath],
        counts: Counts | None = None,
        *,
        cache_dir: AnyPath | None = None,
        cache_limit: int | str | None = None,
    ) -> None:
        need_webdataset()
        expanded = expand_shards(urls, streamed=True)
        cache = ShardCache(cache_dir, cache_limit)
        tars = [
            _StreamedTar(url, cache) if is_pipe(url) or is_compressed(url) else open_tar(url, cache) for url in expanded
        ]
        self._open(TarShards(expanded, cache, tars=tars, counts=_counts_of(counts, expanded)))

    @property
    def shard_probes(self) -> list[int]:
        """All 0: with counts, a store must not depend on whether the shards were read already."""
        return [0] * len(self.urls)


class _StreamedTar(CachedTar):
    """The plain tar of a compressed one, or of what a command gives."""

    has_ranges = False

    def __init__(self, url: str, cache: ShardCache) -> None:
        super().__init__(url, cache)
        self._times = 2 if is_remote(url) else 1
        self._folder = Path.cwd()  # that its path, and those in its command, are relative to, wherever the process goes
        name = url
        if is_pipe(url):
            name = f"{url} in {self._folder}"
        elif not is_remote(url):
            self._path = self._folder / local_path(url)
            try:
                stat = self._path.stat()
            except OSError as error:
                raise _unreadable(self._path, error) from error
            name = f"{self._path} {stat.st_size} {stat.st_mtime_ns}"  # one that was written anew is another
        self._key = f"{name} plain"

    def _make(self, part: Path, need: Callable[[int], None], index: TarIndex | None) -> None:
        try:
            self._write_plain(part, need)
        except BadStreamError:
            if not is_remote(self.url):
                raise
            self._write_plain(part, need)  # downloaded again
        size = part.stat().st_size
        what = "" if index is None else index.differs_from(part) if size == index.stamp[0] else f"it has {size:,} bytes"
        if what:
            raise SpoiledError(
                f"{self.url} gives other bytes than when it was indexed ({what}). Open the dataset again, with a new "
                "score store if the samples are others."
            )

    def _write_plain(self, part: Path, need: Callable[[int], None]) -> None:
        if is_pipe(self.url):
            with command_output(self.url, self._folder) as file:
                decompress(file, self.url, part, need)
        elif not is_remote(self.url):
            try:
                file = self._path.open("rb")
            except OSError as error:
                raise _unreadable(self._path, error) from error
            with file:
                decompress(file, self.url, part, need)
        else:  # first as it is, since what comes from elsewhere may have to be asked for again
            packed = part.with_name(f"{part.name}.packed.part")
            try:
                download(self.url, packed, need=need)
                with packed.open("rb") as file:
                    taken = packed.stat().st_size
                    decompress(file, self.url, part, lambda size: need(taken + size))
            finally:
                packed.unlink(missing_ok=True)

    def _fetch_index(self, part: Path) -> bool:
        """Nobody has one of the plain tar."""
        return False


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"Shard {path} cannot be read ({error.strerror}); check the path.")


def _counts_of(counts: Counts | None, urls: list[str]) -> list[int] | None:
    """Samples of each of ``urls``; None if nothing is known."""
    given: Any = counts
    if isinstance(counts, str | os.PathLike):
        try:
            given = json.loads(Path(counts).read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"counts={os.fspath(counts)!r}: it is no JSON file that can be read ({error})."
            ) from error
    if given is None and counts is None:
        return None
    if isinstance(given, Mapping):
        missing = [url for url in urls if url not in given and base_name(url) not in given]
        if missing:
            raise ConfigError(f"counts has no number for {len(missing)} of {len(urls)} shards, as {missing[0]!r}.")
        given = [given[url] if url in given else given[base_name(url)] for url in urls]
    elif not isinstance(given, Sequence):
        given = [given] * len(urls)
    if len(given) != len(urls):
        raise ConfigError(f"counts has {len(given)} numbers for {len(urls)} shards; give one for each.")
    return [whole_number(f"counts (of {url})", count, 0) for url, count in zip(urls, given, strict=True)]
