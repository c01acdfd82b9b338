"""The samples that a report shows, read from shards by index: where each lies, its label, a picture, a text."""

import json
import operator
import re
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from infobatch_stream import IndexedWebDataset, ScoreStore
from infobatch_stream.errors import ConfigError, DataError, StoreError
from infobatch_stream.sources import open_source
from infobatch_stream.sources.mds import mds_fingerprint
from infobatch_stream.sources.shard_cache import ShardCache
from infobatch_stream.sources.tar_index import TarIndex
from infobatch_stream.sources.urls import base_name, is_remote, local_path

from .extensions import encoding_of
from .manifest import holds_mds
from .readers.columns import read_classes, read_columns
from .readers.mds import MdsSet
from .remote_mds import RemoteMds, fetch_index
from .roles import LABELS, NAMES
from .samples import KEY, MEMBERS, Encoded
from .tar_columns import TarColumns
from .thumbnails import Field, Picture, picture_of, text_of

__all__ = ["Exhibit", "Shards", "check_same", "exhibits", "open_shards"]

_LONGEST: Final = 60  # characters of a label or key
_LONGEST_NAME: Final = 4096
_WILD: Final = re.compile(r"[*?\[{]")


@dataclass(frozen=True)
class Exhibit:
    """One sample. label, key, name, text: "" without one; problem: why it, or a part of it, is not shown."""

    index: int
    shard: str
    row: int
    key: str = ""
    label: str = ""
    name: str = ""
    picture: Picture | None = None
    text: str = ""
    problem: str = ""


class Shards(Protocol):
    """Shards. names, ends: of the shards, and where each ends in the order of the samples."""

    fingerprint: str
    classes: list[str] | None
    names: list[str]
    ends: list[int]

    def fields(self, index: int) -> list[Field]:
        """The fields of a sample, its key among them. Raises DataError."""

    def keys(self, index: NDArray[np.int64]) -> list[str] | None:
        """The keys of the samples ``index``, int64[k]; None where samples have none. Raises DataError."""


def open_shards(dataset: str, cache: Path | None = None) -> Shards:
    """The shards that ``dataset`` names: a folder of MDS shards (index.json), or tars: a folder, a pattern, braces.

    Local ones, or urls, of which what is read is brought to the folder ``cache`` (by default that of
    IndexedWebDataset). Raises ConfigError for what is neither, DataError for shards that are damaged or out of reach,
    MissingExtraError.
    """
    if is_remote(dataset):
        url = dataset.rstrip("/")
        told = None if _WILD.search(url) or url.endswith(".tar") else fetch_index(url)
        if told is None:
            return _TarShards(dataset, cache)
        return _MdsShards(f"{url}/index.json", told, RemoteMds(url, told, ShardCache(cache)))
    path = Path(local_path(dataset))
    if path.is_dir() and holds_mds(path) and (path / "index.json").is_file():
        samples = MdsSet(path)  # which checks index.json too
        return _MdsShards(str(path / "index.json"), json.loads((path / "index.json").read_bytes()), samples)
    if path.is_dir() and not any(path.glob("*.tar")):
        parts = sorted(one.parent.name for one in path.glob("*/index.json"))
        there = f"; its folder {parts[0]} has one: name that" if parts else ""
        raise ConfigError(f"{path} holds neither an index.json (MDS) nor *.tar (WebDataset){there}.")
    if not path.exists() and not _WILD.search(dataset):
        raise ConfigError(f"{dataset} does not exist; name a folder of shards, or tars as 'train-{{000..099}}.tar'.")
    return _TarShards(dataset, cache)


def check_same(store: ScoreStore, shards: Shards, dataset: str) -> None:
    """Raise StoreError unless the scores of ``store`` are those of ``shards``."""
    found = shards.ends[-1]
    if (shards.fingerprint, found) != (store.fingerprint, store.num_samples):
        raise StoreError(
            f"{dataset} holds {found:,} samples [{shards.fingerprint}], and {store.path} has scores of "
            f"{store.num_samples:,} [{store.fingerprint}]: those of other shards, or in another order. Name the shards "
            "that the run read, all of them, or make the report without --dataset."
        )


def exhibits(shards: Shards, index: NDArray[np.int64], *, pictures: bool = True) -> dict[int, Exhibit]:
    """What is to be seen of the samples ``index``, int64[k], or why it is not. Raises MissingExtraError."""
    order = np.unique(index).tolist()  # that of the shards
    return {number: _exhibit(shards, number, pictures) for number in order}


def _exhibit(shards: Shards, index: int, pictures: bool) -> Exhibit:
    shard = bisect_right(shards.ends, index)
    row = index - (shards.ends[shard - 1] if shard else 0)
    empty = Exhibit(index, shards.names[shard], row)
    try:
        fields = shards.fields(index)
    except (DataError, OSError) as error:
        return replace(empty, problem=str(error))
    by_name = {field.name: field for field in reversed(fields)}
    label = next((by_name[name] for name in LABELS if name in by_name), None)
    key, name = (next((by_name[name] for name in names if name in by_name), None) for names in (NAMES, NAMES[::-1]))
    others = [field for field in fields if field is not label and field is not key]
    picture, problems = _first_picture(others) if pictures else (None, [])
    return replace(
        empty,
        key="" if key is None else _shortened(text_of(key)),
        name="" if name is None else _shortened(text_of(name), _LONGEST_NAME),
        label="" if label is None else _label(text_of(label), shards.classes),
        picture=picture,
        text=_text(others, shown=picture is not None or bool(problems)),
        problem=" ".join(problems),
    )


def _first_picture(fields: Iterable[Field]) -> tuple[Picture | None, list[str]]:
    """The first picture there is, and why those before it cannot be shown."""
    problems = []
    for field in fields:
        try:
            picture = picture_of(field)
        except ValueError as error:
            problems.append(f"{field.name} cannot be decoded: {error}.")
            continue
        if picture is not None:
            return picture, problems
    return None, problems


def _text(fields: list[Field], *, shown: bool) -> str:
    """The first field of text; if there is none, and nothing else is ``shown``, a word on each."""
    text = next((field for field in fields if field.encoding in ("str", "json")), None)
    if text is not None:
        return text_of(text)
    return "" if shown else _shortened("; ".join(f"{field.name}: {text_of(field)}" for field in fields), 4 * _LONGEST)


def _label(text: str, classes: list[str] | None) -> str:
    number = int(text) if re.fullmatch(r"\d{1,9}", text, re.ASCII) else -1
    return _shortened(classes[number] if classes and 0 <= number < len(classes) else text)


def _shortened(text: str, length: int = _LONGEST) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


class _MdsShards:
    """MDS shards of one folder, without a StreamingDataset: it would make shared memory, and unpickle."""

    def __init__(self, place: str, told: Any, samples: MdsSet | RemoteMds) -> None:
        """``told``: what the index.json at ``place`` holds."""
        self._samples = samples
        self.classes = samples.classes
        try:
            entries = told["shards"]
            sizes = [operator.index(entry["samples"]) for entry in entries]
            raw = [entry["raw_data"] for entry in entries]
            files = [(file["basename"], file["bytes"], file["hashes"].items()) for file in raw]
            self.fingerprint = mds_fingerprint(sizes, [0] * len(sizes), files)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{place} has no hashes as it should ({error!r}); fetch or write it again.") from error
        self.names = [name for name, *_ in files]
        self.ends = np.cumsum(sizes).tolist()
        if not self.ends or not self.ends[-1]:
            raise DataError(f"{place} names no shards with samples; fetch or write it again.")
        if isinstance(samples, RemoteMds):
            samples.use(self.ends)

    def fields(self, index: int) -> list[Field]:
        """The columns. Raises DataError."""
        sample = self._samples[index]
        return [
            Field(name, self._samples.columns[name].mds, _stored(value))
            for name, value in sample.items()
            if name != MEMBERS
        ]

    def keys(self, index: NDArray[np.int64]) -> list[str] | None:
        """What is in the column of keys. Raises DataError."""
        if KEY not in self._samples.columns:
            return None
        encoding = self._samples.columns[KEY].mds
        return [text_of(Field(KEY, encoding, _stored(self._samples[number][KEY]))) for number in index.tolist()]


class _TarShards:
    """Tars, without webdataset's decoders."""

    def __init__(self, urls: str, cache: Path | None = None) -> None:
        self._samples = IndexedWebDataset(urls, cache_dir=cache)
        source = open_source(self._samples)
        self.fingerprint = source.fingerprint
        self.names = [base_name(url) for url in self._samples.urls]
        self.ends = np.cumsum(self._samples.shard_sizes).tolist()
        folders = sorted(set(map(_folder, self._samples.urls)))
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


def _folder(url: str) -> str:
    return url.rpartition("/")[0] if is_remote(url) else str(Path(local_path(url)).parent)


def _stored(value: Any) -> Any:
    if isinstance(value, Encoded):
        return value.data
    return value.encode("utf-8", "replace") if isinstance(value, str) else value
