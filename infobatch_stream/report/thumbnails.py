"""What a page can show of a value in a shard: a small picture, or some text. Nothing is unpickled."""

import base64
import io
import json
import warnings
from codecs import getincrementaldecoder
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.errors import MissingExtraError
from infobatch_stream.formats.extensions import MAGIC_BYTES, image_extension
from infobatch_stream.formats.mds_encodings import parse_npy

try:
    from PIL import Image, ImageOps, UnidentifiedImageError
except ImportError as error:
    raise MissingExtraError.of("pillow", "tools") from error

__all__ = ["Field", "Thumbnail", "picture_of", "text_of"]

SIDE: Final = 96  # pixels of a picture's longer side, at most
_TINY: Final = 48  # pixels up to which each of them counts, so that none is changed
_CHARACTERS: Final = 240  # of a text
_JSON: Final = 1 << 20  # bytes of JSON, beyond which it is shown as it stands
_PIXELS: Final = 1 << 26  # of an image, beyond which it is not decoded
_KINDS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # that are safe to decode
_IMAGES: Final = ("jpeg", "png", "jpeg_array", "jpegarray")  # MDS encodings whose bytes are an image file
_CHANNELS: Final = (1, 3, 4)
_LEAST: Final = 4  # pixels of an array's sides, if it is an image


@dataclass(frozen=True, eq=False)
class Field:
    """A field of a sample: its name, MDS encoding, and value: the bytes as they are stored, a number, or an array."""

    name: str
    encoding: str
    value: bytes | int | float | NDArray[Any]

    @property
    def is_pickled(self) -> bool:
        """Whether reading it could run code."""
        last = self.name.rpartition(".")[2].lower()
        return self.encoding == "pkl" or (self.encoding == "bytes" and last in ("pkl", "pickle", "pyd", "pt", "pth"))


@dataclass(frozen=True)
class Thumbnail:
    """An image as a data URI, and its pixels."""

    uri: str
    width: int
    height: int


def picture_of(field: Field) -> Thumbnail | None:
    """A small picture of the value; None if it is not an image. Raises ValueError for one that cannot be decoded."""
    if field.is_pickled:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damage that Pillow can live with
            image = _open(field)
            return None if image is None else _encoded(image)
    except UnidentifiedImageError:
        raise ValueError("it is no image that can be decoded here") from None
    except (Exception, MemoryError) as error:  # decoders raise nearly anything
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _open(field: Field) -> Image.Image | None:
    value = field.value
    if isinstance(value, bytes) and field.encoding == "pil":
        return _of_pil(value)
    if isinstance(value, bytes) and field.encoding == "ndarray":
        value = parse_npy(value)
    if isinstance(value, np.ndarray):
        return _of_array(value)
    if not isinstance(value, bytes):
        return None
    if field.encoding not in _IMAGES and (field.encoding != "bytes" or not image_extension(value[:MAGIC_BYTES])):
        return None
    image = Image.open(io.BytesIO(value), formats=_KINDS)
    _check_size(image.width, image.height)
    image.draft(None, (2 * SIDE, 2 * SIDE))  # JPEG decodes at a lower scale, no smaller than this
    return ImageOps.exif_transpose(image)


def _check_size(width: int, height: int) -> None:
    if width * height > _PIXELS:
        raise ValueError(f"{width:,} x {height:,} pixels are more than a report decodes")


def _of_pil(data: bytes) -> Image.Image:
    """MDS's "pil": width, height and the length of the mode as uint32, the mode, the pixels."""
    width, height, length = np.frombuffer(data, "<u4", 3).tolist()
    _check_size(width, height)
    return Image.frombytes(data[12 : 12 + length].decode("ascii"), (width, height), data[12 + length :])


def _of_array(array: NDArray[Any]) -> Image.Image | None:
    """Of uint8: height x width, with 1, 3 or 4 channels behind or before them; else None."""
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        return None
    if array.ndim == 3:
        array = array if array.shape[2] in _CHANNELS else np.moveaxis(array, 0, 2)
        if array.shape[2] not in _CHANNELS:
            return None
        array = array[:, :, 0] if array.shape[2] == 1 else array
    if min(array.shape[:2]) < _LEAST:
        return None
    return Image.fromarray(np.ascontiguousarray(array))


def _encoded(image: Image.Image) -> Thumbnail:
    if image.mode[0] in "IF":  # more than 8 bits
        values = np.asarray(image, np.float64)
        low, high = float(values.min()), float(values.max())
        image = Image.fromarray(((values - low) * (255 / (high - low or 1))).astype(np.uint8))
    elif image.mode not in ("L", "RGB", "RGBA"):
        image = image.convert("RGBA" if image.mode in ("LA", "PA") or "transparency" in image.info else "RGB")
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=80, lossless=max(image.size) <= _TINY)
    return Thumbnail(f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}", *image.size)


def text_of(field: Field) -> str:
    """The beginning of the value as text on one line, or what can be said of it."""
    value = field.value
    if field.is_pickled:
        return "pickled, so it is not read"
    if isinstance(value, bytes) and field.encoding == "ndarray":
        try:
            value = parse_npy(value)
        except ValueError as error:
            return str(error)
    if isinstance(value, np.ndarray):
        return f"{value.dtype.name}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, int | float):
        return f"{value:.6g}" if isinstance(value, float) else f"{value}"
    return _text_of(value, field.encoding)


def _text_of(data: bytes, encoding: str) -> str:
    if encoding == "json" and len(data) <= _JSON:
        data = _plain_json(data)
    try:
        text = getincrementaldecoder("utf-8")().decode(data[: 4 * _CHARACTERS])  # which may end within a character
    except UnicodeDecodeError:
        return f"{len(data):,} bytes"
    text = " ".join(text.split())
    if encoding == "bytes" and not text.isprintable():
        return f"{len(data):,} bytes"
    return text if len(text) <= _CHARACTERS else f"{text[:_CHARACTERS].rstrip()} …"


def _plain_json(data: bytes) -> bytes:
    """A JSON text without escapes of other alphabets; what is none stays as it is."""
    try:
        return json.dumps(json.loads(data), ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return data
