"""MDS encodings: the type of their values, and how values are read from a shard, a tar member or a table."""

import io
import json
import math
import re
import warnings
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.errors import ConfigError
from infobatch_stream.formats.schema import Encoded

__all__ = [
    "STREAMINGS_IMAGES", "ValueKind", "check_encoding", "fit", "fit_exactly", "fixed_size", "from_mds", "is_known",
    "npy_header", "parse_npy", "save_npy", "value_kind",
]  # fmt: skip

_INTEGERS = {"int": "int64"} | {
    f"{sign}int{bits}": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}
_FLOATS = ("float16", "float32", "float64")
_NUMBERS = tuple(dict.fromkeys((*_INTEGERS.values(), *_FLOATS)))  # of which an array may be
_DOCUMENTED = ("bytes", "str", "json", "jpeg", "png", "str_int", "str_float", "str_decimal")
STREAMINGS_IMAGES = ("pil", "jpeg_array", "jpegarray", "list[pil]", "list[jpeg]", "list[png]")
"""Encodings of images that only streaming itself decodes."""

_SCALARS = (*_DOCUMENTED, "pkl", *STREAMINGS_IMAGES, *_INTEGERS, *_FLOATS)
_ARRAY = re.compile(
    rf"ndarray(:(?P<dtype>{'|'.join(_NUMBERS)})(:(?P<shape>[1-9]\d{{0,9}}(,[1-9]\d{{0,9}}){{0,62}}))?)?"
)
_INT_BYTES = re.compile(rb"0|-?[1-9]\d{0,19}", re.ASCII)
# NDArray of streaming: the byte of an array's dtype, where the encoding leaves it open.
_CODES = {
    8: "uint8", 9: "int8", 16: "uint16", 17: "int16", 18: "float16", 32: "uint32", 33: "int32", 34: "float32",
    64: "uint64", 65: "int64", 66: "float64",
}  # fmt: skip


class ValueKind(Enum):
    """How a value is stored: as bytes that are the same in MDS and tars, as int, as float, or as array."""

    RAW, INT, FLOAT, ARRAY = range(4)


def value_kind(encoding: str) -> ValueKind:
    """The kind of the values of an MDS encoding; RAW for one that is unknown here."""
    if encoding in _INTEGERS:
        return ValueKind.INT
    if encoding in _FLOATS:
        return ValueKind.FLOAT
    return ValueKind.ARRAY if encoding.partition(":")[0] == "ndarray" else ValueKind.RAW


def is_known(encoding: str) -> bool:
    """Whether mosaicml-streaming has this encoding; of arrays, whether it is one of any kind."""
    return encoding in _SCALARS or encoding.partition(":")[0] == "ndarray"


def check_encoding(encoding: str) -> None:
    """Raise ConfigError for an encoding that MDS does not have."""
    if encoding not in _SCALARS and not _ARRAY.fullmatch(encoding):
        raise ConfigError(
            f"{encoding!r} is no MDS encoding; choose among {', '.join((*_DOCUMENTED, *_INTEGERS, *_FLOATS))}, "
            "ndarray, ndarray:<dtype> and ndarray:<dtype>:<shape> (e.g. ndarray:uint8:28,28)."
        )


def fixed_size(encoding: str) -> int | None:
    """Bytes of each value; None where they differ. Raises ConfigError for arrays that MDS does not have."""
    if encoding in _INTEGERS or encoding in _FLOATS:
        return np.dtype(_INTEGERS.get(encoding, encoding)).itemsize
    match = _ARRAY.fullmatch(encoding)
    if value_kind(encoding) is ValueKind.ARRAY:
        check_encoding(encoding)
    if match and match["shape"]:
        return math.prod(map(int, match["shape"].split(","))) * np.dtype(match["dtype"]).itemsize
    return None


def from_mds(data: bytes, encoding: str) -> Any:
    """The value that MDS stores as ``data``, RAW ones as Encoded. Raises ValueError for what MDS does not write."""
    kind = value_kind(encoding)
    if kind is ValueKind.RAW:
        return Encoded(data)
    if kind is ValueKind.ARRAY:
        return _array_from_mds(data, encoding)
    (value,) = np.frombuffer(data, _INTEGERS.get(encoding, encoding)).tolist()  # ValueError unless it is one
    return value


def _array_from_mds(data: bytes, encoding: str) -> NDArray[Any]:
    match = _ARRAY.fullmatch(encoding)
    if match is None:
        raise ValueError(f"{encoding!r} is no encoding of arrays")
    dtype, at = match["dtype"], 0
    if dtype is None:
        dtype, at = _CODES.get(data[0] if data else 0), 1
        if dtype is None:
            raise ValueError("an array of an unknown dtype")
    if match["shape"]:
        shape = tuple(map(int, match["shape"].split(",")))
    else:
        code = data[at] if at < len(data) else 0
        bounds = np.frombuffer(data, f"u{1 << code % 4}", code >> 2, at + 1)
        shape, at = tuple(bounds.tolist()), at + 1 + bounds.nbytes
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if not shape or not size or size != len(data) - at:
        raise ValueError(f"an array of {dtype} and shape {shape} in {len(data):,} bytes")
    return np.frombuffer(data, dtype, offset=at).reshape(shape)


def npy_header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, whether in Fortran order, dtype, and where the values begin in an .npy. Raises ValueError."""
    stream = io.BytesIO(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of headers that Python 2 wrote
            version = np.lib.format.read_magic(stream)  # type: ignore[no-untyped-call]
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(stream)  # type: ignore[no-untyped-call]
    except Exception as error:  # the parser of Python raises nearly anything
        raise ValueError(f"no array ({error})") from error
    return shape, fortran, dtype, stream.tell()


def parse_npy(data: bytes) -> NDArray[Any]:
    """The array in an .npy file, in C order and native byte order.

    Raises ValueError for a dtype or shape that MDS cannot store. Unlike numpy.load, it never allocates more than the
    file has.
    """
    shape, fortran, dtype, at = npy_header(data)
    if dtype.name not in _NUMBERS or not 1 <= len(shape) <= 63 or math.prod(shape) < 1:
        raise ValueError(f"an array of {dtype.name} and shape {shape}, which MDS does not have")
    if math.prod(shape) * dtype.itemsize != len(data) - at:
        raise ValueError(f"an array of {dtype.name} and shape {shape} in {len(data) - at:,} bytes")
    array = np.frombuffer(data, dtype, offset=at)
    array = array.reshape(shape[::-1]).T if fortran else array.reshape(shape)
    return np.ascontiguousarray(array, dtype.newbyteorder("="))


def save_npy(array: NDArray[Any]) -> bytes:
    """``array`` as numpy.save writes it."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def fit_exactly(data: bytes, encoding: str) -> Any:
    """Like `fit`, but raises ValueError where writing the value would not give the same bytes again."""
    if encoding == "json":
        try:
            json.loads(data.decode())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"no JSON ({error})") from error
    if encoding == "int" and not _INT_BYTES.fullmatch(data):
        raise ValueError(f"{data[:24]!r} is no whole number as Python writes it")
    value = fit(data, encoding)
    if isinstance(value, np.ndarray) and save_npy(value) != data:
        raise ValueError("an array that numpy.save would write in another way")
    return value


def fit(value: Any, encoding: str) -> Any:
    """``value`` converted to what ``encoding`` stores: numbers from text, text from numbers, arrays from .npy.

    Raises ValueError for a value that cannot be converted, or is out of range.
    """
    kind = value_kind(encoding)
    if kind is ValueKind.RAW:
        return _raw(value, encoding)
    data = value.data if isinstance(value, Encoded) else value
    if kind is ValueKind.ARRAY:
        array = parse_npy(data) if isinstance(data, bytes) else data
        match = _ARRAY.fullmatch(encoding)
        if not isinstance(array, np.ndarray) or match is None:
            raise ValueError(f"a {type(array).__name__} cannot be stored as {encoding!r}")
        if match["dtype"] not in (None, array.dtype.name):
            raise ValueError(f"an array of {array.dtype.name}, and not of {match['dtype']}")
        if match["shape"] and match["shape"] != ",".join(map(str, array.shape)):
            raise ValueError(f"an array of shape {array.shape}, and not of {match['shape']}")
        return array
    if isinstance(data, np.ndarray | dict | list):
        raise ValueError(f"a {type(data).__name__} is no number")  # noqa: TRY004  # callers name the sample
    text = data.decode().strip() if isinstance(data, bytes) else data
    if isinstance(text, str) and (len(text) > 1000 or "_" in text):  # Python's reading of 1_000 is nobody else's
        raise ValueError(f"{text[:24]!r} is no number")
    if kind is ValueKind.FLOAT:
        return float(text)
    if isinstance(text, float) and not text.is_integer():
        raise ValueError(f"{text} is no whole number")
    number, limits = int(text), np.iinfo(_INTEGERS[encoding])
    if not limits.min <= number <= limits.max:
        raise ValueError(f"{number} is out of the range of {encoding}, {limits.min} to {limits.max}")
    return number


def _raw(value: Any, encoding: str) -> Any:
    """``value`` converted for a RAW encoding: an Encoded, or str for "str"."""
    if isinstance(value, bytes):
        value = Encoded(value)
    if isinstance(value, Encoded):
        if encoding == "str":
            value.data.decode()  # UnicodeDecodeError is a ValueError
        return value
    if encoding == "json":
        return Encoded(json.dumps(value.tolist() if isinstance(value, np.ndarray) else value).encode())
    if encoding in ("str", "bytes", "str_int", "str_float", "str_decimal") and isinstance(value, str | int | float):
        return str(value) if encoding == "str" else Encoded(str(value).encode())
    raise ValueError(f"a {type(value).__name__} cannot be stored as {encoding!r}")
