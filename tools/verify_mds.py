"""Checks of MDS shards against their index.json. Each file is read once, from its beginning to its end."""

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from infobatch_stream.errors import DataError
from infobatch_stream.sources.mds import check_shard

from .encodings import fixed_size, is_known
from .findings import Checked, Checks, Findings, Severity
from .mds_samples import MdsColumn, MdsSamples
from .readers.columns import read_columns
from .streams import Stream, blocks_of, decompressed, hasher

__all__ = ["MdsShard", "read_mds_index"]

_LARGEST_INDEX = 1 << 30  # bytes
_LARGEST = 1 << 32  # bytes of a shard, whose offsets are uint32
_FILE_KEYS = {"basename", "bytes", "hashes"}
_KEYS = {
    *("column_encodings", "column_names", "column_sizes", "compression", "format", "hashes", "raw_data", "samples"),
    *("size_limit", "version", "zip_data"),
}


def read_mds_index(folder: Path, findings: Findings, classes: int | None) -> "list[MdsShard]":
    """The shards that the index.json of ``folder`` names, of those that can be checked; of the others, findings."""
    place = folder / "index.json"
    try:
        if place.stat().st_size > _LARGEST_INDEX:
            raise ValueError(f"it has {place.stat().st_size:,} bytes")
        index = json.loads(place.read_bytes())
        if index["version"] != 2:
            raise ValueError(f"its version is {index['version']!r}; only 2 is known")
        entries = list(enumerate(index["shards"]))
    except OSError as error:
        findings.error(f"{place} cannot be read ({error.strerror}); without it there is no dataset")
        return []
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        findings.error(f"{place} is no index of MDS shards ({type(error).__name__}: {error}); fetch or write it again")
        return []
    shards: list[MdsShard] = []
    names: set[str] = set()
    for number, entry in entries:
        try:
            shard = MdsShard.of(folder, entry, classes)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            findings.error(f"{place}: shard {number} is not described as one ({type(error).__name__}: {error})")
        except DataError as error:
            findings.error(str(error))
        else:
            if shard.raw.name in names:
                findings.error(f"{place} names {shard.raw.name!r} twice")
            names |= {file.name for file in shard.files()}
            shards.append(shard)
    if not entries or (shards and not any(shard.samples for shard in shards)):
        findings.error(f"{place} names {'no shards' if not entries else 'shards without any sample'}")
    _compare_columns(place, shards, findings)
    return shards


def _compare_columns(place: Path, shards: "list[MdsShard]", findings: Findings) -> None:
    """The columns of the shards with each other, and with the columns.json beside them."""
    found = {shard.columns: shard for shard in reversed(shards)}
    if len(found) > 1:
        (first, one), (second, other) = list(found.items())[-1:-3:-1]
        differ = sorted({name for name, *_ in set(first) ^ set(second)})
        what = f"{one.raw.name} and {other.raw.name} have different columns ({', '.join(map(repr, differ))})"
        findings.add(Severity.WARNING, f"{what}: they are of two datasets, or written by two programs")
    try:
        told = read_columns([place.parent])
    except DataError as error:
        findings.error(str(error))
        return
    expected = None if told is None else {name: column.mds for name, column in told.items()}
    for columns, shard in found.items():
        encodings = {name: encoding for name, encoding, _ in columns}
        if expected is not None and expected != encodings:
            findings.error(
                f"columns.json says {_shown(expected)}, and {shard.raw.name} has {_shown(encodings)}: it is of other "
                "shards; remove it"
            )
            return


def _shown(columns: dict[str, str]) -> str:
    return ", ".join(f"{name!r}: {encoding}" for name, encoding in columns.items())[:200] or "nothing"


@dataclass(frozen=True)
class _File:
    """A file as index.json describes it: its path in the folder, its bytes, name and hex digits of hashes."""

    name: str
    size: int
    hashes: dict[str, str]

    @classmethod
    def of(cls, entry: dict[str, Any]) -> "_File":
        _check_keys(entry, _FILE_KEYS)
        name, size, hashes = entry["basename"], entry["bytes"], entry["hashes"]
        os.fsencode(name)  # ValueError, for what no file can be called
        if not isinstance(hashes, dict) or not all(isinstance(text, str) for text in (name, *hashes, *hashes.values())):
            raise TypeError(f"hashes {hashes!r}")
        return cls(name, size, hashes)


@dataclass(frozen=True)
class MdsShard:
    """A shard of an index.json: where it lies and is said to lie, and what is said of it."""

    folder: Path
    raw: _File
    zip: _File | None
    compression: str
    samples: int
    columns: tuple[MdsColumn, ...]
    classes: int | None

    @classmethod
    def of(cls, folder: Path, entry: dict[str, Any], classes: int | None) -> "MdsShard":
        """Raises DataError, ValueError, KeyError, TypeError or AttributeError for an entry of no shard."""
        _check_keys(entry, _KEYS)
        if entry["version"] != 2 or entry["format"] != "mds":
            raise ValueError(f"format {entry['format']!r}, version {entry['version']!r}; mds, 2 can be checked")
        raw = _File.of(entry["raw_data"])
        packed = _File.of(entry["zip_data"]) if entry["zip_data"] else None
        pair = [
            file and SimpleNamespace(basename=file.name, bytes=file.size, hashes=file.hashes) for file in (raw, packed)
        ]
        check_shard(SimpleNamespace(file_pairs=[pair], samples=entry["samples"]), folder / "index.json")
        if raw.size >= _LARGEST:
            raise ValueError(f"{raw.size:,} bytes; offsets in a shard end at {_LARGEST:,}")
        if not isinstance(entry["compression"], str | None):
            raise TypeError(f"compression {entry['compression']!r}")
        if not isinstance(entry["size_limit"], str | None) and not entry["size_limit"] >= 0:
            raise ValueError(f"size_limit {entry['size_limit']!r}")
        if packed is not None and not entry["compression"]:
            raise ValueError(f"{packed.name} is compressed, and no compression is named")
        parts = [entry[f"column_{part}"] for part in ("names", "encodings", "sizes")]
        columns = tuple(zip(*parts, strict=True))
        if len(set(entry["column_names"])) < len(columns):
            raise ValueError(f"two columns of one name among {entry['column_names']}")
        for name, encoding, size in columns:
            if not (isinstance(name, str) and isinstance(encoding, str)):
                raise TypeError(f"column {name!r} of encoding {encoding!r}")
            if is_known(encoding) and (size or None) != fixed_size(encoding):
                raise ValueError(f"column {name!r} has the encoding {encoding!r} and values of {size!r} bytes")
            if size is not None and (type(size) is not int or not 0 <= size < _LARGEST):
                raise ValueError(f"column {name!r} has values of {size!r} bytes")
        return cls(folder, raw, packed, entry["compression"] or "", entry["samples"], columns, classes)

    @property
    def name(self) -> str:
        """What to call it: the path of its file."""
        return str(self.folder / self.raw.name)

    def key(self, row: int) -> str | None:
        """Samples have none that tell them apart but their rows."""
        return None

    def files(self) -> list[_File]:
        """Those that may lie in the folder."""
        return [file for file in (self.raw, self.zip) if file is not None]

    def check(self, checks: Checks) -> Checked:
        """Everything that can be wrong with this shard."""
        findings = Findings(self.name)
        self._check_columns(checks, findings)
        reading = MdsSamples(self.columns, self.samples, self.raw.size, self.classes, checks, findings)
        there = {file.name: self._is_whole(file, findings) for file in self.files()}
        if all(whole is None for whole in there.values()):
            names = " and ".join(there)
            findings.error(f"{names} is missing: fetch or convert the shard again, or take it out of index.json")
        if self.zip is not None and there[self.zip.name]:
            self._read_packed(self.zip, None if there[self.raw.name] else reading, findings)
        if there[self.raw.name]:
            self._read(self.raw, reading, findings)
        present = (file for file in self.files() if there[file.name] is not None)
        return Checked(findings, self.samples, sum(file.size for file in present), *reading.contents())

    def _check_columns(self, checks: Checks, findings: Findings) -> None:
        names = [name for name, *_ in self.columns]
        for wanted in checks.columns:
            if wanted not in names:
                findings.error(f"it has no column {wanted!r}, but {', '.join(map(repr, names))}")
        for name, encoding, _ in self.columns:
            if not is_known(encoding):
                findings.add(
                    Severity.WARNING, f"column {name!r} has the encoding {encoding!r}, which is not streaming's"
                )
        for file in self.files():
            for name in file.hashes:
                if hasher(name) is None:
                    findings.add(Severity.WARNING, f"its hash {name!r} is not known, so it is not compared")

    def _is_whole(self, file: _File, findings: Findings) -> bool | None:
        """Whether the file has its size; None if it is not there."""
        try:
            found = (self.folder / file.name).stat()
        except OSError:
            return None
        if not stat.S_ISREG(found.st_mode):
            findings.error(f"{file.name} is no regular file")
        elif found.st_size != file.size:
            findings.error(
                f"{file.name} has {found.st_size:,} bytes, index.json says {file.size:,}: it was cut off, or is of "
                "another dataset"
            )
        else:
            return True
        return False

    def _read(self, file: _File, reading: MdsSamples, findings: Findings) -> None:
        try:
            with (self.folder / file.name).open("rb") as opened:
                stream = Stream(blocks_of(opened), file.hashes, file.size)
                reading.read(stream)
                _compare(file, stream, findings)
        except (DataError, OSError) as error:
            findings.error(f"{file.name} cannot be read to its end: {error}")

    def _read_packed(self, file: _File, reading: MdsSamples | None, findings: Findings) -> None:
        """Compare the compressed file; and the samples in it, unless they lie there decompressed too."""
        try:
            with (self.folder / file.name).open("rb") as opened:
                packed = Stream(blocks_of(opened), file.hashes, file.size)
                stream = Stream(
                    decompressed(self.compression, iter(packed), self.raw.size), self.raw.hashes, self.raw.size
                )
                try:
                    if reading is not None:
                        reading.read(stream)
                    _compare(self.raw, stream, findings, f"what {file.name} decompresses to")
                except DataError as error:
                    findings.error(f"{file.name} is damaged: {error}")
                _compare(file, packed, findings)
        except (DataError, OSError) as error:
            findings.error(f"{file.name} cannot be read to its end: {error}")


def _check_keys(entry: dict[str, Any], keys: set[str]) -> None:
    """Streaming refuses an entry with other keys."""
    if entry.keys() != keys:
        raise ValueError(f"it has the keys {sorted(entry)}, not {sorted(keys)}")


def _compare(file: _File, stream: Stream, findings: Findings, what: str = "") -> None:
    """Size and hashes of ``stream``, of which the rest is read, with those of ``file``."""
    hashes, what = stream.finish(), what or file.name
    if stream.size != file.size:
        findings.error(f"{what} has {stream.size:,} bytes, index.json says {file.size:,}")
    for name, found in hashes.items():
        if found != file.hashes[name].lower():
            findings.error(
                f"{what} has the {name} {found}, index.json says {file.hashes[name]}: it was changed; fetch or "
                "convert it again"
            )
