"""What a policy sees of the scores: count, mean, largest, exact quantiles; in bounded memory."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

__all__ = ["Summary"]

# The mean is summed over these fixed chunks and combined exactly, so it does not depend on who sums it.
_CHUNK = 1 << 17


class Summary:
    """Facts about ``scores`` (float32[N], NaN = never seen), computed in passes over chunks of 2^17.

    Deterministic: equal scores give equal facts on every rank.

    Attributes:
        count: how many samples have a score.
        mean: float, mean of those scores, not above the largest; NaN when there is none.
    """

    def __init__(self, scores: NDArray[np.float32]) -> None:
        self._scores = scores
        self.count = 0
        sums: list[float] = []
        wide = np.empty(min(_CHUNK, scores.size), dtype=np.float64)
        for start in range(0, scores.size, _CHUNK):
            chunk = scores[start : start + _CHUNK]
            values = wide[: chunk.size]
            np.copyto(values, chunk)
            total, seen = float(np.add.reduce(values)), chunk.size
            if math.isnan(total):
                unseen = np.isnan(chunk)
                np.copyto(values, 0, where=unseen)
                total, seen = float(np.add.reduce(values)), chunk.size - int(np.count_nonzero(unseen))
            sums.append(total)
            self.count += seen
        self.mean = math.fsum(sums) / self.count if self.count else math.nan
        # A mean above the largest score is a rounding error; it would put equal scores below their own mean. That can
        # only be where the mean is all but a float32, which is rare, so most often the largest is not looked for.
        if abs(self.mean - float(np.float32(self.mean))) <= abs(self.mean) * 2**-48:
            self.mean = min(self.mean, self.largest)

    @cached_property
    def largest(self) -> float:
        """The largest score; NaN when there is none."""
        return max((float(chunk.max()) for chunk in self._chunks() if chunk.size), default=math.nan)

    def _chunks(self) -> Iterator[NDArray[np.float32]]:
        for start in range(0, self._scores.size, _CHUNK):
            chunk = self._scores[start : start + _CHUNK]
            unseen = np.isnan(chunk)
            yield chunk[~unseen] if unseen.any() else chunk

    def quantiles(self, shares: Sequence[float]) -> list[float]:
        """For each share q in [0, 1]: the score at rank floor(q * count) of the sorted scores, exactly.

        At most a share q of the scores lies below it. Two radix passes of 2^16 counts each, over the bits of
        the floats in the order of their values. Raises ValueError when no sample has a score.
        """
        if not self.count:
            raise ValueError("no sample has a score yet, so there are no quantiles")
        ranks = [min(math.floor(q * self.count), self.count - 1) for q in shares]
        high = self._count(_high_digit)
        ends = np.cumsum(high)
        bins = [int(np.searchsorted(ends, rank, side="right")) for rank in ranks]
        low = {top: self._count(partial(_low_digit, top)) for top in set(bins)}
        values = []
        for rank, top in zip(ranks, bins, strict=True):
            before = int(ends[top]) - int(high[top])
            rest = int(np.searchsorted(np.cumsum(low[top]), rank - before, side="right"))
            values.append(_score_of(top << 16 | rest))
        return values

    def _count(self, digit: Callable[[NDArray[np.uint32]], NDArray[np.uint32]]) -> NDArray[np.int64]:
        """How often each value of a 16-bit digit of the sort keys occurs: int64[2^16]."""
        counts = np.zeros(1 << 16, dtype=np.int64)
        for seen in self._chunks():
            counts += np.bincount(digit(_sort_key(seen)), minlength=1 << 16)
        return counts


def _high_digit(keys: NDArray[np.uint32]) -> NDArray[np.uint32]:
    digit: NDArray[np.uint32] = (keys >> 16).astype(np.uint32, copy=False)
    return digit


def _low_digit(top: int, keys: NDArray[np.uint32]) -> NDArray[np.uint32]:
    digit: NDArray[np.uint32] = keys[keys >> 16 == top] & np.uint32(0xFFFF)
    return digit


def _sort_key(scores: NDArray[np.float32]) -> NDArray[np.uint32]:
    """uint32 keys that sort as the floats do: the sign bit set for positive floats, all bits flipped else."""
    bits = (scores + np.float32(0)).view(np.uint32)  # + 0 makes -0.0 equal to 0.0
    flip = np.where(bits >> 31 != 0, np.uint32(0xFFFFFFFF), np.uint32(0x80000000))
    keys: NDArray[np.uint32] = bits ^ flip
    return keys


def _score_of(key: int) -> float:
    bits = key ^ (0x80000000 if key >> 31 else 0xFFFFFFFF)
    return float(np.array(bits, dtype=np.uint32).view(np.float32))
