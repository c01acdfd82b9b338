"""Arrow's types in their plain form, without dictionaries, views and extensions, what they are, and Arrow's errors."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from infobatch_stream.errors import DataError

__all__ = ["is_binary", "is_list", "is_text", "leaf_of", "leaves_of", "lengths_of", "plain", "plain_type", "reading"]


def plain_type(kind: pa.DataType) -> pa.DataType:
    """``kind`` in its plain form; tensors are nested lists."""
    if isinstance(kind, pa.FixedShapeTensorType):
        nested = kind.value_type
        for size in reversed(kind.shape):
            nested = pa.list_(nested, size)
        return nested
    if isinstance(kind, pa.BaseExtensionType):
        return plain_type(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if kind == pa.string_view():
        return pa.string()
    return pa.binary() if kind == pa.binary_view() else kind


def plain(array: pa.Array) -> pa.Array:
    """``array`` in the plain form of its type, but for views."""
    if isinstance(array, pa.FixedShapeTensorArray):
        storage, shape = array.storage, array.type.shape
        size = storage.type.list_size
        values = storage.values.slice(storage.offset * size, len(storage) * size)
        for length in reversed(shape[1:]):
            values = pa.FixedSizeListArray.from_arrays(values, length)
        return pa.FixedSizeListArray.from_arrays(values, shape[0], mask=storage.is_null())
    if isinstance(array, pa.ExtensionArray):
        return plain(array.storage)
    return plain(array.dictionary_decode()) if isinstance(array, pa.DictionaryArray) else array


def lengths_of(array: pa.Array) -> NDArray[np.int64]:
    """int64[n]: length of each text, bytes or list, 0 for null."""
    if pa.types.is_null(array.type):
        return np.zeros(len(array), np.int64)
    if pa.types.is_fixed_size_binary(array.type):
        return np.full(len(array), array.type.byte_width, np.int64)
    measure = pc.list_value_length if is_list(array.type) else pc.binary_length
    found: NDArray[np.int64] = measure(array).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return found


def is_list(kind: pa.DataType) -> bool:
    """Whether values are lists, of any length or one."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def is_text(kind: pa.DataType) -> bool:
    """Whether values are texts."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def is_binary(kind: pa.DataType) -> bool:
    """Whether values are bytes."""
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def leaf_of(kind: pa.DataType) -> pa.DataType:
    """What is in lists of lists; ``kind`` itself where it is none."""
    while is_list(kind):
        kind = kind.value_type
    return kind


def leaves_of(kind: pa.DataType) -> Iterator[pa.DataType]:
    """The types of all that is nested in ``kind``; itself where nothing is."""
    kind = plain_type(kind)
    if not kind.num_fields:
        yield kind
    for number in range(kind.num_fields):
        yield from leaves_of(kind.field(number).type)


@contextmanager
def reading(path: Path, wrong: str = "cannot be read", remedy: str = "write it again") -> Iterator[None]:
    """Raises DataError for what pyarrow says of a file that is damaged; errors of the disk stay OSErrors."""
    try:
        yield
    except (pa.ArrowException, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(f"{path} {wrong}: {error}; {remedy}.") from error
