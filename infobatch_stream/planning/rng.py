"""Random draws that anyone can repeat for any range: a counter-based generator, and a keyed bijection.

Every draw is a pure function of (seed, epoch, purpose, position). Nothing here has state, so any rank, worker or
later run gets the draw of position i without making those before it.

Where few draws are needed the generator is Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2,
3", SC 2011) as NumPy has it. Where there is one for each sample it is SplitMix64 (Steele, Lea and Flood, "Fast
splittable pseudorandom number generators", OOPSLA 2014), whose n-th word is a function of n, begun at a word of Philox.
NumPy computes it for any set of n at once; to move a Philox to another place takes as long as thousands of draws.
"""

import math
from enum import IntEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["Draws", "Purpose", "bijection", "permutation"]

_WORD: Final = (1 << 64) - 1
_LITTLE: Final = np.dtype("<u8").isnative  # the draws are the bytes of the words, the lowest first
_ROUNDS: Final = 3  # of each half: as in a balanced network of six
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, odd
_MIX: Final = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # of Stafford's variant 13


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
    """Uniform draws for the positions 0, 1, 2, ... of one (seed, epoch, purpose, lane), any of them alone."""

    def __init__(self, seed: int, epoch: int, purpose: Purpose, lane: int = 0) -> None:
        self._start = np.uint64(_philox(seed, epoch, purpose, lane).random_raw())

    def of8(self, start: int, stop: int) -> NDArray[np.uint8]:
        """uint8[stop - start]: the draws of the positions start..stop-1."""
        first = start // 8
        words = self._words(np.arange(first, -(-stop // 8), dtype=np.uint64))
        return words.view(np.uint8)[start - 8 * first : stop - 8 * first]

    def of8_in(self, lows: NDArray[np.int64], highs: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The draws of the ranges low..high-1 (int64[r] each, r at least 1), one range after the other: uint8[k]."""
        firsts = lows // 8
        counts = -(-highs // 8) - firsts
        before = np.cumsum(counts) - counts  # words of the ranges before
        numbers = np.arange(counts.sum()) + np.repeat(firsts - before, counts)
        drawn = self._words(numbers.astype(np.uint64)).view(np.uint8)
        starts = 8 * (before - firsts) + lows
        ranges = zip(starts.tolist(), (starts + highs - lows).tolist(), strict=True)
        return np.concatenate([drawn[start:stop] for start, stop in ranges])

    def of16(self, start: int, stop: int) -> NDArray[np.uint16]:
        """uint16[stop - start]: the draws of the positions start..stop-1."""
        first = start // 4
        words = self._words(np.arange(first, -(-stop // 4), dtype=np.uint64))
        drawn = words.view(np.uint16)[start - 4 * first : stop - 4 * first]
        return drawn if _LITTLE else drawn.byteswap()

    def _words(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """The words with these ``numbers``, in their place; uint64 arrays wrap silently."""
        words = numbers
        words *= _GOLDEN
        words += self._start
        words ^= words >> np.uint64(30)
        words *= _MIX[0]
        words ^= words >> np.uint64(27)
        words *= _MIX[1]
        words ^= words >> np.uint64(31)
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
    mixed = by * _GOLDEN  # the high bits of a product depend on all bits of its factors
    mixed ^= mixed >> np.uint64(29)
    mixed *= _GOLDEN
    mixed >>= np.uint64(33)
    mixed *= base  # 31 bits, brought to 0..base-1
    mixed >>= np.uint64(31)
    mixed += digit
    return np.minimum(mixed, mixed - base)  # below the base, the difference wraps to something huge
