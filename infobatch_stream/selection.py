"""Which samples an epoch keeps, and with which weight; for any range, by anyone, at any time.

Sample i is kept when a 16-bit uniform drawn for (seed, epoch, i) is under its keep probability, and then weighs
1 / probability. Probabilities are whole multiples of 2^-16, so the two agree exactly. Pure: nothing is stored.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.draws import Draws, Purpose
from infobatch_stream.policies import Rule, StepRule

__all__ = ["Selection"]

_ONE: Final = 1 << 16


class Selection:
    """The decision of one epoch about every sample.

    scores: float32[N], committed scores, NaN = never seen (always kept, weight 1); not copied, and not to change
    while the selection is used. rule: of a policy; None keeps everything.
    """

    def __init__(self, scores: NDArray[np.float32], rule: Rule | None, seed: int, epoch: int) -> None:
        self.num_samples = int(scores.size)
        self.keeps_all = rule is None or (isinstance(rule, StepRule) and set(rule.keep) == {1.0})
        self._scores = scores
        self._rule: Rule = StepRule((), (1.0,)) if rule is None else rule
        self._bands = self._rule.descending if isinstance(self._rule, StepRule) else []
        self._draws = Draws(seed, epoch, Purpose.SELECT)

    def keep(self, start: int, stop: int) -> NDArray[np.bool_]:
        """bool[stop - start]: which of the samples start..stop-1 are kept."""
        if self.keeps_all:
            return np.ones(stop - start, dtype=np.bool_)
        return self._decide(self._scores[start:stop], self._draws.of16(start, stop))

    def choose(self, ranges: Sequence[tuple[int, int]]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The kept samples of each range start..stop-1, one range after the other: index int64[k], weight float32[k].

        One call for many short ranges (shards) costs far less than a call for each.
        """
        index = np.concatenate([np.arange(*span, dtype=np.int64) for span in ranges])
        if self.keeps_all:
            return index, np.ones(index.size, dtype=np.float32)
        scores = np.concatenate([self._scores[slice(*span)] for span in ranges])
        draws = np.concatenate([self._draws.of16(*span) for span in ranges])
        kept = np.flatnonzero(self._decide(scores, draws))
        return index[kept], self._weigh(scores[kept])

    def weight(self, index: NDArray[np.int64]) -> NDArray[np.float32]:
        """float32[k]: 1 / keep probability of the kept samples ``index``, int64[k]."""
        if self.keeps_all:
            return np.ones(index.size, dtype=np.float32)
        return self._weigh(self._scores[index])

    def _decide(self, scores: NDArray[np.float32], draws: NDArray[np.uint16]) -> NDArray[np.bool_]:
        if not isinstance(self._rule, StepRule):
            return draws < self._units(scores)
        top = self._rule.keep[-1]
        kept = _under(draws, top)
        if top < 1:
            kept |= np.isnan(scores)
        for edge, keep in self._bands:
            kept ^= (kept ^ _under(draws, keep)) & (scores < edge)  # below the edge, by its own probability
        return kept

    def _weigh(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        if not isinstance(self._rule, StepRule):
            return (_ONE / self._units(scores)).astype(np.float32)
        top = self._rule.keep[-1]
        weight = np.full(scores.size, _weight(top))
        if top < 1:
            np.copyto(weight, 1, where=np.isnan(scores))
        for edge, keep in self._bands:
            np.copyto(weight, _weight(keep), where=scores < edge)
        return weight

    def _units(self, scores: NDArray[np.float32]) -> NDArray[np.uint32]:
        """Keep probabilities in units of 2^-16, uint32[n] in 0..2^16."""
        new = np.isnan(scores)
        units: NDArray[np.uint32] = np.rint(self._rule(np.where(new, np.float32(0), scores)) * _ONE).astype(np.uint32)
        units[new] = _ONE
        return units


def _under(draws: NDArray[np.uint16], keep: float) -> NDArray[np.bool_]:
    """bool[n]: which draws are under ``keep``, in units of 2^-16."""
    unit = round(keep * _ONE)
    return np.ones(draws.size, dtype=np.bool_) if unit == _ONE else draws < np.uint16(unit)


def _weight(keep: float) -> np.float32:
    """1 / ``keep``, as it is drawn against; 0 for what is never kept."""
    unit = round(keep * _ONE)
    return np.float32(_ONE / unit if unit else 0)
