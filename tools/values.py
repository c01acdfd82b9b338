"""Whether the bytes of a field are what its encoding (MDS) or extension (tar) says. Nothing is unpickled."""

import json
import math
from collections.abc import Callable
from decimal import Decimal
from io import BytesIO
from typing import Any

import numpy as np

from infobatch_stream.errors import MissingExtraError

__all__ = ["Check", "fixed_size", "is_known", "mds_check", "tar_check"]

Check = Callable[[bytes], Any]
"""Raises an exception, of any type, for bytes that cannot be decoded."""

_SCALARS = {"int": 8} | {
    f"{kind}{bits}": bits // 8
    for kind in ("int", "uint", "float")
    for bits in (8, 16, 32, 64)
    if f"{kind}{bits}" != "float8"
}
_DTYPES = {name for name in _SCALARS if name != "int"}
_LISTS = ("pil", "jpeg_array", "jpegarray", "list[pil]", "list[jpeg]", "list[png]")
_IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "ppm", "pgm", "pbm", "pnm", "tif", "tiff")


def _text(data: bytes) -> str:
    return data.decode("utf-8")


def _json(data: bytes) -> Any:
    return json.loads(_text(data))


_TEXTS: dict[str, Check] = {
    "str": _text,
    "json": _json,
    "str_int": lambda data: int(_text(data)),
    "str_float": lambda data: float(_text(data)),
    "str_decimal": lambda data: Decimal(_text(data)),
}


def fixed_size(encoding: str) -> int | None:
    """Bytes of every value of an MDS encoding; None where they differ. Raises ValueError for a bad ndarray."""
    name, _, config = encoding.partition(":")
    if name != "ndarray":
        return _SCALARS.get(encoding)
    dtype, _, shape = config.partition(":")
    if dtype and dtype not in _DTYPES:
        raise ValueError(f"{dtype!r} is no dtype of an MDS array")
    lengths = [int(length) for length in shape.split(",")] if shape else []
    if any(length < 1 for length in lengths):
        raise ValueError(f"{shape!r} is no shape of an MDS array")
    return _SCALARS[dtype] * math.prod(lengths) if dtype and lengths else None


def is_known(encoding: str) -> bool:
    """Whether mosaicml-streaming itself has such an encoding."""
    names = {"bytes", "jpeg", "png", "pkl", *_SCALARS, *_TEXTS, *_LISTS}
    return encoding in names or encoding.partition(":")[0] == "ndarray"


def mds_check(encoding: str, decode: bool) -> Check | None:
    """The check of a value of an MDS encoding: texts always, images and arrays with ``decode``; None where none is.

    Raises MissingExtraError.
    """
    if encoding in _TEXTS:
        return _TEXTS[encoding]
    if not decode:
        return None
    if encoding in ("jpeg", "png"):
        return _image_check()
    if encoding in _LISTS or encoding.partition(":")[0] == "ndarray":
        return _streamings_check(encoding)
    return None


def tar_check(extension: str) -> Check | None:
    """The check of a tar member with this extension, of which the part behind the last dot counts; else None.

    Raises MissingExtraError.
    """
    last = extension.rpartition(".")[2]
    if last in _IMAGES:
        return _image_check()
    return _MEMBERS.get(last)


def _image_check() -> Check:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError.of("pillow", "tools") from error

    def check(data: bytes) -> None:
        with Image.open(BytesIO(data)) as image:
            image.load()

    return check


def _streamings_check(encoding: str) -> Check:
    """By streaming itself, whose import takes seconds."""
    try:
        from streaming.base.format.mds.encodings import mds_decode
    except ImportError as error:
        raise MissingExtraError.of("mosaicml-streaming", "mds") from error

    def check(data: bytes) -> None:
        values = mds_decode(encoding, data)
        for value in values if isinstance(values, list) else [values]:
            if hasattr(value, "load"):  # an image, of which only the header was read
                value.load()

    return check


def _npy(data: bytes) -> None:
    """An .npy, of which numpy.load would allocate what the header claims."""
    file = BytesIO(data)
    old = np.lib.format.read_magic(file) == (1, 0)  # type: ignore[no-untyped-call]
    read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)  # type: ignore[no-untyped-call]
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not unpickled")
    if math.prod(shape) * dtype.itemsize != len(data) - file.tell():
        raise ValueError(f"{len(data) - file.tell():,} bytes are no {dtype}{list(shape)}")


_MEMBERS: dict[str, Check] = {"json": _json, "txt": _text, "cls": int, "npy": _npy}
