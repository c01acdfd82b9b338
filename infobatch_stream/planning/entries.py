"""The kept entries of an epoch as one sequence: how many there are, and which stand at given places.

Three shapes of data. Samples in shards: the shards in a permuted order, their kept counts, the rows decided again
when they are wanted. A mixed pool: its kept entries, listed. Map-style: one bit per sample, since its order jumps
over the whole of it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.planning._small_cache import SmallCache
from infobatch_stream.planning.bitset import Bits, count_before, pack
from infobatch_stream.planning.selection import Selection

__all__ = ["Entries", "KeptEntries", "KeptPool", "KeptSamples", "KeptShards"]

_CHUNK: Final = 1 << 17  # samples decided at once while counting: what that takes fits a processor's cache
_PIECE: Final = 1 << 16  # samples of a shard decided at once: bounds what a span costs when shards are large


@dataclass(slots=True)  # not frozen: that would triple the time to make one
class Entries:
    """A run of entries of a plan.

    index: int64[k], sample indices. weight: float32[k], 1 / keep probability, 0 for filled-up entries.
    record: bool[k], whether the entry's loss becomes the sample's score. sample_weight: float32[k], as users give it;
    plans have none.
    """

    index: NDArray[np.int64]
    weight: NDArray[np.float32]
    record: NDArray[np.bool_]
    sample_weight: NDArray[np.float32] | None = None

    def take(self, places: slice | NDArray[np.int64]) -> "Entries":
        """The entries at ``places``."""
        given = None if self.sample_weight is None else self.sample_weight[places]
        return Entries(self.index[places], self.weight[places], self.record[places], given)

    @staticmethod
    def join(parts: Sequence["Entries"], order: NDArray[np.int64] | None = None) -> "Entries":
        """The parts one after the other; then those at ``order``, if given."""
        if not parts:
            return Entries(np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.bool_))
        if len(parts) == 1:
            return parts[0] if order is None else parts[0].take(order)
        places = slice(None) if order is None else order
        return Entries(
            np.concatenate([part.index for part in parts])[places],
            np.concatenate([part.weight for part in parts])[places],
            np.concatenate([part.record for part in parts])[places],
        )


class KeptEntries(Protocol):
    """The kept entries of an epoch, at the places 0..size-1."""

    size: int

    def span(self, start: int, stop: int) -> Entries:
        """The entries at start..stop-1."""


def _weigh(selection: Selection, index: NDArray[np.int64]) -> Entries:
    return Entries(index, selection.weight(index), np.ones(index.size, dtype=np.bool_))


def _decided(selection: Selection) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """All decisions in chunks: (index of the first sample, bool[k])."""
    for start in range(0, selection.num_samples, _CHUNK):
        yield start, selection.keep(start, min(start + _CHUNK, selection.num_samples))


class KeptShards:
    """Kept samples shard by shard, in ``order`` (int64[S], a permutation of the shards). O(S + N / 2^16) memory.

    sizes: int64[S], samples per shard in the order of their indices.
    """

    def __init__(self, selection: Selection, sizes: NDArray[np.int64], order: NDArray[np.int64]) -> None:
        self._selection = selection
        bounds = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        lows, highs = _pieces(bounds[order], bounds[order + 1])
        counts = highs - lows
        if not selection.keeps_all:
            edges, place = np.unique(np.concatenate([lows, highs]), return_inverse=True)
            before = _count_before(selection, edges)[place]
            counts = before[lows.size :] - before[: lows.size]
        self._lows, self._highs, self._ends = lows, highs, np.cumsum(counts)
        self.size = int(self._ends[-1])
        self._single = SmallCache[int, tuple[NDArray[np.int64], NDArray[np.float32]]](2)

    def span(self, start: int, stop: int) -> Entries:
        """The entries at start..stop-1."""
        if start >= stop:
            return Entries.join([])
        first, last = (int(self._ends.searchsorted(place, side="right")) for place in (start, stop - 1))
        # A short span asks for the same piece again and again.
        index, weight = self._single.get(first, self._piece) if first == last else self._choose(first, last)
        before = int(self._ends[first - 1]) if first else 0
        part = slice(start - before, stop - before)
        return Entries(index[part], weight[part], np.ones(stop - start, dtype=np.bool_))

    def _piece(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        return self._choose(number, number)

    def _choose(self, first: int, last: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        return self._selection.choose(self._lows[first : last + 1], self._highs[first : last + 1])


def _pieces(lows: NDArray[np.int64], highs: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The ranges low..high-1 (int64[k] each) cut into pieces of at most 2^16, in order; empty ones stay."""
    parts = np.maximum(1, -(-(highs - lows) // _PIECE))
    number = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)  # of the piece within its range
    starts = np.repeat(lows, parts) + number * _PIECE
    return starts, np.minimum(starts + _PIECE, np.repeat(highs, parts))


def _count_before(selection: Selection, edges: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many of the samples before each of ``edges`` are kept: int64[k] for ascending int64[k] in 0..N."""
    counts = np.zeros(edges.size, dtype=np.int64)
    total, done = 0, 0
    for start, kept in _decided(selection):
        here = int(edges.searchsorted(start + kept.size, side="right"))
        within, count = count_before(pack(kept), edges[done:here] - start)
        counts[done:here] = total + within
        total, done = total + count, here
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
        kept = np.concatenate([part for _, part in _decided(selection)])
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
        if not selection.keeps_all:
            self._bits = Bits(selection.num_samples, ((start, pack(kept)) for start, kept in _decided(selection)))
            self.size = self._bits.count

    def span(self, start: int, stop: int) -> Entries:
        """The entries at start..stop-1."""
        return self.at(np.arange(start, stop, dtype=np.int64))

    def at(self, places: NDArray[np.int64]) -> Entries:
        """The entries at ``places``, int64[k], in that order."""
        return _weigh(self._selection, places if self._selection.keeps_all else self._bits.find(places))
