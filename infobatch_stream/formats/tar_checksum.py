"""Checksums of a tar: of the whole file, and of a few parts, which recognizes it quickly."""

import zlib
from array import array
from io import BufferedReader

import numpy as np
from numpy.typing import NDArray

__all__ = ["checksum_of", "probe_of"]

_CHUNK = 2**20  # bytes read at once for a checksum
_PROBED_ROWS, _PROBED_BYTES = 16, 4096  # rows of a shard; first bytes of each member


def probe_of(
    file: BufferedReader,
    bounds: "NDArray[np.int64] | array[int]",
    offset: "NDArray[np.int64] | array[int]",
    length: "NDArray[np.int64] | array[int]",
) -> int:
    """CRC-32 of the first bytes of the members of a few rows, which are evenly spaced."""
    rows, checksum = len(bounds) - 1, 0
    for row in sorted({number * (rows - 1) // (_PROBED_ROWS - 1) for number in range(_PROBED_ROWS)} if rows else ()):
        for member in range(int(bounds[row]), int(bounds[row + 1])):
            file.seek(int(offset[member]))
            checksum = zlib.crc32(file.read(min(int(length[member]), _PROBED_BYTES)), checksum)
    return checksum


def checksum_of(file: BufferedReader) -> int:
    """CRC-32 of the whole file."""
    checksum = file.seek(0)
    while data := file.read(_CHUNK):
        checksum = zlib.crc32(data, checksum)
    return checksum
