"""The samples that a report shows, read from local shards by index: where each lies, its label, a picture, a text."""

import json
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
from infobatch_stream.sources.tar_index import TarIndex
from infobatch_stream.sources.urls import base_name, is_remote, local_path

from .extensions import encoding_of
from .readers.columns import read_classes
from .readers.mds import MdsSet
from .samples import KEY, MEMBERS, Encoded
from .thumbnails import Field, Picture, picture_of, text_of

__all__ = ["Exhibit", "Shards", "check_same", "exhibits", "open_shards"]

_LABELS: Final = ("label", "labels", "cls", "class", "target", "category")  # fields, the first that is there
_KEYS: Final = (KEY, "key", "id", "name")
_LONGEST: Final = 60  # characters of a label or key
_WILD: Final = re.compile(r"[*?\[{]")


@dataclass(frozen=True)
class Exhibit:
    """One sample. label, key, text: "" without one; problem: why it, or a part of it, is not shown."""

    index: int
    shard: str
    row: int
    key: str = ""
    label: str = ""
    picture: Picture | None = None
    text: str = ""
    problem: str = ""


class Shards(Protocol):
    """Local shards. names, ends: of the shards, and where each ends in the order of the samples."""

    fingerprint: str
    classes: list[str] | None
    names: list[str]
    ends: list[int]

    def fields(self, index: int) -> list[Field]:
        """The fields of a sample, its key among them. Raises DataError."""

    def keys(self, index: NDArray[np.int64]) -> list[str] | None:
        """The keys of the samples ``index``, int64[k]; None where samples have none. Raises DataError."""


def open_shards(dataset: str) -> Shards:
    """The shards that ``dataset`` names: a folder of MDS shards (index.json), or tars: a folder, a pattern, braces.

    Raises ConfigError for what is neither, DataError for shards that are damaged, MissingExtraError.
    """
    if is_remote(dataset):
        raise ConfigError(f"{dataset} is not on this machine; a report is made of local shards: copy them here first.")
    path = Path(local_path(dataset))
    if (path / "index.json").is_file():
        return _MdsShards(path)
    if path.is_dir() and not any(path.glob("*.tar")):
        parts = sorted(one.parent.name for one in path.glob("*/index.json"))
        there = f"; its folder {parts[0]} has one: name that" if parts else ""
        raise ConfigError(f"{path} holds neither an index.json (MDS) nor *.tar (WebDataset){there}.")
    if not path.exists() and not _WILD.search(dataset):
        raise ConfigError(f"{dataset} does not exist; name a folder of shards, or tars as 'train-{{000..099}}.tar'.")
    return _TarShards(dataset)


def check_same(store: ScoreStore, shards: Shards, dataset: str) -> None:
    """Raise StoreError unless the scores of ``store`` are those of ``shards``."""
    found = shards.ends[-1]
    if (shards.fingerprint, found) != (store.fingerprint, store.num_samples):
        raise StoreError(
            f"{dataset} holds {found:,} samples [{shards.fingerprint}], and {store.path} has scores of "
            f"{store.num_samples:,} [{store.fingerprint}]: those of other shards, or in another order. Name the shards "
            "that the run read, all of them, or make the report without --dataset."
        )


def exhibits(shards: Shards, index: NDArray[np.int64]) -> dict[int, Exhibit]:
    """What is to be seen of the samples ``index``, int64[k], or why it is not. Raises MissingExtraError."""
    return {number: _exhibit(shards, number) for number in np.unique(index).tolist()}  # in the order of the shards


def _exhibit(shards: Shards, index: int) -> Exhibit:
    shard = bisect_right(shards.ends, index)
    row = index - (shards.ends[shard - 1] if shard else 0)
    empty = Exhibit(index, shards.names[shard], row)
    try:
        fields = shards.fields(index)
    except (DataError, OSError) as error:
        return replace(empty, problem=str(error))
    by_name = {field.name: field for field in reversed(fields)}
    label = next((by_name[name] for name in _LABELS if name in by_name), None)
    key = next((by_name[name] for name in _KEYS if name in by_name), None)
    others = [field for field in fields if field is not label and field is not key]
    picture, problems = _first_picture(others)
    return replace(
        empty,
        key="" if key is None else _shortened(text_of(key)),
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

    def __init__(self, folder: Path) -> None:
        self._samples = MdsSet(folder)  # which checks index.json too
        self.classes = self._samples.classes
        place = folder / "index.json"
        entries = json.loads(place.read_bytes())["shards"]
        sizes = [entry["samples"] for entry in entries]
        raw = [entry["raw_data"] for entry in entries]
        try:
            files = [(file["basename"], file["bytes"], file["hashes"].items()) for file in raw]
            self.fingerprint = mds_fingerprint(sizes, [0] * len(sizes), files)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{place} has no hashes as it should ({error!r}); fetch or write it again.") from error
        self.names = [name for name, *_ in files]
        self.ends = np.cumsum(sizes).tolist()

    def fields(self, index: int) -> list[Field]:
        """The columns. Raises DataError."""
        sample = self._samples[index]
        return [
            Field(name, "str" if name == KEY else self._samples.columns[name].mds, _stored(value))
            for name, value in sample.items()
            if name != MEMBERS
        ]

    def keys(self, index: NDArray[np.int64]) -> list[str] | None:
        """What is in the column of keys. Raises DataError."""
        if KEY not in self._samples.columns:
            return None
        return [text_of(Field(KEY, "str", _stored(self._samples[number][KEY]))) for number in index.tolist()]


class _TarShards:
    """Tars, without webdataset's decoders."""

    def __init__(self, urls: str) -> None:
        self._samples = IndexedWebDataset(urls)
        source = open_source(self._samples)
        self.fingerprint = source.fingerprint
        self.names = [base_name(url) for url in self._samples.urls]
        self.ends = np.cumsum(self._samples.shard_sizes).tolist()
        self.classes = read_classes(sorted({str(Path(local_path(url)).parent) for url in self._samples.urls}))

    def fields(self, index: int) -> list[Field]:
        """The key, and the members. Raises DataError."""
        return [
            Field(name, "str" if name == KEY else encoding_of(name), _stored(value))
            for name, value in self._samples[index].items()
            if name == KEY or not name.startswith("__")
        ]

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
