"""The order within a lane: shuffled within a window, computed lazily from any point.

The entry at position p of its lane gets the key p + W * u, u uniform in [0, 1); entries come out in the order of
their keys. Positions fall into chunks of W, keys into buckets of W: bucket c holds the late entries of chunk c-1
(whose key passed the chunk's end) and the early ones of chunk c.

    positions  | chunk 0        | chunk 1        | chunk 2  |
                 early \\__ late   early \\__ late   early \\_ late
    keys       | bucket 0       | bucket 1       | bucket 2 | bucket 3 |

So the first outputs come from the first few positions (few shards), and from then on a step mixes a window.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.draws import draw32
from infobatch_stream.recent import Recent

__all__ = ["WindowShuffle"]


class WindowShuffle:
    """The output order of ``size`` positions under a window of ``window`` positions. Pure but for a small cache.

    Memory: O(window), whatever the size.
    """

    def __init__(self, size: int, window: int, seed: int, epoch: int, lane: int) -> None:
        self._size = size
        self._window = window
        self._draw = (seed, epoch, lane)
        self._chunks = Recent[tuple[NDArray[np.int64], NDArray[np.bool_]]](3)

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, slice]]:
        """The outputs start..stop-1 as (bucket, which of its outputs)."""
        bucket = start // self._window
        while start < stop:
            # The first output of bucket c is number c * W - (late entries of chunk c-1): at most a bucket back.
            first, after = self._first(bucket), self._first(bucket + 1)
            if start < after:
                yield bucket, slice(start - first, min(stop, after) - first)
                start = min(stop, after)
            bucket += 1

    def bucket(self, bucket: int) -> NDArray[np.int64]:
        """The positions that a bucket holds, in their output order (equal keys: the lower position first)."""
        keys, late = self._chunk(bucket)
        here = np.flatnonzero(~late)
        positions, order = bucket * self._window + here, keys[here]
        if bucket:
            before, was_late = self._chunk(bucket - 1)
            moved = np.flatnonzero(was_late)
            positions = np.concatenate([(bucket - 1) * self._window + moved, positions])
            order = np.concatenate([before[moved] - (self._window << 32), order])
        return positions[np.argsort(order, kind="stable")].astype(np.int64, copy=False)

    def _first(self, bucket: int) -> int:
        if bucket == 0:
            return 0
        return min(bucket * self._window, self._size) - int(np.count_nonzero(self._chunk(bucket - 1)[1]))

    def _chunk(self, chunk: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        return self._chunks.get(chunk, self._chunk_of)

    def _chunk_of(self, chunk: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Keys of a chunk's positions, counted from the chunk's start in units of 2^-32; which are late."""
        start = chunk * self._window
        stop = min(start + self._window, self._size)
        if stop <= start:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.bool_)
        keys = np.arange(stop - start, dtype=np.int64) << 32
        keys += draw32(*self._draw, start, stop).astype(np.int64) * self._window
        return keys, keys >= self._window << 32
