"""The order within a lane: shuffled within a window, computed lazily from any point.

The entry at position p of its lane gets the key p + W * u, u uniform in [0, 1); entries come out in the order of
their keys, in units of W / 2^16. Positions fall into chunks of W, keys into buckets of W: bucket c holds the late
entries of chunk c-1 (whose key passed the chunk's end) and the early ones of chunk c.

    positions  | chunk 0        | chunk 1        | chunk 2  |
                 early \\__ late   early \\__ late   early \\_ late
    keys       | bucket 0       | bucket 1       | bucket 2 | bucket 3 |

So the first outputs come from the first few positions (few shards), and from then on a step mixes a window.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.planning._small_cache import SmallCache
from infobatch_stream.planning.rng import Draws, Purpose

__all__ = ["WindowShuffle"]


class _Chunk(NamedTuple):
    """The places, within a chunk, of its early entries and of its late ones, and their keys within their bucket."""

    early: NDArray[np.int64]
    early_keys: NDArray[np.uint16]
    late: NDArray[np.int64]
    late_keys: NDArray[np.uint16]


class WindowShuffle:
    """The output order of ``size`` positions under a window of ``window`` positions. Pure but for a small cache.

    Memory: O(window), whatever the size.
    """

    def __init__(self, size: int, window: int, seed: int, epoch: int, lane: int) -> None:
        self._size = size
        self._window = window
        self._draws = Draws(seed, epoch, Purpose.WINDOW, lane)
        self._chunks = SmallCache[int, _Chunk](2)

    def first(self, bucket: int) -> int:
        """The number of the first output of a bucket: as many are before it as positions, less the late ones."""
        return min(bucket * self._window, self._size) - self._chunks.get(bucket - 1, self._chunk_of).late.size

    def bucket(self, bucket: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """What a bucket holds: places within the chunk before, places within its own chunk, and the order of both.

        Of equal keys the lower position comes first.
        """
        before, own = (self._chunks.get(chunk, self._chunk_of) for chunk in (bucket - 1, bucket))
        keys = np.concatenate([before.late_keys, own.early_keys])
        # Of 16 bits: a radix sort, in linear time on any processor.
        return before.late, own.early, np.argsort(keys, kind="stable")

    def _chunk_of(self, chunk: int) -> _Chunk:
        start = chunk * self._window
        stop = min(start + self._window, self._size)
        if chunk < 0 or start >= stop:
            places, keys = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.uint16)
            return _Chunk(places, keys, places, keys)
        uniform = self._draws.of16(start, stop)
        keys = uniform + _ramp(self._window, min(self._window, self._size))[: stop - start]
        wrapped = keys < uniform  # over the bucket's end
        early, late = np.flatnonzero(~wrapped), np.flatnonzero(wrapped)
        return _Chunk(early, keys[early], late, keys[late])


@lru_cache(2)
def _ramp(window: int, length: int) -> NDArray[np.uint16]:
    """uint16[length]: places within a chunk in units of window / 2^16, rounded down."""
    return ((np.arange(length, dtype=np.uint64) << np.uint64(16)) // np.uint64(window)).astype(np.uint16)
