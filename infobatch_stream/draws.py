"""Random draws that anyone can repeat for any range: a counter-based generator, and a keyed bijection.

Every draw is a pure function of (seed, epoch, purpose, position). Nothing here has state, so any rank, worker or
later run gets the draw of position i without making those before it.

The generator is Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) as NumPy
has it: a counter value gives four 64-bit words.
"""

import math
from enum import IntEnum
from threading import Lock
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["Draws", "Purpose", "bijection", "permutation"]

_WORD: Final = (1 << 64) - 1
_COUNTERS: Final = 1 << 256
_LITTLE: Final = np.dtype("<u8").isnative  # the draws are the bytes of the words, the lowest first
_ROUNDS: Final = 3  # of each half: as in a balanced network of six
_ODD: Final = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio


class Purpose(IntEnum):
    """What a draw decides; draws of different purposes are independent."""

    SELECT = 1
    UNITS = 2
    WINDOW = 3
    WHOLE = 4
    SELECT_FINELY = 5


def _philox(seed: int, epoch: int, purpose: Purpose, lane: int = 0) -> np.random.Philox:
    key = np.array([seed & _WORD, (int(purpose) << 48) | epoch], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, lane, 0], dtype=np.uint64))


class Draws:
    """Uniform draws for the positions 0, 1, 2, ... of one (seed, epoch, purpose, lane), any range of them alone."""

    def __init__(self, seed: int, epoch: int, purpose: Purpose, lane: int = 0) -> None:
        # One generator that is moved about: to make another costs as much as 10,000 draws.
        self._philox = _philox(seed, epoch, purpose, lane)
        self._block = 0
        self._lock = Lock()

    def of8(self, start: int, stop: int) -> NDArray[np.uint8]:
        """uint8[stop - start]: the draws of the positions start..stop-1."""
        first = start // 32
        return self._blocks(first, -(-stop // 32)).view(np.uint8)[start - 32 * first : stop - 32 * first]

    def of16(self, start: int, stop: int) -> NDArray[np.uint16]:
        """uint16[stop - start]: the draws of the positions start..stop-1."""
        first = start // 16
        drawn = self._blocks(first, -(-stop // 16)).view(np.uint16)[start - 16 * first : stop - 16 * first]
        return drawn if _LITTLE else drawn.byteswap()

    def _blocks(self, first: int, last: int) -> NDArray[np.uint64]:
        """The words of the counter values first..last-1, four each, little-endian."""
        with self._lock:
            if first != self._block:
                self._philox.advance((first - self._block) % _COUNTERS)  # goes round, so backwards too
            self._block = last
            words: NDArray[np.uint64] = self._philox.random_raw(4 * (last - first))
        return words if _LITTLE else words.byteswap()


def permutation(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    """A uniform permutation int64[size] of the units of an epoch (`Purpose.UNITS`); O(size) memory."""
    return np.random.Generator(_philox(seed, epoch, Purpose.UNITS)).permutation(size).astype(np.int64, copy=False)


def bijection(seed: int, epoch: int, size: int, at: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where a permutation of 0..size-1 sends ``at`` (int64[k], each in 0..size-1), in O(k) time and memory.

    A Feistel network over the cells of a nearly square table of at least ``size`` cells; what it sends outside of
    0..size-1 goes through it again until it falls inside (Black and Rogaway, "Ciphers with arbitrary finite domains",
    CT-RSA 2002). The table has less than a row too many, so few do.
    """
    rows = math.isqrt(size - 1) + 1 if size > 1 else 1
    table = np.uint64(rows), np.uint64(-(-size // rows))
    keys = np.asarray(_philox(seed, epoch, Purpose.WHOLE).random_raw(2 * _ROUNDS), dtype=np.uint64)
    out = _feistel(at.astype(np.uint64), *table, keys)
    while (outside := np.flatnonzero(out >= size)).size:
        out[outside] = _feistel(out[outside], *table, keys)
    return out.astype(np.int64)


def _feistel(
    x: NDArray[np.uint64], rows: np.uint64, columns: np.uint64, keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    row = x // columns
    column = x - row * columns
    for row_key, column_key in keys.reshape(-1, 2):
        row = _shifted(row, rows, column ^ row_key)
        column = _shifted(column, columns, row ^ column_key)
    return row * columns + column


def _shifted(digit: NDArray[np.uint64], base: np.uint64, by: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """(digit + hash of ``by``) modulo ``base``. uint64 arrays wrap silently."""
    mixed = by * _ODD  # the high bits of a product depend on all bits of its factors
    mixed ^= mixed >> np.uint64(29)
    mixed *= _ODD
    mixed >>= np.uint64(33)
    mixed *= base  # 31 bits, brought to 0..base-1
    mixed >>= np.uint64(31)
    mixed += digit
    return np.minimum(mixed, mixed - base)  # below the base, the difference wraps to something huge
