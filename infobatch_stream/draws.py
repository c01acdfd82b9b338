"""Random draws that anyone can repeat for any range: a counter-based generator, and a keyed bijection.

Every draw is a pure function of (seed, epoch, purpose, position). Nothing here has state, so any rank, worker or
later run gets the draw of position i without making those before it.

The generator is Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) as NumPy
has it: a counter value gives four 64-bit words.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

__all__ = ["Purpose", "bijection", "draw16", "draw32", "permutation"]

_WORD = (1 << 64) - 1
_ROUNDS = 8


class Purpose(IntEnum):
    """What a draw decides; draws of different purposes are independent."""

    SELECT = 1
    UNITS = 2
    WINDOW = 3
    WHOLE = 4


def _philox(seed: int, epoch: int, purpose: Purpose, block: int = 0, lane: int = 0) -> np.random.Philox:
    key = np.array([seed & _WORD, (int(purpose) << 48) | epoch], dtype=np.uint64)
    counter = np.array([block, 0, lane, 0], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter)


def _words(generator: np.random.Philox, blocks: int) -> NDArray[np.uint64]:
    return np.asarray(generator.random_raw(4 * blocks), dtype="<u8")


def draw16(seed: int, epoch: int, start: int, stop: int) -> NDArray[np.uint16]:
    """Uniform uint16[stop - start] that decide about the samples start..stop-1 (`Purpose.SELECT`)."""
    first = start // 16
    words = _words(_philox(seed, epoch, Purpose.SELECT, first), -(-stop // 16) - first)
    return words.view("<u2")[start - 16 * first : stop - 16 * first]


def draw32(seed: int, epoch: int, lane: int, start: int, stop: int) -> NDArray[np.uint32]:
    """Uniform uint32[stop - start] for the positions start..stop-1 of a lane (`Purpose.WINDOW`)."""
    first = start // 8
    words = _words(_philox(seed, epoch, Purpose.WINDOW, first, lane), -(-stop // 8) - first)
    return words.view("<u4")[start - 8 * first : stop - 8 * first]


def permutation(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    """A uniform permutation int64[size] of the units of an epoch (`Purpose.UNITS`); O(size) memory."""
    return np.random.Generator(_philox(seed, epoch, Purpose.UNITS)).permutation(size).astype(np.int64, copy=False)


def bijection(seed: int, epoch: int, size: int, at: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where a permutation of 0..size-1 sends ``at`` (int64[k], each in 0..size-1), in O(k) time and memory.

    A Feistel network of eight rounds over the next power of four, walked until it falls inside (Black and
    Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002): under four walks an entry on average.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = np.asarray(_philox(seed, epoch, Purpose.WHOLE).random_raw(_ROUNDS), dtype=np.uint64)
    out = _feistel(at.astype(np.uint64), half, keys)
    while (outside := np.flatnonzero(out >= size)).size:
        out[outside] = _feistel(out[outside], half, keys)
    return out.astype(np.int64)


def _feistel(x: NDArray[np.uint64], half: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    bits = np.uint64(half)
    mask = np.uint64((1 << half) - 1)
    left, right = x >> bits, x & mask
    for key in keys:
        # The finaliser of splitmix64: each input bit reaches each output bit; uint64 arrays wrap silently.
        mixed = right ^ key
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
    return (left << bits) | right
