"""Kinds of Arrow columns: what a value becomes in a sample, and how it is stored."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from infobatch_stream.convert.readers.image_columns import FileColumn, Rows, mostly_images
from infobatch_stream.convert.readers.nested import Nested
from infobatch_stream.convert.readers.plain_arrow import is_binary, is_list, is_text, leaf_of, leaves_of, lengths_of
from infobatch_stream.errors import ConfigError
from infobatch_stream.formats.mds_encodings import ValueKind, value_kind
from infobatch_stream.formats.schema import Column, Encoded

__all__ = ["Kind", "kind_of"]


class Kind(Protocol):
    """A kind of column. column: how it is stored, with the extension that it has if no other column wants it."""

    column: Column

    def value(self, array: pa.Array, row: int) -> Any:
        """The value in a row of ``array``, which is not null. Raises ValueError (why) or DataError."""

    def doubtful(self, array: pa.Array) -> NDArray[np.int64]:
        """int64[d]: rows that may have no value, as far as that is seen from lengths; nulls need not be among them."""
        return np.zeros(0, np.int64)

    def sizes(self, array: pa.Array) -> NDArray[np.int64]:
        """int64[n]: bytes of each value as it is stored, at most a few off."""
        return lengths_of(array)


class Number(Kind):
    """Whole numbers, truth values and floats. whole: whether they are the first of these."""

    def __init__(self, kind: pa.DataType) -> None:
        if pa.types.is_floating(kind):
            self.column = Column(f"float{kind.bit_width}", "txt")
        else:
            self.column = Column("uint64" if kind == pa.uint64() else "int", "cls")
        self._type = float if pa.types.is_floating(kind) else int
        self.whole = bool(pa.types.is_integer(kind))

    def value(self, array: pa.Array, row: int) -> Any:
        return self._type(array[row].as_py())

    def sizes(self, array: pa.Array) -> NDArray[np.int64]:
        return np.full(len(array), 24 if self._type is float else 20, np.int64)  # in a tar they are text


class Text(Kind):
    """Strings; ``is_json``: that are JSON."""

    def __init__(self, *, is_json: bool = False) -> None:
        self._is_json = is_json
        self.column = Column("json", "json") if is_json else Column("str", "txt")

    def value(self, array: pa.Array, row: int) -> str | Encoded:
        text: str = array[row].as_py()
        return Encoded(text.encode()) if self._is_json else text


class Blob(Kind):
    """Bytes of any kind."""

    column = Column("bytes", "bin")

    def value(self, array: pa.Array, row: int) -> Encoded:
        return Encoded(array[row].as_py())


class Numbers(Kind):
    """Lists of numbers, nested or not: arrays, all of ``shape`` if that is given."""

    def __init__(self, dtype: str, shape: tuple[int, ...] | None) -> None:
        self.column = Column(f"ndarray:{dtype}" + (f":{','.join(map(str, shape))}" if shape else ""), "npy")
        self._itemsize = np.dtype(dtype).itemsize

    def value(self, array: pa.Array, row: int) -> NDArray[Any]:
        values = array[row].values
        shape = [len(values)]
        while is_list(values.type):
            lengths = set(lengths_of(values).tolist())
            if len(lengths) != 1 or values.null_count:
                raise ValueError("its lists are not of one length")
            shape.append(lengths.pop())
            values = values.flatten()
        if values.null_count:
            raise ValueError("there is a null in it")
        if not len(values):
            raise ValueError("it is an empty list, which is no array that MDS has")
        found: NDArray[Any] = values.to_numpy(zero_copy_only=False).reshape(shape)
        return found

    def doubtful(self, array: pa.Array) -> NDArray[np.int64]:
        odd = (lengths_of(array) == 0) & array.is_valid().to_numpy(zero_copy_only=False)
        inner = array.flatten()
        while is_list(inner.type):
            inner = inner.flatten()
        if inner.null_count:
            odd |= np.array([value.is_valid and _has_null(value) for value in array], bool)
        return np.flatnonzero(odd)

    def sizes(self, array: pa.Array) -> NDArray[np.int64]:
        valid = array.is_valid().to_numpy(zero_copy_only=False)
        found = shapes(array.drop_null())
        each = np.ones(len(array), np.int64)
        if found is not None:
            each[valid] = found.prod(axis=1)
        return each * self._itemsize + 128  # the header of an .npy


def kind_of(
    name: str,
    feature: object,
    arrays: Sequence[pa.Array],
    rows: Rows,
    folder: Path,
    encoding: str | None,
    notes: list[str],
) -> Kind:
    """The kind of the column ``name``, whose Hugging Face feature is ``feature`` (None if unknown).

    arrays: all of it, of which lengths are looked at, and no values. rows: some that are not null, which are.
    encoding: what the user wants it stored as. notes: what a user should know is added to them.
    Raises ConfigError for a column that cannot be converted.
    """
    kind = arrays[0].type
    image = encoding in ("jpeg", "png") or (isinstance(feature, dict) and feature.get("_type") == "Image")
    if pa.types.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"}:
        return FileColumn(folder, rows if encoding != "bytes" else [], images=image and encoding != "bytes")
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_floating(kind):
        return Number(kind)
    if is_text(kind):
        return Text(is_json=encoding == "json")
    if is_binary(kind):
        is_picture = encoding in (None, "jpeg", "png") and (image or mostly_images(rows))
        return FileColumn(folder, rows, images=True) if is_picture else Blob()
    if pa.types.is_null(kind):
        raise ConfigError(f"the column {name!r} is empty in all rows; choose the others (--column).")
    if pa.types.is_union(kind) or any(map(is_binary, leaves_of(kind))):
        raise ConfigError(
            f"the column {name!r} is {kind}, which has no form in a sample; choose the others (--column)."
        )
    leaf = leaf_of(kind)
    wanted = encoding is None or value_kind(encoding) is ValueKind.ARRAY
    if wanted and leaf is not kind and (pa.types.is_integer(leaf) or pa.types.is_floating(leaf)):
        return _numbers(name, leaf, arrays, None if encoding else notes)
    return Nested(kind, as_text=encoding not in (None, "json"))


def _numbers(name: str, leaf: pa.DataType, arrays: Sequence[pa.Array], notes: list[str] | None) -> Kind:
    """Arrays of numbers of the type ``leaf``; JSON where MDS has no such arrays, unless the user wants them (None)."""
    dtype = str(np.dtype(leaf.to_pandas_dtype()))
    if notes is None:
        return Numbers(dtype, None)
    found: set[tuple[int, ...]] = set()
    row = 0
    for array in arrays:
        here = shapes(array.drop_null())
        if here is None:
            empty = np.flatnonzero((lengths_of(array) == 0) & array.is_valid().to_numpy(zero_copy_only=False))
            if len(empty):
                notes.append(
                    f"the column {name!r} is stored as JSON, since some of its lists are empty (row "
                    f"{row + int(empty[0]):,} of all), as no array in MDS can be; to have arrays, without these rows: "
                    f"--encoding {name}=ndarray --on-error skip"
                )
            return Nested(arrays[0].type)
        found.update(map(tuple, np.unique(here, axis=0).tolist()) if len(found) < 2 else ())
        row += len(array)
    if not found:
        return Nested(arrays[0].type)
    return Numbers(dtype, found.pop() if len(found) == 1 else None)


def shapes(array: pa.Array) -> NDArray[np.int64] | None:
    """int64[n, d]: shape of each value of an array of lists; None where lists are empty, or differ within a value."""
    lengths = lengths_of(array)
    if lengths.size and not lengths.min():
        return None
    inner = array.flatten()
    if not is_list(inner.type):
        return lengths[:, None]
    below = shapes(inner)
    if below is None or len(below) != lengths.sum():  # a null within
        return None
    if not lengths.size:
        return np.zeros((0, below.shape[1] + 1), np.int64)
    starts = np.cumsum(lengths) - lengths
    least = np.minimum.reduceat(below, starts)
    if (least != np.maximum.reduceat(below, starts)).any():
        return None
    found: NDArray[np.int64] = np.concatenate([lengths[:, None], least], axis=1)
    return found


def _has_null(value: pa.Scalar) -> bool:
    values = value.values
    while is_list(values.type) and not values.null_count:
        values = values.flatten()
    return bool(values.null_count)
