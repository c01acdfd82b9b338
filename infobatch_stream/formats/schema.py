"""What readers of a conversion pass to writers: samples, columns, and sets of samples read by position."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.errors import ConfigError

__all__ = [
    "KEY",
    "MEMBERS",
    "Column",
    "Encoded",
    "EncodedImage",
    "FileSet",
    "KeepsColumns",
    "Sample",
    "SampleSet",
    "column_of",
]

KEY = "__key__"
"""Field with the key of a sample (str): the name of its members in a tar. Without it a tar gets numbers."""

MEMBERS = "__members__"
"""Field with the extensions of a sample's members in a tar, in their order, as a JSON list (str).

It exists where samples have different members; fields that a sample lacks are then empty.
"""

Sample = Mapping[str, Any]
"""One sample: field -> Encoded, EncodedImage, array of numbers, int, float, str, bytes, or dict and list (JSON)."""


@dataclass(frozen=True)
class Encoded:
    """The bytes of a field, the same in both formats (text, JSON, an image, ...); they are copied unchanged."""

    data: bytes


@dataclass(frozen=True)
class EncodedImage(Encoded):
    """The bytes of an image file, which are stored unchanged, and its extension (lower-case, no dot)."""

    extension: str


@dataclass(frozen=True)
class Column:
    """How one field of a sample is stored: ``mds`` is an MDS encoding, ``wds`` the extension of a tar member.

    An EncodedImage keeps its own extension, so that one tar may hold jpg and png.
    """

    mds: str
    wds: str


_COLUMNS: list[tuple[tuple[type, ...], Column]] = [
    ((int, np.integer), Column("int", "cls")),
    ((float, np.floating), Column("float64", "txt")),
    ((str,), Column("str", "txt")),
    ((bytes, Encoded), Column("bytes", "bin")),
    ((dict, list), Column("json", "json")),
]


class SampleSet(Protocol):
    """Samples that are written into one folder, read by position. It can be pickled, and is read by several processes.

    name: subfolder of the destination, "" for the destination itself.
    classes: names of the classes, label i is ``classes[i]``; None where there are none.
    columns: how each field of a sample is stored.
    skipped: number of files that are no samples.
    notes: texts for the user about the source.
    lost: for each shard that could not be read and is skipped, the reason.
    in_files: whether each sample is a file of its own, so that several are read at once to keep the disk busy.
    is_shards: whether the source consists of shards, whose order is kept unless a shuffle is asked for.
    fingerprint: changes when a position would mean another sample: of names and sizes; of tables, of contents.
    """

    name: str = ""
    classes: list[str] | None
    columns: dict[str, Column]
    skipped: int = 0
    in_files: bool = False
    is_shards: bool = False
    fingerprint: str
    notes: Sequence[str] = ()
    lost: Sequence[str] = ()

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, position: int) -> Sample:
        """The sample at ``position`` (0..len-1); raises DataError or OSError, naming the file (and row)."""

    def sizes(self) -> NDArray[np.int64]:
        """int64[len]: bytes of all fields of each sample, correct to a few bytes."""


@runtime_checkable
class FileSet(SampleSet, Protocol):
    """A `SampleSet` in which each sample is a file, so the list of files and the classes define it."""

    def files(self) -> tuple[bytes, NDArray[np.int64]]:
        """The paths of the files relative to the source, separated by NUL, and their sizes in bytes, int64[len]."""


@runtime_checkable
class KeepsColumns(SampleSet, Protocol):
    """A `SampleSet` that finds its columns by its samples, but can also be given those of an earlier conversion."""

    def keep_columns(self, columns: dict[str, Column]) -> None:
        """Use these columns. Their names are the same as its own, except for KEY and MEMBERS."""


def column_of(name: str, value: object) -> Column:
    """The column for fields of the type of ``value``; an array's dtype and shape become part of the encoding.

    Raises ConfigError for a type that has no column of its own.
    """
    if isinstance(value, EncodedImage):
        return Column("png" if value.extension == "png" else "jpeg", value.extension)
    if isinstance(value, np.ndarray):
        if value.ndim and value.size and value.dtype.kind in "uif" and value.itemsize <= 8:
            return Column(f"ndarray:{value.dtype.name}:{','.join(map(str, value.shape))}", "npy")
    else:
        for types, column in _COLUMNS:
            if isinstance(value, types):
                return column
    raise ConfigError(
        f"the field {name!r} is a {type(value).__name__}; a sample may hold EncodedImage, numpy arrays of "
        "numbers (at least one dimension, not empty), int, float, str, bytes, and dict or list (as JSON)."
    )
