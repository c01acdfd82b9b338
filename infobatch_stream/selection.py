"""Which samples an epoch keeps, and with which weight; for any range, by anyone, at any time.

Sample i is kept when a 16-bit uniform drawn for (seed, epoch, i) is under its keep probability, and then weighs
1 / probability. Probabilities are whole multiples of 2^-16, so the two agree exactly. Pure: nothing is stored.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.draws import draw16
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
        self._rule = rule
        self._seed = seed
        self._epoch = epoch

    def _chance(self, scores: NDArray[np.float32]) -> NDArray[np.uint32]:
        """Keep probability in units of 2^-16, uint32[n] in 0..2^16."""
        assert self._rule is not None
        new = np.isnan(scores)
        chance: NDArray[np.uint32] = np.rint(self._rule(np.where(new, np.float32(0), scores)) * _ONE).astype(np.uint32)
        chance[new] = _ONE
        return chance

    def keep(self, start: int, stop: int) -> NDArray[np.bool_]:
        """bool[stop - start]: which of the samples start..stop-1 are kept."""
        if self.keeps_all:
            return np.ones(stop - start, dtype=np.bool_)
        return draw16(self._seed, self._epoch, start, stop) < self._chance(self._scores[start:stop])

    def weight(self, index: NDArray[np.int64]) -> NDArray[np.float32]:
        """float32[k]: 1 / keep probability of the kept samples ``index``, int64[k]."""
        if self.keeps_all:
            return np.ones(index.size, dtype=np.float32)
        return (_ONE / self._chance(self._scores[index])).astype(np.float32)
