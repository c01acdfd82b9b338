"""Which samples an epoch keeps, and with which weight; for any range, by anyone, at any time.

Sample i is kept when a 16-bit uniform drawn for (seed, epoch, i) is under its keep probability, and then weighs
1 / probability. Probabilities are whole multiples of 2^-16, so the two agree exactly. Pure: nothing is stored.

Drawing is most of the work of planning. The two bytes of the uniform come from draws of their own, and the lower one
is left out where it decides nothing: where all probabilities are multiples of 2^-8, as 1/2 and 1/4 are.
"""

from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.planning.rng import Draws, Purpose
from infobatch_stream.policies.base import Rule, StepRule, keep_probabilities
from infobatch_stream.policies.budget import TableRule
from infobatch_stream.score_stats import upper_halves

__all__ = ["Selection"]

_ONE: Final = 1 << 16
# Samples decided at once: arrays of a few 100 KB are used again and again by the allocator, larger ones are fetched
# from the system each time, which takes longer than filling them.
_GROUP: Final = 1 << 15


class Selection:
    """The decision of one epoch about every sample.

    scores: float32[N], committed scores, NaN = never seen (always kept, weight 1, unless the rule knows of it); not
    copied, and not to change while the selection is used. rule: of a policy; None keeps everything. include: bool[N],
    which samples may be kept; None: all.
    """

    def __init__(
        self,
        scores: NDArray[np.float32],
        rule: Rule | None,
        seed: int,
        epoch: int,
        include: NDArray[np.bool_] | None = None,
    ) -> None:
        self.num_samples = int(scores.size)
        self._include = include
        self.keeps_all = rule is None or (isinstance(rule, StepRule) and {*rule.keep, rule.unseen} == {1.0})
        self._scores = scores
        self._rule: Rule = StepRule((), (1.0,)) if rule is None else rule
        self._bands = self._rule.descending if isinstance(self._rule, StepRule) else []
        if isinstance(self._rule, StepRule):
            chances = (self._rule.keep[-1], *(keep for _, keep in self._bands), self._rule.unseen)
            self._weights = np.array([_weight(keep) for keep in chances])
            if not self._rule.rescale:
                np.minimum(self._weights, 1, out=self._weights)
        if isinstance(self._rule, TableRule):  # the same in half of the room, and inverted
            self.keeps_all = bool((self._rule.units == _ONE).all())
            self._last = (self._rule.units - 1).astype(np.uint16)
            self._inverse = (_ONE / self._rule.units).astype(np.float32)
        self.keeps_all &= include is None
        self._upper, self._lower = (Draws(seed, epoch, half) for half in (Purpose.SELECT, Purpose.SELECT_FINELY))
        coarse = isinstance(self._rule, StepRule) and not any(round(p * _ONE) % 256 for p in chances)
        self._bits = 8 if coarse else 16

    def keep(self, start: int, stop: int) -> NDArray[np.bool_]:
        """bool[stop - start]: which of the samples start..stop-1 are kept."""
        if self.keeps_all:
            return np.ones(stop - start, dtype=np.bool_)
        draws: NDArray[Any] = self._upper.of8(start, stop)
        if self._bits == 16:
            draws = _joined(draws, self._lower.of8(start, stop))
        kept = self._decide(self._scores[start:stop], draws)
        return kept if self._include is None else kept & self._include[start:stop]

    def choose(
        self, lows: NDArray[np.int64], highs: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The kept samples of the ranges low..high-1, one range after the other: index int64[k], weight float32[k].

        lows, highs: int64[r], r at least 1. One call for many short ranges (shards) costs far less than one for each.
        """
        ends = np.cumsum(highs - lows)
        cuts = [0, *(np.flatnonzero(np.diff(ends // _GROUP)) + 1).tolist(), ends.size]
        parts = [self._choose(lows[start:stop], highs[start:stop]) for start, stop in pairwise(cuts)]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([index for index, _ in parts]), np.concatenate([weight for _, weight in parts])

    def _choose(
        self, lows: NDArray[np.int64], highs: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        sizes = highs - lows
        shift = np.repeat(lows - (np.cumsum(sizes) - sizes), sizes)  # from a place in this group to an index
        if self.keeps_all:
            index = np.arange(shift.size, dtype=np.int64) + shift
            return index, np.ones(index.size, dtype=np.float32)
        ranges = list(zip(lows.tolist(), highs.tolist(), strict=True))
        scores = np.concatenate([self._scores[low:high] for low, high in ranges])
        draws: NDArray[Any] = self._upper.of8_in(lows, highs)
        if self._bits == 16:
            draws = _joined(draws, self._lower.of8_in(lows, highs))
        chosen = self._decide(scores, draws)
        if self._include is not None:
            chosen &= np.concatenate([self._include[low:high] for low, high in ranges])
        kept = np.flatnonzero(chosen)
        return kept + shift[kept], self._weigh(scores[kept])

    def weight(self, index: NDArray[np.int64]) -> NDArray[np.float32]:
        """float32[k]: 1 / keep probability of the kept samples ``index``, int64[k]."""
        if self.keeps_all:
            return np.ones(index.size, dtype=np.float32)
        return self._weigh(self._scores[index])

    def _decide(self, scores: NDArray[np.float32], draws: NDArray[Any]) -> NDArray[np.bool_]:
        chosen: NDArray[np.bool_]
        if isinstance(self._rule, TableRule):
            chosen = draws <= self._last[upper_halves(scores)]
            return chosen
        if not isinstance(self._rule, StepRule):
            chosen = draws < self._units(scores)
            return chosen
        top = self._rule.keep[-1]
        kept = self._under(draws, top)
        if top != self._rule.unseen:
            kept ^= (kept ^ self._under(draws, self._rule.unseen)) & np.isnan(scores)
        for edge, keep in self._bands:
            kept ^= (kept ^ self._under(draws, keep)) & (scores < edge)  # below the edge, by its own probability
        return kept

    def _under(self, draws: NDArray[Any], keep: float) -> NDArray[np.bool_]:
        """bool[k]: which draws are under ``keep``."""
        unit = round(keep * _ONE) >> (16 - self._bits)
        return np.ones(draws.size, dtype=np.bool_) if unit >> self._bits else draws < draws.dtype.type(unit)

    def _weigh(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        weight: NDArray[np.float32]
        if isinstance(self._rule, TableRule):
            weight = self._inverse[upper_halves(scores)]
            return weight
        if not isinstance(self._rule, StepRule):
            return (_ONE / self._units(scores)).astype(np.float32)
        band = np.zeros(scores.size, dtype=np.min_scalar_type(len(self._bands)))  # how many edges a score is below
        for edge, _ in self._bands:
            band += scores < edge
        weight = self._weights[band]
        if self._rule.keep[-1] != self._rule.unseen:
            np.copyto(weight, self._weights[-1], where=np.isnan(scores))
        return weight

    def _units(self, scores: NDArray[np.float32]) -> NDArray[np.uint32]:
        """Keep probabilities in units of 2^-16, uint32[n] in 0..2^16."""
        new = np.isnan(scores)
        chance = keep_probabilities(self._rule, np.where(new, np.float32(0), scores))
        units: NDArray[np.uint32] = np.rint(chance * _ONE).astype(np.uint32)
        units[new] = _ONE
        return units


def _joined(upper: NDArray[np.uint8], lower: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """uint16[k] of their upper and lower bytes."""
    joined = upper.astype(np.uint16)
    joined <<= 8
    joined |= lower
    return joined


def _weight(keep: float) -> np.float32:
    """1 / ``keep``, as it is drawn against; 0 for what is never kept."""
    unit = round(keep * _ONE)
    return np.float32(_ONE / unit if unit else 0)
