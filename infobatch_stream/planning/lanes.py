"""A lane: an equal share of the kept entries, and the order in which they are read.

Data in shards is shuffled within a window as the shards are read; data without shards is permuted as a whole. All
compute more than a step at once and keep it, since the next step wants what stands behind it.
"""

from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.planning._small_cache import SmallCache
from infobatch_stream.planning.deal import Stretch
from infobatch_stream.planning.entries import Entries, KeptEntries, KeptSamples
from infobatch_stream.planning.rng import bijection
from infobatch_stream.planning.window_shuffle import WindowShuffle

__all__ = ["Lane", "PermutedLane", "StraightLane", "WindowLane", "fill", "repeat"]

_AHEAD: Final = 1 << 13  # entries computed at once where the window does not say how many: 64 KiB of int64


class Lane(Protocol):
    """``size`` entries in their reading order."""

    size: int

    def entries(self, start: int, stop: int) -> Entries:
        """Entries number start..stop-1 of the reading order."""


class WindowLane:
    """The kept entries start..stop-1, shuffled within ``window``; order: (seed, epoch, number of the lane)."""

    def __init__(self, kept: KeptEntries, start: int, stop: int, window: int, order: tuple[int, int, int]) -> None:
        self.size = stop - start
        self._kept = kept
        self._start = start
        self._window = window
        self._shuffle = WindowShuffle(self.size, window, *order)
        self._chunks, self._buckets = SmallCache[int, Entries](2), SmallCache[int, tuple[int, Entries]](2)
        self._latest = 0, Entries.join([])

    def entries(self, start: int, stop: int) -> Entries:
        """Entries number start..stop-1 of the reading order."""
        first, entries = self._latest  # which has most steps whole
        if first <= start and stop <= first + entries.index.size:
            return entries.take(slice(start - first, stop - first))
        parts = []
        # The first output of bucket c is number c * W - (late entries of chunk c-1): at most a bucket back.
        bucket = start // self._window
        while start < stop:
            self._latest = first, entries = self._buckets.get(bucket, self._bucket_of)
            end = min(stop, first + entries.index.size)
            if start < end:
                parts.append(entries.take(slice(start - first, end - first)))
                start = end
            bucket += 1
        return Entries.join(parts)

    def _chunk_of(self, chunk: int) -> Entries:
        low, high = (min(max(c, 0) * self._window, self.size) for c in (chunk, chunk + 1))
        return self._kept.span(self._start + low, self._start + high)

    def _bucket_of(self, bucket: int) -> tuple[int, Entries]:
        """The number of a bucket's first output, and its entries in their order."""
        before, own = (self._chunks.get(chunk, self._chunk_of) for chunk in (bucket - 1, bucket))
        late, early, order = self._shuffle.bucket(bucket)
        return self._shuffle.first(bucket), Entries.join([before.take(late), own.take(early)], order)


class PermutedLane:
    """The places start..stop-1 of a permutation of all kept samples; order: (seed, epoch).

    stretches: how many columns of the lane a step takes, from which place on. A rank asks for the same columns step by
    step, so those of the steps ahead are computed along with the first, and the columns of other ranks are not.
    """

    def __init__(
        self, kept: KeptSamples, start: int, stop: int, stretches: Sequence[Stretch], order: tuple[int, int]
    ) -> None:
        self.size = stop - start
        self._kept = kept
        self._start = start
        ends = [*(later.first for later in stretches[1:]), self.size]
        self._stretches = [(*stretch, end) for stretch, end in zip(stretches, ends, strict=True)]
        self._order = order
        self._blocks = SmallCache[tuple[int, int, int, int], Entries](2)

    def entries(self, start: int, stop: int) -> Entries:
        """Entries number start..stop-1 of the reading order."""
        number = next((n for n, (_, _, end) in enumerate(self._stretches) if start < end), 0)
        first, width, end = self._stretches[number]
        (step, column), own = divmod(start - first, max(1, width)), stop - start
        if column + own > width or stop > end:
            return self._at(np.arange(start, stop, dtype=np.int64))
        block, row = divmod(step, _steps_ahead(own))
        return self._blocks.get((number, block, column, own), self._block_of).take(slice(row * own, (row + 1) * own))

    def _block_of(self, key: tuple[int, int, int, int]) -> Entries:
        number, block, column, own = key
        first, width, end = self._stretches[number]
        steps = _steps_ahead(own)
        firsts = first + (block * steps + np.arange(steps, dtype=np.int64)) * width + column
        places = (firsts[:, None] + np.arange(own, dtype=np.int64)).reshape(-1)
        return self._at(places[places < end])

    def _at(self, places: NDArray[np.int64]) -> Entries:
        return self._kept.at(bijection(*self._order, self._kept.size, self._start + places))


def _steps_ahead(own: int) -> int:
    return max(1, _AHEAD // max(1, own))


class StraightLane:
    """The kept entries start..stop-1 as they stand."""

    def __init__(self, kept: KeptEntries, start: int, stop: int) -> None:
        self.size = stop - start
        self._kept = kept
        self._start = start
        self._blocks = SmallCache[int, Entries](2)

    def entries(self, start: int, stop: int) -> Entries:
        """Entries number start..stop-1."""
        parts = []
        while start < stop:
            block, within = divmod(start, _AHEAD)
            end = min(stop, (block + 1) * _AHEAD)
            parts.append(self._blocks.get(block, self._block_of).take(slice(within, within + end - start)))
            start = end
        return Entries.join(parts)

    def _block_of(self, block: int) -> Entries:
        low, high = (min(b * _AHEAD, self.size) for b in (block, block + 1))
        return self._kept.span(self._start + low, self._start + high)


def fill(lane: Lane, start: int, stop: int) -> Entries:
    """Repeats, with weight 0 and unrecorded, for the columns start..stop-1 behind the lane's end.

    They are the lane's last entries, latest first: those whose shards were just read.
    """
    back = lane.size - 1 - (np.arange(start, stop, dtype=np.int64) - lane.size) % lane.size
    low = int(back.min())
    return repeat(lane.entries(low, int(back.max()) + 1).take(back - low))


def repeat(entries: Entries) -> Entries:
    """The same samples with weight 0 and unrecorded, to fill up a batch."""
    nothing = np.zeros(entries.index.size, dtype=np.bool_)
    return Entries(entries.index, nothing.astype(np.float32), nothing)
