"""The samples of MDS shards, read without a StreamingDataset, which would make shared memory and locks."""

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.errors import ConfigError, DataError, MissingExtraError
from infobatch_stream.sources.base import fingerprint
from infobatch_stream.sources.shard_file import MOST_OPEN, ShardFile

from ..encodings import Form, fit, fixed_size, form_of, from_mds
from ..extensions import extension_of, without_clashes
from ..samples import KEY, MEMBERS, Column, Encoded, EncodedImage, Sample
from .columns import Options, misfit, read_classes, read_columns

__all__ = ["MdsSet"]

_UNPACKED = 2  # compressed shards that a process keeps unpacked: they are read one after the other
_MOST_INDEX = 1 << 30  # bytes of an index.json
_NPY = 128  # bytes that an array takes more in a tar
_AGAIN = "fetch or write it again"


@dataclass(frozen=True)
class _Shard:
    """One shard: its file, whether and how that is compressed, and the bytes that it has unpacked."""

    path: str
    stamp: tuple[int, int]
    compression: str | None
    size: int
    samples: int


class MdsSet:
    """The samples of the MDS shards of one folder, in their order: raw values as they are, numbers and arrays.

    Nothing is unpickled, and no image decoded. Raises ConfigError and DataError.
    """

    name = ""
    skipped = 0
    notes: Sequence[str] = ()
    in_files = False
    is_shards = True

    def __init__(self, src: Path, options: Options | None = None) -> None:
        """``src``: the folder with the shards and their ``index.json``."""
        options = options or Options()
        self._src = src
        lost: list[str] = []
        entries = _read_index(src / "index.json", lost if options.skip else None)
        self.lost: Sequence[str] = lost
        self._encodings: dict[str, str] = entries[0][0]
        self._shards = [shard for _, shard in entries if shard.samples]
        if any(encodings != self._encodings for encodings, _ in entries):
            raise DataError(f"{src / 'index.json'} has shards of different columns; convert them one by one.")
        self._fixed = [fixed_size(encoding) for encoding in self._encodings.values()]
        self._ends = np.cumsum([shard.samples for shard in self._shards]).tolist()
        if not self._shards:
            raise DataError(f"{src} holds no samples by its index.json; {_AGAIN}.")
        self.classes = read_classes([src])
        found = self._found()
        if options.columns is not None:
            names = (KEY, MEMBERS) if options.keys else (MEMBERS,)
            kept = {name: name for name in names if name in found and found[name].mds == "str"}
            options = replace(options, columns=kept | dict(options.columns))
        choice = options.choose(found, src)
        if MEMBERS in choice.columns and choice.columns[MEMBERS].mds != "str":
            raise ConfigError(
                f"{src} has a column {MEMBERS!r} that is no text; that name is for the members of samples from tars. "
                f"Convert the other columns (--column), or this one under another name (--column NAME={MEMBERS})."
            )
        self.columns, self._sources = choice.columns, choice.sources
        self._owners = {
            extension: name
            for name, source in self._sources.items()
            if name not in (KEY, MEMBERS)
            for extension in found[source].wds.split(";")
        }
        fields = (column for name, column in found.items() if name not in (KEY, MEMBERS))
        self._others = {extension for column in fields for extension in column.wds.split(";")}
        self.fingerprint = fingerprint(
            "mds", [(Path(shard.path).name, shard.size, shard.samples) for shard in self._shards]
        )
        self._open_caches()

    def __len__(self) -> int:
        """Number of samples."""
        return int(self._ends[-1])

    def __getitem__(self, position: int) -> Sample:
        """The sample; raises DataError for a shard that is damaged, missing or changed."""
        number = bisect_right(self._ends, position)
        row = position - (self._ends[number - 1] if number else 0)
        where = f"{self._shards[number].path}: sample {row}"
        raw = self._raw(number, row, where)
        sample: dict[str, Any] = {}
        for name, source in self._sources.items():
            mds, encoding = self.columns[name].mds, self._encodings[source]
            try:
                value = from_mds(raw[source], encoding)
                sample[name] = value if mds == encoding else fit(value, mds)
            except ValueError as error:
                raise misfit(where, name, mds, error) from error
        if KEY in sample and self.columns[KEY].mds == "str":
            sample[KEY] = _text(sample[KEY], where)
        if MEMBERS in sample:
            self._name_members(sample, where)
        else:
            for name, column in self.columns.items():
                if ";" in column.wds:  # nothing says which it had
                    sample[name] = EncodedImage(sample[name].data, column.wds.partition(";")[0])
        return sample

    def sizes(self) -> NDArray[np.int64]:
        """int64[len]: of the values; from the offsets in the shards."""
        variable = 4 * sum(not size for size in self._fixed)
        variable -= sum(_NPY for encoding in self._encodings.values() if form_of(encoding) is Form.ARRAY)
        sizes = []
        for number, shard in enumerate(self._shards):
            bounds = np.frombuffer(self._bytes(number, 4, 4 * (shard.samples + 1)), np.uint32).astype(np.int64)
            sizes.append(np.clip(np.diff(bounds) - variable, 0, shard.size))
        return np.concatenate(sizes)

    def __getstate__(self) -> dict[str, Any]:
        """State without open files: each process has its own."""
        return {name: value for name, value in vars(self).items() if name not in ("_file", "_unpacked")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The state, with nothing open yet."""
        vars(self).update(state)
        self._open_caches()

    def _open_caches(self) -> None:
        self._file = lru_cache(MOST_OPEN)(ShardFile)
        self._unpacked = lru_cache(_UNPACKED)(_unpack)

    def _found(self) -> dict[str, Column]:
        """The columns there are: as ``columns.json`` says, or with extensions that fit the encodings."""
        told = read_columns([self._src])
        if told is None:
            names = [name for name in self._encodings if name not in (KEY, MEMBERS)]
            extensions = without_clashes({name: extension_of(self._encodings[name]) for name in names})
            told = {name: Column(encoding, extensions.get(name, "txt")) for name, encoding in self._encodings.items()}
        elif {name: column.mds for name, column in told.items()} != self._encodings:
            raise DataError(
                f"{self._src / 'columns.json'} has other columns or encodings than the index.json beside it; it is of "
                "other shards: remove it."
            )
        return told

    def _bytes(self, number: int, begin: int, length: int) -> bytes:
        """Bytes of the shard ``number``, whether that is compressed or not."""
        shard = self._shards[number]
        if shard.compression is None:
            return self._file(shard.path, shard.stamp).read(begin, length)
        return self._unpacked(shard)[begin : begin + length]

    def _raw(self, number: int, row: int, where: str) -> dict[str, bytes]:
        """The bytes of each value of a sample."""
        begin, end = np.frombuffer(self._bytes(number, 4 + 4 * row, 8), np.uint32).tolist()
        size = self._shards[number].size
        if not begin <= end <= size:
            raise DataError(f"{where} has the bytes {begin:,} to {end:,} of {size:,}; the shard is damaged: {_AGAIN}.")
        data = self._bytes(number, begin, end - begin)
        at = 4 * sum(not size for size in self._fixed)  # the sizes of values that have no fixed one come first
        found = iter(np.frombuffer(data[:at], np.uint32).tolist() if len(data) >= at else [])
        sizes = [size or next(found, 0) for size in self._fixed]
        if at + sum(sizes) != len(data):
            raise DataError(f"{where} has {len(data):,} bytes, and values of {sum(sizes):,}; it is damaged: {_AGAIN}.")
        values = {}
        for name, length in zip(self._encodings, sizes, strict=True):
            values[name] = data[at : at + length]
            at += length
        return values

    def _name_members(self, sample: dict[str, Any], where: str) -> None:
        """Give each value the extension that its member had, and check that MEMBERS names members that there are."""
        text = sample[MEMBERS]
        try:
            members = json.loads(text.data if isinstance(text, Encoded) else text)
        except (ValueError, RecursionError):
            members = None
        if not isinstance(members, list) or not all(isinstance(member, str) for member in members):
            raise DataError(f"{where} has no JSON list of extensions in {MEMBERS}: {text!r:.100}; {_AGAIN}.")
        kept: dict[str, str] = {}
        for member in members:
            name = self._owners.get(member)
            if name is None and member in self._others:  # of a column that was not chosen
                continue
            if name is None or name in kept:
                raise DataError(f"{where} has the member {member!r:.100} in {MEMBERS}, and no column for it; {_AGAIN}.")
            wds = self.columns[name].wds
            kept[name] = member if member in wds.split(";") else wds  # the latter was given by the user, for all
            if kept[name] != wds:
                sample[name] = EncodedImage(sample[name].data, kept[name])
        sample[MEMBERS] = json.dumps(list(kept.values()))


def _text(key: str | Encoded, where: str) -> str:
    """A key as text. Raises DataError."""
    try:
        return key if isinstance(key, str) else key.data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{where} has a key that is no UTF-8 ({error}); {_AGAIN}.") from error


def _unpack(shard: _Shard) -> bytes:
    try:
        from streaming.base.compression import decompress
    except ImportError as error:
        raise MissingExtraError.of("mosaicml-streaming", "mds") from error
    packed = ShardFile(shard.path, shard.stamp).read(0, shard.stamp[0])
    try:
        data: bytes = decompress(shard.compression, packed)
    except Exception as error:  # each library has errors of its own
        raise DataError(f"Shard {shard.path} cannot be decompressed ({error}); {_AGAIN}.") from error
    if len(data) != shard.size:
        raise DataError(f"Shard {shard.path} has {len(data):,} bytes unpacked, and not {shard.size:,}; {_AGAIN}.")
    return data


def _read_index(path: Path, lost: list[str] | None) -> list[tuple[dict[str, str], _Shard]]:
    """The encodings of the columns, by name, and the file of each shard in an ``index.json``. Raises DataError.

    lost: gets the reasons for those whose file is missing or cut short, which are left out; None: they are errors.
    """
    if path.stat().st_size > _MOST_INDEX:
        raise DataError(f"{path} has {path.stat().st_size:,} bytes; it is damaged: {_AGAIN}.")
    try:
        index = json.loads(path.read_bytes())
        entries = list(_entries(index, path, lost))
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no index of MDS shards ({type(error).__name__}: {error}); {_AGAIN}.") from error
    if not entries:
        raise DataError(lost[0] if lost else f"{path} names no shards; {_AGAIN}.")
    return entries


def _entries(index: Any, path: Path, lost: list[str] | None) -> Iterator[tuple[dict[str, str], _Shard]]:
    for entry in index["shards"]:
        if entry["version"] != 2 or entry["format"] != "mds":
            raise ValueError(f"version {entry['version']!r} of {entry['format']!r}; version 2 of 'mds' can be read")
        names, encodings = entry["column_names"], entry["column_encodings"]
        if not names or not all(isinstance(text, str) and text for text in (*names, *encodings)):
            raise ValueError(f"the columns {names!r:.200}")
        columns = dict(zip(names, encodings, strict=True))
        fixed = [fixed_size(encoding) for encoding in encodings]
        if len(columns) < len(names) or [size or None for size in entry["column_sizes"]] != fixed:
            raise ValueError(f"the columns {columns!r:.200} of {entry['column_sizes']!r:.200} bytes")
        try:
            shard = _shard(entry, path.parent)
        except DataError as error:
            if lost is None:
                raise
            lost.append(str(error))
        else:
            yield columns, shard


def _shard(entry: dict[str, Any], folder: Path) -> _Shard:
    """The file of a shard: the plain one if it is there, else the compressed one."""
    size, samples = entry["raw_data"]["bytes"], entry["samples"]
    if type(size) is not int or not 0 <= size < 2**32 or type(samples) is not int or not 0 <= 4 * samples <= size:
        raise ValueError(f"a shard of {samples!r} samples in {size!r} bytes")
    found = None
    for kind, compression in (("raw_data", None), ("zip_data", entry["compression"])):
        if entry[kind] is None:
            continue
        name, expected = entry[kind]["basename"], entry[kind]["bytes"]
        if not isinstance(name, str) or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"a shard in the file {name!r}, which is not in its folder")
        found = folder / name
        if not found.is_file():
            continue
        stat = found.stat()
        if stat.st_size != expected:
            raise DataError(
                f"Shard {found} has {stat.st_size:,} bytes, its index.json says {expected!r}: it is truncated or of "
                "another dataset. Fetch it again, or convert the data anew."
            )
        return _Shard(str(found), (stat.st_size, stat.st_mtime_ns), compression, size, samples)
    raise DataError(f"Shard {found} is missing; fetch it, or convert the data anew.")
