"""Columns that become JSON: structs, maps, lists of texts, dates, decimals."""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from infobatch_stream.convert.readers.plain_arrow import leaves_of, lengths_of
from infobatch_stream.formats.schema import Column, Encoded

__all__ = ["Nested"]


class Nested:
    """What has no form but JSON; dates, times, durations and decimals are texts in it, a null is JSON's.

    as_text: dates and decimals that are nested in nothing are the text itself, and not JSON.
    """

    column = Column("json", "json")

    def __init__(self, kind: pa.DataType, *, as_text: bool = False) -> None:
        self._as_text = as_text and not kind.num_fields
        # Python's own types do not hold all of these.
        self._alone = not kind.num_fields and not pa.types.is_interval(kind)
        self._exact = not any(pa.types.is_temporal(leaf) or pa.types.is_decimal(leaf) for leaf in leaves_of(kind))

    def value(self, array: pa.Array, row: int) -> Encoded | str:
        """See `Kind`."""
        value = array[row].as_py() if self._exact else _value(array[row])
        if self._as_text and isinstance(value, str):
            return value
        return Encoded(json.dumps(value, ensure_ascii=False).encode())

    def doubtful(self, array: pa.Array) -> NDArray[np.int64]:
        """See `Kind`."""
        if self._exact:
            return np.zeros(0, np.int64)
        if self._alone:
            return np.flatnonzero(pc.starts_with(_in_range(array).cast(pa.string()), "<"))
        return np.array([row for row in range(len(array)) if self._size(array, row) < 0], np.int64)

    def sizes(self, array: pa.Array) -> NDArray[np.int64]:
        """See `Kind`."""
        if self._alone and not self._exact:
            return lengths_of(array.cast(pa.string())) + 5  # quotes, and the unit of a duration
        rows = (max(self._size(array, row), 0) for row in range(len(array)))
        return np.fromiter(rows, np.int64, len(array))

    def _size(self, array: pa.Array, row: int) -> int:
        """Bytes of a value; -1 where it has no form."""
        try:
            value = self.value(array, row)
        except ValueError:
            return -1
        return len(value.encode() if isinstance(value, str) else value.data)


def _value(scalar: pa.Scalar) -> Any:  # noqa: PLR0911  # one for each kind of type
    """A value in the types of JSON. Raises ValueError for what they do not have."""
    kind = scalar.type
    if not scalar.is_valid:
        return None
    if isinstance(scalar, pa.ExtensionScalar | pa.DictionaryScalar):
        return _value(scalar.value)
    if pa.types.is_struct(kind):
        return {kind.field(number).name: _value(scalar[number]) for number in range(kind.num_fields)}
    if pa.types.is_map(kind):
        return [[_value(pair[0]), _value(pair[1])] for pair in scalar.values]
    if pa.types.is_nested(kind):
        return [_value(one) for one in scalar.values]
    if pa.types.is_duration(kind):
        return f"{scalar.value} {kind.unit}"
    if pa.types.is_decimal(kind):
        return str(scalar.as_py())
    if pa.types.is_temporal(kind) and not pa.types.is_interval(kind):
        if _in_range(scalar).cast(pa.string()).as_py().startswith("<"):
            raise ValueError(f"{scalar.value} is out of the range of a {kind}")
        return scalar.cast(pa.string()).as_py()
    return scalar.as_py()


def _in_range(times: pa.Scalar | pa.Array) -> pa.Scalar | pa.Array:
    """``times`` in a form whose text begins with "<" where one is out of range.

    With a zone Arrow writes another year, where without one it says that it cannot.
    """
    return times.cast(pa.timestamp(times.type.unit)) if pa.types.is_timestamp(times.type) else times
