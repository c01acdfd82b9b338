"""Columns of files, as a rule images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from infobatch_stream.convert.readers.images import read_image
from infobatch_stream.convert.readers.plain_arrow import lengths_of
from infobatch_stream.formats.extensions import (
    IMAGE_EXTENSIONS,
    MAGIC_BYTES,
    encoding_of,
    image_extension,
    is_extension,
)
from infobatch_stream.formats.schema import Column, EncodedImage

__all__ = ["NoFileError", "FileColumn", "Rows", "mostly_images"]

Rows = Sequence[tuple[pa.Array, int]]
"""Some rows of a column that tell what the others may be like."""


class NoFileError(ValueError):
    """There is no file that may be read."""


class FileColumn:
    """Files, as a rule images: their bytes, or Hugging Face's {bytes, path}, where the path tells the extension.

    Without bytes the file at the path is read, which must lie below the folder of the table: a table from elsewhere
    might name any file of this machine.

    images: whether most of the looked-at ones are; then all others have to be, too.
    extension: that all are stored with; by default an image's own behind ``prefix``.
    """

    def __init__(self, folder: Path, rows: Rows, *, images: bool = False) -> None:
        """``images``: it is known that they are."""
        self._folder = folder
        self.prefix, self.extension = "", ""
        found = [_extension(*_parts(array, row)) for array, row in rows]
        pictures = [extension for extension in found if extension in IMAGE_EXTENSIONS]
        self.images = images or 2 * len(pictures) > len(found)
        if self.images:
            jpeg = not pictures or "jpeg" in map(encoding_of, pictures)
            self.column = Column("jpeg" if jpeg else "png", pictures[0] if pictures else "jpg")
        else:
            self.column = Column("bytes", found[0] if found else "bin")
            self.extension = self.column.wds

    def value(self, array: pa.Array, row: int) -> EncodedImage:
        """See `Kind`."""
        part, path = _parts(array, row)
        data = read_image(self._place(path)) if part is None else part.to_pybytes()
        extension = _extension(pa.py_buffer(data), path)
        if self.images and not data:
            raise ValueError("it has no bytes")
        if self.images and extension not in IMAGE_EXTENSIONS:
            raise ValueError(f"it begins with {data[:16]!r}, as no image does that is known here")
        return EncodedImage(data, self.extension or self.prefix + extension)

    def doubtful(self, array: pa.Array) -> NDArray[np.int64]:
        """See `Kind`."""
        if not pa.types.is_struct(array.type):
            return np.flatnonzero(lengths_of(array) == 0) if self.images else np.zeros(0, np.int64)
        nameless = array.field("path").is_null().to_numpy(zero_copy_only=False)
        data = array.field("bytes")
        absent = data.is_null().to_numpy(zero_copy_only=False)
        return np.flatnonzero((absent & nameless) | (~absent & (lengths_of(data) == 0) & self.images))

    def sizes(self, array: pa.Array) -> NDArray[np.int64]:
        """See `Kind`."""
        if not pa.types.is_struct(array.type):
            return lengths_of(array)
        data = array.field("bytes")
        sizes = lengths_of(data)
        for row in np.flatnonzero(data.is_null().to_numpy(zero_copy_only=False)).tolist():
            try:
                sizes[row] = self._place(array.field("path")[row].as_py()).stat().st_size
            except (ValueError, OSError):  # raised again where it is read
                continue
        return sizes

    def _place(self, path: str | None) -> Path:
        if not path or "\0" in path:
            raise NoFileError("there are neither bytes nor a path")
        folder = self._folder.resolve()
        place = (folder / path).resolve()
        if not place.is_relative_to(folder):
            raise NoFileError(
                f"the file {path!r} is not below {folder}, and others are not read: put it there, or its bytes "
                "into the table"
            )
        return place


def mostly_images(rows: Rows) -> bool:
    """Whether most of the bytes in ``rows`` begin as images do."""
    return 2 * sum(_magic(_parts(array, row)[0]) is not None for array, row in rows) > len(rows)


def _parts(array: pa.Array, row: int) -> tuple[pa.Buffer | None, str | None]:
    """Bytes and path of a file."""
    scalar = array[row]
    if not pa.types.is_struct(array.type):
        return scalar.as_buffer(), None
    data = scalar["bytes"]
    return data.as_buffer() if data.is_valid else None, scalar["path"].as_py()


def _magic(data: pa.Buffer | None) -> str | None:
    return None if data is None else image_extension(data.slice(0, min(MAGIC_BYTES, data.size)).to_pybytes())


def _extension(data: pa.Buffer | None, path: str | None) -> str:
    """From the path, else from the first bytes of an image, else "bin"."""
    named = Path(path or "").suffix[1:].lower()
    if named in IMAGE_EXTENSIONS:
        return named
    return _magic(data) or (named if len(named) <= 16 and is_extension(named) else "bin")
