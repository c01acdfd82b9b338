"""Kinds of Arrow columns: what a value becomes in a sample, and how it is stored."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from infobatch_stream.errors import ConfigError

from ..extensions import IMAGE_EXTENSIONS, MAGIC_BYTES, encoding_of, image_extension, is_extension
from ..samples import Column, Encoded, EncodedImage
from .images import read_image

__all__ = ["Kind", "Picture", "Rows", "kind_of", "plain_type"]

Rows = Sequence[tuple[pa.Array, int]]
"""Some rows of a column that tell what the others may be like."""


class Kind(Protocol):
    """A kind of column. column: how it is stored, with the extension that it has if no other column wants it."""

    column: Column

    def value(self, array: pa.Array, row: int) -> Any:
        """The value in a row of ``array``, which is not null. Raises ValueError (why) or DataError."""

    def sizes(self, array: pa.Array) -> NDArray[np.int64]:
        """int64[n]: bytes of each value as it is stored, at most a few off."""


class Number:
    """Whole numbers, truth values and floats."""

    def __init__(self, kind: pa.DataType) -> None:
        if pa.types.is_floating(kind):
            self.column = Column(f"float{kind.bit_width}", "txt")
        else:
            self.column = Column("uint64" if kind == pa.uint64() else "int", "cls")
        self._type = float if pa.types.is_floating(kind) else int

    def value(self, array: pa.Array, row: int) -> Any:
        return self._type(array[row].as_py())

    def sizes(self, array: pa.Array) -> NDArray[np.int64]:
        return np.full(len(array), 24 if self._type is float else 20, np.int64)  # in a tar they are text


class Text:
    """Strings."""

    column = Column("str", "txt")

    def value(self, array: pa.Array, row: int) -> str:
        text: str = array[row].as_py()
        return text

    def sizes(self, array: pa.Array) -> NDArray[np.int64]:
        return _lengths(array)


class Blob:
    """Bytes of any kind."""

    column = Column("bytes", "bin")

    def value(self, array: pa.Array, row: int) -> Encoded:
        return Encoded(array[row].as_py())

    def sizes(self, array: pa.Array) -> NDArray[np.int64]:
        return _lengths(array)


class Picture:
    """Files, as a rule images: their bytes, or Hugging Face's {bytes, path}, where the path tells the extension.

    Without bytes the file at the path is read, which must lie below the folder of the table: a table from elsewhere
    might name any file of this machine.

    extension: that all are stored with; by default an image's own behind ``prefix``.
    """

    def __init__(self, folder: Path, rows: Rows) -> None:
        self._folder = folder
        self.prefix, self.extension = "", ""
        found = [_extension(*_parts(array, row)) for array, row in rows]
        kinds = {encoding_of(extension) for extension in found} if all(_is_image(one) for one in found) else set()
        self.column = Column("jpeg" if "jpeg" in kinds else "png" if kinds else "bytes", found[0] if found else "bin")
        self.images = bool(kinds)
        if not self.images:
            self.extension = self.column.wds

    def value(self, array: pa.Array, row: int) -> EncodedImage:
        """See `Kind`."""
        data, path = _parts(array, row)
        data = self._read(path) if data is None else data.to_pybytes()
        return EncodedImage(data, self.extension or self.prefix + _extension(pa.py_buffer(data), path))

    def sizes(self, array: pa.Array) -> NDArray[np.int64]:
        """See `Kind`."""
        if not pa.types.is_struct(array.type):
            return _lengths(array)
        data = array.field("bytes")
        sizes = _lengths(data)
        for row in np.flatnonzero(data.is_null().to_numpy(zero_copy_only=False)).tolist():
            try:
                sizes[row] = self._place(array.field("path")[row].as_py()).stat().st_size
            except (ValueError, OSError):  # raised again where it is read
                continue
        return sizes

    def _read(self, path: str | None) -> bytes:
        return read_image(self._place(path))

    def _place(self, path: str | None) -> Path:
        if not path or "\0" in path:
            raise ValueError("there are neither bytes nor a path")
        folder = self._folder.resolve()
        place = (folder / path).resolve()
        if not place.is_relative_to(folder):
            raise ValueError(
                f"the file {path!r} is not below {folder}, and others are not read: put it there, or its bytes "
                "into the table"
            )
        return place


class Numbers:
    """Lists of numbers, nested or not: arrays, all of ``shape`` if that is given."""

    def __init__(self, dtype: str, shape: tuple[int, ...] | None) -> None:
        self.column = Column(f"ndarray:{dtype}" + (f":{','.join(map(str, shape))}" if shape else ""), "npy")
        self._itemsize = np.dtype(dtype).itemsize

    def value(self, array: pa.Array, row: int) -> NDArray[Any]:
        values = array[row].values
        shape = [len(values)]
        while _is_list(values.type):
            lengths = set(_lengths(values).tolist())
            if len(lengths) != 1 or values.null_count:
                raise ValueError("its lists are not of one length")
            shape.append(lengths.pop())
            values = values.flatten()
        if values.null_count:
            raise ValueError("there is a null in it")
        found: NDArray[Any] = values.to_numpy(zero_copy_only=False).reshape(shape)
        return found

    def sizes(self, array: pa.Array) -> NDArray[np.int64]:
        found = shapes(array)
        each = np.ones(len(array), np.int64) if found is None else found.prod(axis=1)
        return each * self._itemsize + 128  # the header of an .npy


class Json:
    """All else: structs, lists of texts, dates, decimals, which become texts in it."""

    column = Column("json", "json")

    def value(self, array: pa.Array, row: int) -> Encoded:
        if pa.types.is_temporal(array.type):
            value = array.slice(row, 1).cast(pa.string())[0].as_py()
        else:
            value = array[row].as_py()
        return Encoded(json.dumps(value, ensure_ascii=False, default=str).encode())

    def sizes(self, array: pa.Array) -> NDArray[np.int64]:
        rows = (len(self.value(array, row).data) if array[row].is_valid else 0 for row in range(len(array)))
        return np.fromiter(rows, np.int64, len(array))


def kind_of(  # noqa: PLR0911  # one for each kind
    name: str, feature: object, arrays: Sequence[pa.Array], rows: Rows, folder: Path
) -> Kind:
    """The kind of the column ``name``, whose Hugging Face feature is ``feature`` (None if unknown).

    arrays: all of it, of which lengths are looked at, and no values. rows: some that are not null, which are.
    Raises ConfigError for a column that cannot be converted.
    """
    kind = arrays[0].type
    if pa.types.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"}:
        return Picture(folder, rows)
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_floating(kind):
        return Number(kind)
    if _is_text(kind):
        return Text()
    if _is_binary(kind):
        picture = Picture(folder, rows)
        named = isinstance(feature, dict) and feature.get("_type") == "Image"
        return picture if named or (rows and all(_start_of(array, row) for array, row in rows)) else Blob()
    if pa.types.is_null(kind):
        raise ConfigError(f"the column {name!r} is empty in all rows; choose the others (--column).")
    if any(map(_is_binary, _leaves(kind))):
        raise ConfigError(
            f"the column {name!r} holds bytes in {kind}, which has no form in a sample; choose the others (--column)."
        )
    leaf = _leaf(kind)
    if leaf is not kind and (pa.types.is_integer(leaf) or pa.types.is_floating(leaf)):
        found: set[tuple[int, ...]] = set()
        for array in arrays:
            here = shapes(array.drop_null())
            if here is None:
                return Json()
            found.update(map(tuple, np.unique(here, axis=0).tolist()) if len(found) < 2 else ())
        if found:
            return Numbers(str(np.dtype(leaf.to_pandas_dtype())), found.pop() if len(found) == 1 else None)
    return Json()


def shapes(array: pa.Array) -> NDArray[np.int64] | None:
    """int64[n, d]: shape of each value of an array of lists; None where lists are empty, or differ within a value."""
    lengths = _lengths(array)
    if lengths.size and not lengths.min():
        return None
    inner = array.flatten()
    if not _is_list(inner.type):
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


def plain_type(kind: pa.DataType) -> pa.DataType:
    """``kind`` as it is spooled: without dictionaries, views and extensions."""
    if isinstance(kind, pa.BaseExtensionType):
        return plain_type(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if kind == pa.string_view():
        return pa.string()
    return pa.binary() if kind == pa.binary_view() else kind


def _lengths(array: pa.Array) -> NDArray[np.int64]:
    """int64[n]: length of each value, 0 for null."""
    if pa.types.is_null(array.type):
        return np.zeros(len(array), np.int64)
    if pa.types.is_fixed_size_binary(array.type):
        return np.full(len(array), array.type.byte_width, np.int64)
    measure = pc.list_value_length if _is_list(array.type) else pc.binary_length
    found: NDArray[np.int64] = measure(array).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return found


def _parts(array: pa.Array, row: int) -> tuple[pa.Buffer | None, str | None]:
    """Bytes and path of a file."""
    scalar = array[row]
    if not pa.types.is_struct(array.type):
        return scalar.as_buffer(), None
    data = scalar["bytes"]
    return data.as_buffer() if data.is_valid else None, scalar["path"].as_py()


def _start_of(array: pa.Array, row: int) -> str | None:
    data, _ = _parts(array, row)
    return None if data is None else image_extension(data.slice(0, min(MAGIC_BYTES, data.size)).to_pybytes())


def _extension(data: pa.Buffer | None, path: str | None) -> str:
    """From the path, else from the first bytes of an image, else "bin"."""
    named = Path(path or "").suffix[1:].lower()
    if named in IMAGE_EXTENSIONS:
        return named
    magic = None if data is None else image_extension(data.slice(0, min(MAGIC_BYTES, data.size)).to_pybytes())
    return magic or (named if len(named) <= 16 and is_extension(named) else "bin")


def _is_image(extension: str) -> bool:
    return extension in IMAGE_EXTENSIONS


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _leaf(kind: pa.DataType) -> pa.DataType:
    while _is_list(kind):
        kind = kind.value_type
    return kind


def _leaves(kind: pa.DataType) -> Iterator[pa.DataType]:
    if not kind.num_fields:
        yield kind
    for number in range(kind.num_fields):
        yield from _leaves(kind.field(number).type)
