"""The shards behind a report: which samples they hold, in which order, read one by one."""

import re
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from infobatch_stream import IndexedWebDataset, ScoreStore
from infobatch_stream._urls import base_name, folder_of, is_remote, local_path
from infobatch_stream.errors import ConfigError, DataError, StoreError
from infobatch_stream.formats.extensions import encoding_of
from infobatch_stream.formats.mds_encodings import from_mds
from infobatch_stream.formats.mds_index import LARGEST_INDEX, IndexedShard, entries_of, mds_fingerprint, shards_of
from infobatch_stream.formats.roles import LABELS, NAMES
from infobatch_stream.formats.schema import KEY, MEMBERS, Encoded
from infobatch_stream.formats.shard_list import holds_mds
from infobatch_stream.formats.tar_columns import TarColumns
from infobatch_stream.formats.tar_index import TarIndex
from infobatch_stream.report.thumbnails import Field, text_of
from infobatch_stream.sources import open_source
from infobatch_stream.sources.mds.values import AGAIN, LocalShard, LocalShards, MdsValues
from infobatch_stream.sources.remote.download import NotThereError, download
from infobatch_stream.sources.remote.shard_cache import ShardCache
from infobatch_stream.sources.sidecars import read_classes, read_columns

__all__ = ["Known", "ShardReader", "known_of", "open_shards", "open_shards_of"]

_WILD: Final = re.compile(r"[*?\[{]")


class ShardReader(Protocol):
    """Shards. names, ends: of the shards, and where each ends in the order of the samples."""

    fingerprint: str
    classes: list[str] | None
    names: list[str]
    ends: list[int]

    def fields(self, index: int) -> list[Field]:
        """The fields of a sample, its key among them. Raises DataError."""

    def keys(self, index: NDArray[np.int64]) -> list[str] | None:
        """The keys of the samples ``index``, int64[k]; None where samples have none. Raises DataError."""


def open_shards(dataset: str, cache: Path | None = None) -> ShardReader:
    """The shards of a dataset, to read single samples.

    Args:
        dataset: A folder of MDS shards (with index.json), or tars: a folder, a pattern, braces; local or urls.
        cache: Folder for what is read of urls; by default that of IndexedWebDataset.

    Returns:
        The shards.

    Raises:
        ConfigError: For a ``dataset`` that is neither.
        DataError: For shards that are damaged or out of reach.
        MissingExtraError: For a package that is not installed.
    """
    if is_remote(dataset):
        url = dataset.rstrip("/")
        index = None if _WILD.search(url) or url.endswith(".tar") else _fetch_index(url)
        if index is None:
            return _TarShards(dataset, cache)
        return _MdsShards(url, index, lambda shards: _Fetched(url, shards, ShardCache(cache)))
    path = Path(local_path(dataset))
    if path.is_dir() and holds_mds(path) and (path / "index.json").is_file():
        return _MdsShards(
            str(path),
            (path / "index.json").read_bytes(),
            lambda shards: [LocalShard.find(shard, path) for shard in shards],
        )
    if path.is_dir() and not any(path.glob("*.tar")):
        parts = sorted(one.parent.name for one in path.glob("*/index.json"))
        there = f"; its folder {parts[0]} has one: name that" if parts else ""
        raise ConfigError(f"{path} holds neither an index.json (MDS) nor *.tar (WebDataset){there}.")
    if not path.exists() and not _WILD.search(dataset):
        raise ConfigError(f"{dataset} does not exist; name a folder of shards, or tars as 'train-{{000..099}}.tar'.")
    return _TarShards(dataset, cache)


def open_shards_of(store: ScoreStore, dataset: str | None, cache: Path | None) -> ShardReader | None:
    """`open_shards`, if ``dataset`` is given. Raises StoreError unless the scores of ``store`` are of its samples."""
    if dataset is None:
        return None
    shards = open_shards(dataset, cache)
    found = shards.ends[-1]
    if (shards.fingerprint, found) != (store.fingerprint, store.num_samples):
        raise StoreError(
            f"{dataset} holds {found:,} samples [{shards.fingerprint}], and {store.path} has scores of "
            f"{store.num_samples:,} [{store.fingerprint}]: those of other shards, or in another order. Name the shards "
            "that the run read, all of them, or make the report without --dataset."
        )
    return shards


@dataclass(frozen=True)
class Known:
    """By what a dataset is recognised."""

    num_samples: int
    fingerprint: str


def known_of(dataset: str, cache: Path | None = None) -> Known:
    """By what ``dataset`` is recognised: its shards, as for `open_shards`, whose errors it raises; or a store of it."""
    path = Path(dataset)
    if (path / "scores").is_dir() and (path / "zarr.json").is_file():
        store = ScoreStore.open(path, mode="r")
        return Known(store.num_samples, store.fingerprint)
    shards = open_shards(dataset, cache)
    return Known(shards.ends[-1], shards.fingerprint)


def _fetch_index(url: str) -> bytes | None:
    """The index.json of the folder ``url``; None where there is none, or none of MDS. Raises DataError."""

    def need(size: int) -> None:
        if size > LARGEST_INDEX:
            raise DataError(f"{url}/index.json has over {LARGEST_INDEX:,} bytes; {AGAIN}.")

    with tempfile.TemporaryDirectory(prefix="infobatch-index-") as folder:
        place = Path(folder, "index.json")
        try:
            download(f"{url}/index.json", place, need=need)
        except NotThereError:
            return None
        data = place.read_bytes()
    try:
        entries_of(data)
    except (ValueError, KeyError, TypeError, RecursionError):  # some web servers have a page for what is not there
        return None
    return data


class _Fetched:
    """The shards of the folder ``url``: each is downloaded to the cache when it is asked for."""

    def __init__(self, url: str, shards: Sequence[IndexedShard], cache: ShardCache) -> None:
        self._url, self._shards, self._cache = url, shards, cache

    def __getitem__(self, number: int) -> LocalShard:
        """Raises DataError for one that cannot be had."""
        shard = self._shards[number]
        file, compression = (shard.raw, None) if shard.zip is None else (shard.zip, shard.compression)
        place = self._cache.ensure_local(f"{self._url}/{file.name}", file.size)
        stat = Path(place).stat()
        return LocalShard(place, (stat.st_size, stat.st_mtime_ns), compression, shard.raw.size)


class _MdsShards:
    """MDS shards of one folder, without a StreamingDataset: it would make shared memory, and unpickle."""

    def __init__(self, folder: str, index: bytes, find: Callable[[Sequence[IndexedShard]], LocalShards]) -> None:
        """``index``: the index.json in ``folder``, a path or url. find: says where the shards are on this machine."""
        place = f"{folder}/index.json"
        shards = shards_of(index, place)
        if not any(shard.samples for shard in shards):
            raise DataError(f"{place} names no shards with samples; {AGAIN}.")
        if any(shard.encodings != shards[0].encodings for shard in shards):
            raise DataError(f"{place} has shards of different columns; name the shards of one kind.")
        files = ((shard.raw.name, shard.raw.size, shard.raw.hashes) for shard in shards)
        self.fingerprint = mds_fingerprint([shard.samples for shard in shards], [0] * len(shards), files)
        self.names = [shard.raw.name for shard in shards]
        self.classes = read_classes([folder])
        self._values = MdsValues(shards, find(shards))
        self.ends = self._values.ends

    def fields(self, index: int) -> list[Field]:
        """The columns. Raises DataError."""
        values = self._values[index]
        return [self._field(name, values[name], index) for name in values if name != MEMBERS]

    def _field(self, name: str, data: bytes, index: int) -> Field:
        encoding = self._values.encodings[name]
        try:
            return Field(name, encoding, _stored(from_mds(data, encoding)))
        except ValueError as error:
            raise DataError(f"{self._values.name(index)}: the column {name!r} is no {encoding!r}: {error}") from error

    def keys(self, index: NDArray[np.int64]) -> list[str] | None:
        """What is in the column of keys. Raises DataError."""
        if KEY not in self._values.encodings:
            return None
        return [text_of(self._field(KEY, self._values[number][KEY], number)) for number in index.tolist()]


class _TarShards:
    """Tars, without webdataset's decoders."""

    def __init__(self, urls: str, cache: Path | None = None) -> None:
        self._samples = IndexedWebDataset(urls, cache_dir=cache)
        source = open_source(self._samples)
        self.fingerprint = source.fingerprint
        self.names = [base_name(url) for url in self._samples.urls]
        self.ends = np.cumsum(self._samples.shard_sizes).tolist()
        folders = sorted(set(map(folder_of, self._samples.urls)))
        self.classes = read_classes(folders)
        self._columns = TarColumns(read_columns(folders) or {})

    def fields(self, index: int) -> list[Field]:
        """The key, and the members. Raises DataError."""
        return [
            Field(self._called(name), "str" if name == KEY else encoding_of(name), _stored(value))
            for name, value in self._samples[index].items()
            if name == KEY or not name.startswith("__")
        ]

    def _called(self, extension: str) -> str:
        """What a member is called: a label or a name as its column is, if columns.json says."""
        column = self._columns.owner(extension)
        return column if column is not None and column in (*LABELS, *NAMES) else extension

    def keys(self, index: NDArray[np.int64]) -> list[str] | None:
        """The names of the members without their extensions. Raises DataError."""
        starts = [0, *self.ends]
        indexes: dict[int, TarIndex] = {}
        keys = []
        for number in index.tolist():
            shard = bisect_right(self.ends, number)
            if shard not in indexes:
                indexes[shard] = self._samples._shards.tars[shard].index()
            keys.append(indexes[shard].key(number - starts[shard]).encode("utf-8", "replace").decode())
        return keys


def _stored(value: Any) -> Any:
    if isinstance(value, Encoded):
        return value.data
    return value.encode("utf-8", "replace") if isinstance(value, str) else value
