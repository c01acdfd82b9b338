"""Checks that the bytes of a field fit its encoding (MDS) or extension (tar). Nothing is unpickled."""

import json
import math
from collections.abc import Callable
from decimal import Decimal
from io import BytesIO
from typing import Any

from infobatch_stream.errors import MissingExtraError
from infobatch_stream.formats.extensions import is_image, split_prefix
from infobatch_stream.formats.mds_encodings import STREAMINGS_IMAGES, npy_header

__all__ = ["Check", "mds_check", "tar_check"]

Check = Callable[[bytes], Any]
"""A function of the bytes, which raises an exception of any type if they cannot be decoded."""


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


def mds_check(encoding: str, decode: bool) -> Check | None:
    """The check of values of an MDS encoding; None if there is none. Images and arrays are checked with ``decode``.

    Raises MissingExtraError.
    """
    if encoding in _TEXTS:
        return _TEXTS[encoding]
    if not decode:
        return None
    if encoding in ("jpeg", "png"):
        return _image_check()
    if encoding in STREAMINGS_IMAGES or encoding.partition(":")[0] == "ndarray":
        return _streamings_check(encoding)
    return None


def tar_check(extension: str) -> Check | None:
    """The check of tar members by the part of their extension after the last dot; None if there is none.

    Raises MissingExtraError.
    """
    if is_image(extension):
        return _image_check()
    return _MEMBERS.get(split_prefix(extension)[1])


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
    """A check by streaming, which is imported only here, since that takes seconds."""
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
    """Check an .npy without numpy.load, which allocates what the header claims."""
    shape, _, dtype, at = npy_header(data)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not unpickled")
    if math.prod(shape) * dtype.itemsize != len(data) - at:
        raise ValueError(f"{len(data) - at:,} bytes are no {dtype}{list(shape)}")


_MEMBERS: dict[str, Check] = {"json": _json, "txt": _text, "cls": int, "npy": _npy}
