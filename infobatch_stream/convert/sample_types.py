"""The samples of a program: a field that is not of its column's kind is refused before it becomes something else."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from infobatch_stream.errors import DataError
from infobatch_stream.formats.mds_encodings import ValueKind, fit, value_kind
from infobatch_stream.formats.schema import Column, Encoded, Sample

__all__ = ["fitted"]


def fitted(sample: Sample, columns: Mapping[str, Column], place: str) -> Sample:
    """``sample``, found at ``place``, as both formats store it alike. Raises DataError for what does not fit."""
    return {name: _fitted(name, value, columns, place) for name, value in sample.items()}


def _fitted(name: str, value: Any, columns: Mapping[str, Column], place: str) -> Any:
    if name not in columns or isinstance(value, Encoded):
        return value
    encoding = columns[name].mds
    try:
        return _exact(value, encoding)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"{place} does not fit the columns: {name!r} is {value!r:.60} ({type(value).__name__}), its column is "
            f"{encoding!r}: {error}. Give all samples values of one type, or say how they are stored "
            f"(columns={{{name!r}: Column(...), ...}})."
        ) from error


def _exact(value: Any, encoding: str) -> Any:
    kind = value_kind(encoding)
    if kind is ValueKind.RAW:
        if encoding == "json":
            return Encoded(json.dumps(value.tolist() if isinstance(value, np.ndarray) else value).encode())
        kinds = {"str": str, "bytes": bytes}.get(encoding, object)
        if not isinstance(value, kinds):
            raise TypeError("it would become another value")
        return value
    if kind is ValueKind.ARRAY:
        return fit(value, encoding)
    if not isinstance(value, int | np.integer | np.bool_ | float | np.floating):
        raise TypeError("it is no number")
    number = fit(value.item() if isinstance(value, np.generic) else value, encoding)
    if kind is ValueKind.INT and isinstance(value, float | np.floating):
        raise TypeError("a float would become a whole number")
    whole = isinstance(value, int | np.integer)
    with np.errstate(over="ignore"):
        stored = np.dtype(encoding).type(number) if kind is ValueKind.FLOAT else number
    if (whole and int(number) != int(value)) or (np.isinf(stored) and not np.isinf(value)):
        raise ValueError("it would become another number")
    return value
