"""The order within a lane: shuffled within a window, computed lazily from any point.

The entry at position p of its lane gets the key p + W * u, u uniform in [0, 1); entries come out in the order of
their keys, compared to W / 2^16. Positions fall into chunks of W, keys into buckets of W: bucket c holds the late
entries of chunk c-1 (whose key passed the chunk's end) and the early ones of chunk c.

    positions  | chunk 0        | chunk 1        | chunk 2  |
                 early \\__ late   early \\__ late   early \\_ late
    keys       | bucket 0       | bucket 1       | bucket 2 | bucket 3 |

So the first outputs come from the first few positions (few shards), and from then on a step mixes a window.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.draws import Draws, Purpose
from infobatch_stream.recent import Recent

__all__ = ["WindowShuffle"]


class WindowShuffle:
    """The output order of ``size`` positions under a window of ``window`` positions. Pure but for a small cache.

    Memory: O(window), whatever the size.
    """

    def __init__(self, size: int, window: int, seed: int, epoch: int, lane: int) -> None:
        self._size = size
        self._window = window
        self._draws = Draws(seed, epoch, Purpose.WINDOW, lane)
        self._chunks = Recent[int, tuple[NDArray[np.uint16], NDArray[np.bool_]]](3)

    def first(self, bucket: int) -> int:
        """The number of the first output of a bucket: as many are before it as positions, less the late ones."""
        if bucket == 0:
            return 0
        late = int(np.count_nonzero(self._chunks.get(bucket - 1, self._chunk_of)[1]))
        return min(bucket * self._window, self._size) - late

    def bucket(self, bucket: int) -> NDArray[np.int64]:
        """The positions that a bucket holds, in their output order (equal keys: the lower position first)."""
        keys, late = self._chunks.get(bucket, self._chunk_of)
        here = np.flatnonzero(~late)
        positions, keys = here + bucket * self._window, keys[here]
        if bucket:
            keys_before, late_before = self._chunks.get(bucket - 1, self._chunk_of)
            moved = np.flatnonzero(late_before)
            positions = np.concatenate([moved + (bucket - 1) * self._window, positions])
            keys = np.concatenate([keys_before[moved], keys])
        return positions[np.argsort(keys, kind="stable")]  # of 16 bits: a radix sort, in linear time on any processor

    def _chunk_of(self, chunk: int) -> tuple[NDArray[np.uint16], NDArray[np.bool_]]:
        """Keys of a chunk's positions within their bucket, in units of W / 2^16; which are late."""
        start = chunk * self._window
        stop = max(start, min(start + self._window, self._size))
        if start == stop:
            return np.empty(0, dtype=np.uint16), np.empty(0, dtype=np.bool_)
        uniform = self._draws.of32(start, stop)
        keys = uniform + _ramp(self._window, min(self._window, self._size))[: stop - start]
        return (keys >> np.uint32(16)).astype(np.uint16), keys < uniform  # the sum went over the bucket's end


@lru_cache(2)
def _ramp(window: int, length: int) -> NDArray[np.uint32]:
    """uint32[length]: position / window in units of 2^-32, rounded down."""
    return ((np.arange(length, dtype=np.uint64) << np.uint64(32)) // np.uint64(window)).astype(np.uint32)
