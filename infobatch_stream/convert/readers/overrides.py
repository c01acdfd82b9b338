"""Values as the user wants them: in another encoding, or given where there is none."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from infobatch_stream.convert.readers.options import unknown
from infobatch_stream.errors import ConfigError
from infobatch_stream.formats.mds_encodings import ValueKind, fit, value_kind
from infobatch_stream.formats.schema import Column, Encoded

__all__ = ["exact_fit", "fill_of"]

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
