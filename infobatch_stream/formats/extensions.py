"""Extensions of files: the contents that they stand for, and the extension that fits an image's first bytes."""

import re
from collections import Counter
from collections.abc import Mapping

__all__ = [
    "IMAGE_EXTENSIONS",
    "encoding_of",
    "extension_of",
    "image_extension",
    "is_extension",
    "is_image",
    "split_prefix",
    "without_clashes",
]

_JPEG = ("jpg", "jpeg", "jpe", "jfif")
# What Pillow reads of pictures; torchvision's ImageFolder takes nothing else.
IMAGE_EXTENSIONS = frozenset(
    {
        *_JPEG, "png", "apng", "bmp", "dib", "webp", "gif", "avif", "tif", "tiff", "pbm", "pgm", "ppm", "pnm", "pfm",
        "jp2", "j2k", "jpc", "jpf", "jpx", "j2c", "tga", "ico", "pcx", "qoi", "sgi", "dds", "psd",
    }
)  # fmt: skip
MAGIC_BYTES = 12  # first bytes of an image, by which its kind is recognized
_MAGIC = re.compile(
    rb"(?P<jpg>\xff\xd8\xff)|(?P<png>\x89PNG\r\n\x1a\n)|(?P<gif>GIF8[79]a)|(?P<webp>RIFF.{4}WEBP)"
    rb"|(?P<tif>II\*\0|MM\0\*)|(?P<bmp>BM.{4}\0{4})|(?P<pbm>P[14]\s+[\d#])|(?P<pgm>P[25]\s+[\d#])|(?P<ppm>P[36]\s)"
    rb"|(?P<avif>.{4}ftypavi[fs])|(?P<jp2>\0\0\0\x0cjP  \r\n\x87\n)|(?P<j2k>\xff\x4f\xff\x51)",
    re.DOTALL,
)
_EXTENSION = re.compile(r"\w+([.-]\w+)*")
# What webdataset's own decoder takes for text, JSON and whole numbers.
_ENCODINGS = {
    **dict.fromkeys(_JPEG, "jpeg"),
    **dict.fromkeys(IMAGE_EXTENSIONS - {*_JPEG}, "png"),  # MDS reads both with PIL, which looks at the bytes
    **dict.fromkeys(("txt", "text", "transcript"), "str"),
    **dict.fromkeys(("json", "jsn"), "json"),
    **dict.fromkeys(("cls", "cls2", "class", "count", "index", "inx", "id"), "int"),
    "npy": "ndarray",
}
_EXTENSIONS = {"jpeg": "jpg", "png": "png", "json": "json", "pkl": "pkl", "ndarray": "npy"}


def is_extension(text: str) -> bool:
    """Whether ``text`` may follow the key in a member's name, so that the tar can be unpacked everywhere."""
    return _EXTENSION.fullmatch(text) is not None


def split_prefix(extension: str) -> tuple[str, str]:
    """``mask.png`` -> ("mask.", "png"). The last part says how it is decoded."""
    prefix, dot, last = extension.rpartition(".")
    return prefix + dot, last


def is_image(extension: str) -> bool:
    """Whether the last part of ``extension`` is that of an image."""
    return split_prefix(extension)[1] in IMAGE_EXTENSIONS


def image_extension(start: bytes) -> str | None:
    """The extension for an image that begins with ``start`` (`MAGIC_BYTES` are enough); None for other data."""
    match = _MAGIC.match(start)
    return match.lastgroup if match else None


def encoding_of(extension: str) -> str:
    """The MDS encoding for members with ``extension``, as far as a name can tell."""
    return _ENCODINGS.get(split_prefix(extension)[1], "bytes")


def extension_of(encoding: str) -> str:
    """The extension for values of an MDS encoding."""
    name = encoding.partition(":")[0]
    if name in _EXTENSIONS:
        return _EXTENSIONS[name]
    if name.startswith(("int", "uint")):
        return "cls"
    return "txt" if name.startswith(("float", "str")) else "bin"


def without_clashes(wanted: Mapping[str, str]) -> dict[str, str]:
    """Column -> extension: the wanted one, or ``<column>.<extension>`` where several columns want the same.

    The column's name is written in lower case, other characters than letters, digits and "_" become "_", and "_" at
    its beginning is dropped, since names with "__" are metadata. Names that are then equal get numbers.
    """
    counts = Counter(wanted.values())
    found: dict[str, str] = {}
    taken = {extension for extension, count in counts.items() if count == 1}
    for column, extension in wanted.items():
        if counts[extension] == 1:
            found[column] = extension
            continue
        stem = re.sub(r"\W+", "_", column.lower()).lstrip("_") or "_"
        number, name = 1, f"{stem}.{extension}"
        while name in taken:
            number += 1
            name = f"{stem}{number}.{extension}"
        taken.add(name)
        found[column] = name
    return found
