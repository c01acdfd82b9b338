"""Values in an encoding that they must fit exactly: what would become another value is refused."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from infobatch_stream.convert.readers.options import unknown
from infobatch_stream.errors import ConfigError, DataError
from infobatch_stream.formats.mds_encodings import ValueKind, fit, value_kind
from infobatch_stream.formats.schema import Column, Encoded, Sample

__all__ = ["exact_fit", "fill_of", "fitted"]

_TEXTS = ("str", "bytes", "json", "str_int", "str_float", "str_decimal")


def exact_fit(value: Any, encoding: str) -> Any:
    """As `fit`, but raises ValueError for numbers that become infinite, for what is no JSON, and for what is empty."""
    found = fit(value, encoding)
    if value_kind(encoding) is ValueKind.FLOAT:
        with np.errstate(over="ignore"):
            stored = float(np.dtype(encoding).type(found))
        named = isinstance(value, str) and "inf" in value.lower()
        if math.isinf(stored) and not (named or value in (math.inf, -math.inf)):
            raise ValueError(f"{value!r:.60} is out of the range of {encoding}")
    if encoding == "json" and isinstance(found, Encoded):
        json.loads(found.data)  # which raises a ValueError
    if isinstance(found, Encoded) and not found.data and encoding not in ("str", "bytes"):
        raise ValueError("it is empty")
    return found


def fill_of(name: str, text: str, columns: Mapping[str, Column], where: object) -> Any:
    """The value that ``text``, of the user, means for the column ``name``. Raises ConfigError."""
    if name not in columns:
        raise unknown(name, columns, where)
    encoding = columns[name].mds
    try:
        if value_kind(encoding) is not ValueKind.ARRAY:
            if encoding not in _TEXTS and value_kind(encoding) is ValueKind.RAW:
                raise ValueError("text is none")
            return exact_fit(text.encode() if encoding == "json" else text, encoding)
        dtype = re.match(r"ndarray:(\w+)", encoding)
        return fit(np.array(json.loads(text), dtype[1] if dtype else None), encoding)
    except ValueError as error:
        raise ConfigError(
            f"fill is {text!r} for the column {name!r}, which is stored as {encoding!r}: {error}. Leave the rows out "
            "that have no value (--on-error skip)."
        ) from error


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
