"""What lies between a reader and a writer of a conversion: samples, columns, and sets of samples read by position."""

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

It is there where the samples of a tar do not all have the same; fields that a sample lacks are then empty.
"""

Sample = Mapping[str, Any]
"""One sample: field -> Encoded, EncodedImage, array of numbers, int, float, str, bytes, or dict and list (JSON)."""


@dataclass(frozen=True)
class Encoded:
    """The bytes of a field as both formats store it (text, JSON, an image, ...); they are copied unchanged."""

    data: bytes


@dataclass(frozen=True)
class EncodedImage(Encoded):
    """The bytes of an image file, which are stored unchanged, and its extension (lower-case, no dot)."""

    extension: str


@dataclass(frozen=True)
class Column:
    """How one field of a sample is stored: ``mds`` is an MDS encoding, ``wds`` the extension of a tar member.

    The extension of an EncodedImage goes before ``wds``, so that one tar may hold jpg and png.
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
    skipped: files that were seen and are no samples.
    notes: what a user should know of the source, a text each.
    lost: shards that could not be read and are passed over, with the reasons.
    in_files: whether each sample is a file of its own, so that several are read at once to keep the disk busy.
    is_shards: whether the source are shards already, whose order is kept unless a shuffle is asked for.
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
        """int64[len]: bytes of each sample's fields together, at most a few off."""


@runtime_checkable
class FileSet(SampleSet, Protocol):
    """A `SampleSet` of which each sample is a file: the samples follow from these, their names, and the classes."""

    def files(self) -> tuple[bytes, NDArray[np.int64]]:
        """The paths of the files below the source, with a NUL between two; int64[len]: their sizes."""


@runtime_checkable
class KeepsColumns(SampleSet, Protocol):
    """A `SampleSet` whose columns follow from its samples, and may also be as they were when there were others."""

    def keep_columns(self, columns: dict[str, Column]) -> None:
        """Have these columns, which are called like its own, but for KEY and MEMBERS."""


def column_of(name: str, value: object) -> Column:
    """The column for a field like ``value``; an array's shape and dtype become part of the MDS encoding.

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
