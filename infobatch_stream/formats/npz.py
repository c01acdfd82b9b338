"""Arrays in an .npz as numpy.savez writes them, read without trusting its headers.

numpy.load allocates what a header claims before it looks for the bytes, and zipfile makes an object of every entry.
"""

import os
import zipfile
from collections.abc import Mapping
from io import BytesIO
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

__all__ = ["read_npz"]

_NAME = 64  # bytes of an entry's name, at most
# Bytes, in a zip, of: an entry of the table of contents without its name; the record that ends the table; and the
# record before that in a zip of 4 GiB or more, which no index is.
_ENTRY, _END, _LOCATOR = 46, 22, 20
_HEADER = 128  # bytes of the header of a one-dimensional .npy


def read_npz(file: BinaryIO, dtypes: Mapping[str, str], limit: int) -> dict[str, NDArray[Any]]:
    """The one-dimensional arrays ``dtypes`` (name -> dtype) of an uncompressed .npz of at most ``limit`` bytes.

    It never allocates more than the size of the file. Raises ValueError for what numpy.savez would not write, and for
    damaged files whatever zipfile raises, which may be anything.
    """
    size = file.seek(0, os.SEEK_END)
    if not _LOCATOR + _END <= size <= limit:
        raise ValueError(f"{size} bytes")
    file.seek(size - _LOCATOR - _END)
    tail = file.read()
    locator, end = tail[:_LOCATOR], tail[_LOCATOR:]
    contents = int.from_bytes(end[12:16], "little")
    if (
        locator.startswith(b"PK\6\7")
        or not (end.startswith(b"PK\5\6") and end.endswith(b"\0\0"))  # a comment would follow
        or contents > len(dtypes) * (_ENTRY + _NAME)
    ):
        raise ValueError("its table of contents is not of the expected size")
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):  # it could unpack to any size
            raise ValueError("it is compressed")
        if sum(entry.file_size for entry in entries) > size:  # several may claim the same bytes
            raise ValueError("its entries overlap")
        return {name: _array(archive.read(f"{name}.npy"), np.dtype(dtype)) for name, dtype in dtypes.items()}


def _array(data: bytes, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The array in an .npy, whose header must be the one that numpy writes for as many numbers as there are."""
    count = (len(data) - _HEADER) // dtype.itemsize
    header = BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype.str, "fortran_order": False, "shape": (count,)})  # type: ignore[no-untyped-call]
    if header.getvalue() != data[:_HEADER]:
        raise ValueError(f"its header is {data[:_HEADER]!r}")
    return np.frombuffer(data, dtype, count, _HEADER)
