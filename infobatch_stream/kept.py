"""The kept entries of an epoch as one sequence: how many there are, and which stand at given places.

Three shapes of data. Samples in shards: the shards in a permuted order, their kept counts, the rows decided again
when they are wanted. A mixed pool: its kept entries, listed. Map-style: one bit per sample, since its order jumps
over the whole of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.selection import Selection

__all__ = ["Entries", "Kept", "KeptPool", "KeptSamples", "KeptShards"]

_CHUNK = 1 << 20  # samples decided at once while counting: bounds memory
_BLOCK = 1 << 8  # samples between the running counts of `KeptSamples`
_LOOKUP = 1 << 12  # places that `KeptSamples` looks up at once: bounds memory


@dataclass(frozen=True, slots=True)
class Entries:
    """A run of entries of a plan.

    index: int64[k], sample indices. weight: float32[k], 1 / keep probability, 0 for filled-up entries.
    record: bool[k], whether the entry's loss becomes the sample's score.
    """

    index: NDArray[np.int64]
    weight: NDArray[np.float32]
    record: NDArray[np.bool_]

    def take(self, places: slice | NDArray[np.int64]) -> "Entries":
        """The entries at ``places``."""
        return Entries(self.index[places], self.weight[places], self.record[places])

    @staticmethod
    def join(parts: Sequence["Entries"]) -> "Entries":
        """The parts one after the other."""
        if not parts:
            return Entries(np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.bool_))
        if len(parts) == 1:
            return parts[0]
        return Entries(
            np.concatenate([part.index for part in parts]),
            np.concatenate([part.weight for part in parts]),
            np.concatenate([part.record for part in parts]),
        )


class Kept(Protocol):
    """The kept entries of an epoch, at the places 0..size-1."""

    size: int

    def span(self, start: int, stop: int) -> Entries:
        """The entries at start..stop-1."""


def _weigh(selection: Selection, index: NDArray[np.int64]) -> Entries:
    return Entries(index, selection.weight(index), np.ones(index.size, dtype=np.bool_))


class KeptShards:
    """Kept samples shard by shard, in ``order`` (int64[S], a permutation of the shards). O(S) memory.

    sizes: int64[S], samples per shard in the order of their indices.
    """

    def __init__(self, selection: Selection, sizes: NDArray[np.int64], order: NDArray[np.int64]) -> None:
        self._selection = selection
        self._order = order
        self._bounds = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._ends = np.cumsum(_count(selection, self._bounds)[order])
        self.size = int(self._ends[-1])

    def span(self, start: int, stop: int) -> Entries:
        """The entries at start..stop-1."""
        parts = []
        place = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            shard = self._order[place]
            low, high = int(self._bounds[shard]), int(self._bounds[shard + 1])
            first = int(self._ends[place - 1]) if place else 0
            rows = low + np.flatnonzero(self._selection.keep(low, high))
            parts.append(rows[start - first : stop - first])
            start = max(start, min(stop, int(self._ends[place])))
            place += 1
        return _weigh(self._selection, np.concatenate([np.empty(0, np.int64), *parts]))


def _count(selection: Selection, bounds: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many samples are kept in each of the ranges bounds[i]..bounds[i+1]-1: int64[S]."""
    sizes = np.diff(bounds)
    if selection.keeps_all:
        return sizes
    counts = np.zeros(sizes.size, dtype=np.int64)
    filled = np.flatnonzero(sizes)  # reduceat cannot sum an empty range
    lows, highs = bounds[filled], bounds[filled + 1]
    for start in range(0, selection.num_samples, _CHUNK):
        stop = min(start + _CHUNK, selection.num_samples)
        first = int(np.searchsorted(highs, start, side="right"))
        last = int(np.searchsorted(lows, stop, side="left"))
        starts = np.maximum(lows[first:last], start) - start
        counts[filled[first:last]] += np.add.reduceat(selection.keep(start, stop), starts, dtype=np.int64)
    return counts


class KeptPool:
    """Kept entries of a mixed pool, unit by unit, in ``order``. O(P + N) memory.

    The decision is per sample, so all repeats of a sample share it; only the first of them in the pool records.

    index: int64[P], with repeats. units: int64[U], entries per unit. order: int64[U], a permutation.
    """

    def __init__(
        self,
        selection: Selection,
        index: NDArray[np.int64],
        units: NDArray[np.int64],
        order: NDArray[np.int64],
    ) -> None:
        kept = np.concatenate([
            selection.keep(start, min(start + _CHUNK, selection.num_samples))
            for start in range(0, selection.num_samples, _CHUNK)
        ])  # fmt: skip
        first = np.zeros(index.size, dtype=np.bool_)
        first[np.unique(index, return_index=True)[1]] = True
        ends = np.cumsum(units)
        runs = [np.arange(ends[unit] - units[unit], ends[unit]) for unit in order]
        places = np.concatenate(runs)
        places = places[kept[index[places]]]
        self._selection = selection
        self._index, self._first = index[places], first[places]
        self.size = int(places.size)

    def span(self, start: int, stop: int) -> Entries:
        """The entries at start..stop-1."""
        index = self._index[start:stop]
        return Entries(index, self._selection.weight(index), self._first[start:stop])


class KeptSamples:
    """Kept samples in the order of their indices, found by their number. N bits of memory, none if all are kept."""

    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self.size = selection.num_samples
        if selection.keeps_all:
            return
        count = selection.num_samples
        bits = np.zeros(-(-count // _BLOCK) * _BLOCK // 8, dtype=np.uint8)
        for start in range(0, count, _CHUNK):
            packed = np.packbits(selection.keep(start, min(start + _CHUNK, count)))
            bits[start // 8 : start // 8 + packed.size] = packed
        self._blocks = bits.reshape(-1, _BLOCK // 8)
        self._ends = np.cumsum(np.bitwise_count(self._blocks).sum(axis=1, dtype=np.int64))
        self.size = int(self._ends[-1])

    def span(self, start: int, stop: int) -> Entries:
        """The entries at start..stop-1."""
        return self.at(np.arange(start, stop, dtype=np.int64))

    def at(self, places: NDArray[np.int64]) -> Entries:
        """The entries at ``places``, int64[k], in that order."""
        if not self._selection.keeps_all:
            runs = range(0, places.size, _LOOKUP)
            found = [self._find(places[run : run + _LOOKUP]) for run in runs]
            places = np.concatenate([np.empty(0, np.int64), *found])
        return _weigh(self._selection, places)

    def _find(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        block = np.searchsorted(self._ends, places, side="right")
        before = np.where(block > 0, self._ends[block - 1], 0)
        running = np.cumsum(np.unpackbits(self._blocks[block], axis=1), axis=1, dtype=np.int16)
        # The bit where the running count first passes the number of kept samples before it in the block.
        found: NDArray[np.int64] = block * _BLOCK + np.argmax(running > (places - before)[:, None], axis=1)
        return found
