"""The index.json of MDS shards, read as mosaicml-streaming reads it, but with all values checked.

It is ``{"version": 2, "shards": [{"raw_data": {"basename": ..., "bytes": ..., "hashes": {...}}, ...}, ...]}``.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from infobatch_stream.errors import DataError
from infobatch_stream.formats.fingerprint import fingerprint
from infobatch_stream.formats.mds_encodings import fixed_size, is_known

__all__ = [
    "LARGEST_INDEX", "IndexedFile", "IndexedShard", "MdsColumn", "check_shard", "entries_of", "mds_fingerprint",
    "shards_of",
]  # fmt: skip

LARGEST_INDEX: Final = 1 << 30  # bytes
_LARGEST: Final = 1 << 32  # bytes of a shard, whose offsets are uint32
_FILE_KEYS: Final = {"basename", "bytes", "hashes"}
_KEYS: Final = {
    *("column_encodings", "column_names", "column_sizes", "compression", "format", "hashes", "raw_data", "samples"),
    *("size_limit", "version", "zip_data"),
}

MdsColumn = tuple[str, str, int | None]
"""Name, encoding, and bytes of each value (None where they differ)."""

Hashes = Mapping[str, str]


def entries_of(data: bytes) -> list[Any]:
    """The entries of an index.json, one per shard. Raises ValueError, KeyError, TypeError or RecursionError."""
    index = json.loads(data)
    if index["version"] != 2:
        raise ValueError(f"its version is {index['version']!r}; only 2 is known")
    return list(index["shards"])


@dataclass(frozen=True)
class IndexedFile:
    """A file in index.json. name: its path in the folder. size: in bytes. hashes: name -> hex digits."""

    name: str
    size: int
    hashes: dict[str, str]

    @classmethod
    def of(cls, entry: dict[str, Any]) -> Self:
        """Parse an entry. Raises ValueError, KeyError, TypeError or AttributeError if it describes no file."""
        _check_keys(entry, _FILE_KEYS)
        name, size, hashes = entry["basename"], entry["bytes"], entry["hashes"]
        os.fsencode(name)  # ValueError, for what no file can be called
        if not isinstance(hashes, dict) or not all(isinstance(text, str) for text in (name, *hashes, *hashes.values())):
            raise TypeError(f"hashes {hashes!r}")
        return cls(name, size, hashes)


@dataclass(frozen=True)
class IndexedShard:
    """A shard in index.json. raw, zip: its plain and its compressed file."""

    raw: IndexedFile
    zip: IndexedFile | None
    compression: str
    samples: int
    columns: tuple[MdsColumn, ...]

    @classmethod
    def of(cls, entry: dict[str, Any], index: Path | str) -> Self:
        """Parse an entry of the file ``index``.

        Raises DataError, ValueError, KeyError, TypeError or AttributeError if it describes no shard.
        """
        _check_keys(entry, _KEYS)
        if entry["version"] != 2 or entry["format"] != "mds":
            raise ValueError(f"format {entry['format']!r}, version {entry['version']!r}; mds, 2 can be read")
        raw = IndexedFile.of(entry["raw_data"])
        packed = IndexedFile.of(entry["zip_data"]) if entry["zip_data"] else None
        files = ((file.name, file.size, file.hashes) for file in (raw, packed) if file is not None)
        check_shard(files, entry["samples"], index)
        if raw.size >= _LARGEST:
            raise ValueError(f"{raw.size:,} bytes; offsets in a shard end at {_LARGEST:,}")
        if not isinstance(entry["compression"], str | None):
            raise TypeError(f"compression {entry['compression']!r}")
        if not isinstance(entry["size_limit"], str | None) and not entry["size_limit"] >= 0:
            raise ValueError(f"size_limit {entry['size_limit']!r}")
        if packed is not None and not entry["compression"]:
            raise ValueError(f"{packed.name} is compressed, and no compression is named")
        return cls(raw, packed, entry["compression"] or "", entry["samples"], _columns(entry))

    @property
    def encodings(self) -> dict[str, str]:
        """Column name -> encoding, in the order of the columns."""
        return {name: encoding for name, encoding, _ in self.columns}

    @property
    def sizes(self) -> list[int | None]:
        """Bytes of the values of each column; None where they differ."""
        return [size for *_, size in self.columns]

    def files(self) -> list[IndexedFile]:
        """The files that may be in the folder."""
        return [file for file in (self.raw, self.zip) if file is not None]


def shards_of(data: bytes, index: Path | str) -> list[IndexedShard]:
    """All shards in the content ``data`` of the file ``index``. Raises DataError."""
    try:
        return [IndexedShard.of(entry, index) for entry in entries_of(data)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        told = f"{type(error).__name__}: {error}"
        raise DataError(f"{index} is no index of MDS shards ({told}); fetch or write it again.") from error


def _columns(entry: dict[str, Any]) -> tuple[MdsColumn, ...]:
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
    return columns


def _check_keys(entry: dict[str, Any], keys: set[str]) -> None:
    """Raise ValueError for an entry with other keys, as streaming does."""
    if entry.keys() != keys:
        raise ValueError(f"it has the keys {sorted(entry)}, not {sorted(keys)}")


def check_shard(files: Iterable[tuple[Any, Any, Any]], samples: Any, index: Path | str) -> None:
    """Raise DataError unless a shard's ``files`` lie in the folder of ``index`` and can hold so many ``samples``.

    files: (name, bytes, hashes) of each, as ``index`` names them. A sample needs 4 bytes at least, in the table of
    offsets, so the size of the files limits ``samples``.
    """
    room, first = 0, None
    for name, size, hashes in files:
        path = Path(name) if isinstance(name, str) and "\0" not in name else Path("..")
        if path.is_absolute() or ".." in path.parts or not path.name:
            raise DataError(
                f"{index} has a shard in the file {name!r}, which is not in its folder. Do not use this dataset, or "
                "fetch or write its index.json again."
            )
        if type(size) is not int or not 0 <= size < 2**63 or not isinstance(hashes, dict):
            raise DataError(f"{index} gives {name!r} {size!r} bytes; fetch or write it again.")
        room += size
        first = first or name
    if type(samples) is not int or not 0 <= 4 * samples <= room:
        raise DataError(
            f"{index} says that {first!r} holds {samples!r} samples in {room:,} bytes, which cannot be. Fetch or write "
            "it again."
        )


def mds_fingerprint(samples: Sequence[int], streams: Sequence[int], files: Iterable[tuple[str, int, Hashes]]) -> str:
    """The fingerprint of shards. samples, streams: one per shard. files: (name, bytes, hashes) of all their files."""
    entries = ((name, size, sorted(hashes.items())) for name, size, hashes in files)
    return fingerprint("mds", [*samples, *streams, *entries])
