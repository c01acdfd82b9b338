"""Many booleans as bits, with what is before a place, and where the n-th true one is.

Known as rank and select (Jacobson, "Space-efficient static trees and graphs", FOCS 1989): N bits and a running count
for every 256 of them.
"""

from collections.abc import Iterable
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["Bits", "count_before", "pack"]

_LINE: Final = 4  # words between two running counts


def pack(flags: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """bool[k] as uint64[ceil(k / 64)], the first in the lowest bit, the rest of the last word 0."""
    packed = np.packbits(flags, bitorder="little")
    words = np.zeros(-(-flags.size // 64), dtype="<u8")
    words.view(np.uint8)[: packed.size] = packed
    return words.astype(np.uint64, copy=False)


def count_before(words: NDArray[np.uint64], places: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    """How many bits of ``words`` are set before each of ``places`` (int64[k], up to the end), and in all."""
    ends = np.zeros(words.size + 1, dtype=np.int64)
    np.cumsum(np.bitwise_count(words), dtype=np.int64, out=ends[1:])
    word, bit = places >> 6, (places & 63).astype(np.uint64)
    # A place at the very end has no bit of its own, and none of the last word's counts.
    own = words[np.minimum(word, words.size - 1)] & ((np.uint64(1) << bit) - np.uint64(1))
    return ends[word] + np.bitwise_count(own), int(ends[-1])


class Bits:
    """``size`` bits, of which the n-th that is set can be found.

    parts: (place of the first bit, a multiple of 256; words as `pack` makes them), together all bits.

    Attributes:
        count: how many are set.
    """

    def __init__(self, size: int, parts: Iterable[tuple[int, NDArray[np.uint64]]]) -> None:
        words = np.zeros(-(-size // (64 * _LINE)) * _LINE, dtype=np.uint64)
        for start, part in parts:
            words[start // 64 : start // 64 + part.size] = part
        self._lines = words.reshape(-1, _LINE)
        self._starts = np.zeros(len(self._lines) + 1, dtype=np.int64)
        np.cumsum(np.bitwise_count(self._lines).sum(axis=1, dtype=np.int64), out=self._starts[1:])
        self.count = int(self._starts[-1])

    def find(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The places of the set bits with the ``numbers`` 0..count-1: int64[k] for int64[k]."""
        line = self._starts.searchsorted(numbers, side="right") - 1
        rest = numbers - self._starts[line]
        words = self._lines[line]
        counts = np.bitwise_count(words)
        word = np.zeros(numbers.size, dtype=np.int64)
        running = np.zeros(numbers.size, dtype=np.int64)
        before = np.zeros(numbers.size, dtype=np.int64)
        for number in range(_LINE - 1):  # is it behind this word?
            running += counts[:, number]
            behind = rest >= running
            word += behind
            np.copyto(before, running, where=behind)
        return (line * _LINE + word) * 64 + _find_in_word(words[np.arange(numbers.size), word], rest - before)


def _find_in_word(words: NDArray[np.uint64], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """The place, 0..63, of the set bit with that number in each word: int64[k] for uint64[k], int64[k]."""
    place = np.zeros(words.size, dtype=np.int64)
    for width in (32, 16, 8, 4, 2, 1):  # in which half it is, from halves of 32 bits down to single ones
        lower = np.bitwise_count((words >> place.astype(np.uint64)) & np.uint64((1 << width) - 1))
        upper = numbers >= lower
        numbers = numbers - lower * upper
        place += width * upper
    return place
