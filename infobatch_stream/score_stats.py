"""What a policy sees of the scores: count, mean, largest, exact quantiles, a tally; in bounded memory."""

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["Summary", "share_known", "upper_halves"]

# The mean is summed over these fixed chunks and combined exactly, so it does not depend on who sums it.
_CHUNK = 1 << 17

_COUNTED: Final = 1 << 19  # scores counted at once: many, since each time 2^16 counts are made
_SOUGHT: Final = 1 << 16  # scores among which some are sought at once: few, so that the memory is used again

_DIGITS: Final = 1 << 16  # values of half of a float32's bits
_NEGATIVE: Final = 1 << 15  # upper halves from here on have the sign bit, and grow as the floats fall
_ASCENDING: Final = np.concatenate([np.arange(_DIGITS - 1, _NEGATIVE - 1, -1), np.arange(_NEGATIVE)])


class Summary:
    """Facts about scores, the same on every rank that has the same scores.

    They are computed in passes over chunks of 2^17. A score that is infinite was never recorded: a bit flipped on the
    disk. It counts as never seen.

    Args:
        scores: float32[N], NaN = never seen.
        pool: int64[P], the samples of a mixed epoch, with repeats; only the tally is of these.
        include: bool[N], the samples that count; None: all.

    Attributes:
        scores: float32[N], as given; a copy with NaN for what was infinite, if there was any.
        infinite: How many were infinite.
        count: How many samples have a score.
        mean: Mean of those scores, not above the largest; NaN when there is none.
    """

    def __init__(
        self,
        scores: NDArray[np.float32],
        pool: NDArray[np.int64] | None = None,
        include: NDArray[np.bool_] | None = None,
    ) -> None:
        self.scores = scores
        self._pool, self._include = pool, include
        self.count = self.infinite = self._samples = 0
        sums: list[float] = []
        wide = np.empty(min(_CHUNK, scores.size), dtype=np.float64)
        for chunk in self._chunks(_CHUNK):
            total, seen, infinite = _total(chunk, wide)
            sums.append(total)
            self._samples += chunk.size
            self.count += seen
            self.infinite += infinite
        self.mean = math.fsum(sums) / self.count if self.count else math.nan
        if self.infinite:
            self.scores = np.where(np.isinf(scores), np.float32(np.nan), scores)
        # A mean above the largest score is a rounding error; it would put equal scores below their own mean. That can
        # only be where the mean is all but a float32, which is rare, so most often the largest is not looked for.
        if abs(self.mean - float(np.float32(self.mean))) <= abs(self.mean) * 2**-48:
            self.mean = min(self.mean, self.largest)

    @cached_property
    def largest(self) -> float:
        """The largest score; NaN when there is none."""
        return max((float(chunk.max()) for chunk in self._seen(_CHUNK) if chunk.size), default=math.nan)

    def tally(self) -> tuple[NDArray[np.int64], int]:
        """How often each upper half of a score's bits occurs among the entries of the epoch.

        Returns:
            int64[2^16], by the half as a number, so one for each value that a bfloat16 can have; and how many entries
            have no score, which are not counted.
        """
        pool = self._pool
        if pool is None:
            counts = _count_uppers(self._seen(_COUNTED))
            return counts, self._samples - int(counts.sum())
        parts = (pool[start : start + _COUNTED] for start in range(0, pool.size, _COUNTED))
        counts = _count_uppers(_numbers(self.scores[part]) for part in parts)
        return counts, pool.size - int(counts.sum())

    def quantiles(self, shares: Sequence[float]) -> list[float]:
        """Exact quantiles: at most a share q of the scores lies below that of q.

        Two radix passes over the bits of the floats: counts of their upper halves, then of the lower halves of those
        that have a wanted upper one.

        Args:
            shares: Each a q in [0, 1].

        Returns:
            For each, the score at rank floor(q * count) of the sorted scores.

        Raises:
            ValueError: When no sample has a score.
        """
        if not self.count:
            raise ValueError("no sample has a score yet, so there are no quantiles")
        counts = _count_uppers(self._seen(_COUNTED))[_ASCENDING]
        ends = np.cumsum(counts)
        ranks = [min(math.floor(q * self.count), self.count - 1) for q in shares]
        places = [int(ends.searchsorted(rank, "right")) for rank in ranks]
        lowers = self._count_lowers({int(_ASCENDING[place]) for place in places})
        values = []
        for rank, place in zip(ranks, places, strict=True):
            upper, rest = int(_ASCENDING[place]), rank - int(ends[place] - counts[place])
            if upper < _NEGATIVE:
                lower = int(np.cumsum(lowers[upper]).searchsorted(rest, "right"))
            else:
                lower = _DIGITS - 1 - int(np.cumsum(lowers[upper][::-1]).searchsorted(rest, "right"))
            values.append(_score_of(upper, lower))
        return values

    def rank(self, score: float) -> tuple[int, int]:
        """How many scores are below ``score``, and how many equal it."""
        pairs = [(np.count_nonzero(chunk < score), np.count_nonzero(chunk == score)) for chunk in self._chunks(_CHUNK)]
        return sum(below for below, _ in pairs), sum(equal for _, equal in pairs)

    def _chunks(self, size: int) -> Iterator[NDArray[np.float32]]:
        """The scores that count, those of at most ``size`` samples at once."""
        for start in range(0, self.scores.size, size):
            chunk = self.scores[start : start + size]
            yield chunk if self._include is None else chunk[self._include[start : start + size]]

    def _seen(self, size: int) -> Iterator[NDArray[np.float32]]:
        return map(_numbers, self._chunks(size))

    def _count_lowers(self, uppers: set[int]) -> dict[int, NDArray[np.int64]]:
        """For each of ``uppers``: how often each lower half occurs with it, int64[2^16]."""
        counts = {upper: np.zeros(_DIGITS, dtype=np.int64) for upper in uppers}
        for seen in self._seen(_SOUGHT):
            bits = _bits(seen)
            halves = (bits >> np.uint32(16)).astype(np.uint16)
            for upper in uppers:
                chosen = np.flatnonzero(halves == upper)
                np.add.at(counts[upper], bits[chosen] & np.uint32(_DIGITS - 1), 1)
        return counts


def _total(chunk: NDArray[np.float32], wide: NDArray[np.float64]) -> tuple[float, int, int]:
    """The sum of the scores of a chunk, how many these are, and how many are infinite. wide: memory for them."""
    values = wide[: chunk.size]
    np.copyto(values, chunk)
    with np.errstate(invalid="ignore"):  # of two infinities
        total = float(np.add.reduce(values))
    if math.isfinite(total):
        return total, chunk.size, 0
    unseen, infinite = np.isnan(chunk), np.isinf(chunk[:0])
    np.copyto(values, 0, where=unseen)
    with np.errstate(invalid="ignore"):
        total = float(np.add.reduce(values))
    if not math.isfinite(total):
        infinite = np.isinf(chunk)
        unseen |= infinite
        np.copyto(values, 0, where=infinite)
        total = float(np.add.reduce(values))
    return total, chunk.size - int(np.count_nonzero(unseen)), int(np.count_nonzero(infinite))


def _numbers(chunk: NDArray[np.float32]) -> NDArray[np.float32]:
    """What is a number in ``chunk``."""
    unseen = np.isnan(chunk)
    return chunk[~unseen] if unseen.any() else chunk


def _count_uppers(chunks: Iterable[NDArray[np.float32]]) -> NDArray[np.int64]:
    """How often each upper half of a score's bits occurs in ``chunks`` of at most 2^19 numbers: int64[2^16]."""
    counts = np.zeros(_DIGITS, dtype=np.int64)
    place = np.empty(0, dtype=np.intp)
    for seen in chunks:
        if place.size < seen.size:
            place = np.empty(seen.size, dtype=np.intp)
        np.right_shift(_bits(seen), 16, out=place[: seen.size], casting="unsafe")
        counts += np.bincount(place[: seen.size], minlength=_DIGITS)
    return counts


def share_known(scores: NDArray[np.float32], include: NDArray[np.bool_] | None = None) -> float:
    """Share of the samples (those of ``include``, bool[N]) that have a score, of ``scores``, float32[N]."""
    known = total = 0
    for start in range(0, scores.size, _COUNTED):
        chunk = scores[start : start + _COUNTED]
        if include is not None:
            chunk = chunk[include[start : start + _COUNTED]]
        known += int(np.count_nonzero(np.isfinite(chunk)))
        total += chunk.size
    return known / total if total else 0.0


def upper_halves(scores: NDArray[np.float32]) -> NDArray[np.uint32]:
    """uint32[n]: the upper halves of the bits of ``scores``, by which `Summary.tally` counts."""
    return _bits(scores) >> np.uint32(16)


def _bits(scores: NDArray[np.float32]) -> NDArray[np.uint32]:
    return np.ascontiguousarray(scores).view(np.uint32)


def _score_of(upper: int, lower: int) -> float:
    return float(np.array(upper << 16 | lower, dtype=np.uint32).view(np.float32))
