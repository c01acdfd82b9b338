"""Which samples are worth a look: the hardest, the easiest, the most unstable, and those that were never learned."""

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.report.loss_history import Losses
from infobatch_stream.score_stats import Summary
from infobatch_stream.store.history import Training

__all__ = ["Gallery", "Highest", "choose"]

_BLOCK: Final = 1 << 20
_TOP: Final = 0.05  # share of the samples that count as not learned
_OFTEN: Final = 0.75  # share of the epochs in which they must have been trained on
_LEAST: Final = 3  # times; and losses of which a spread says something


@dataclass(frozen=True)
class Gallery:
    """Samples of one kind, the most extreme first. index: int64[k]; meaning: what they have in common."""

    kind: str
    title: str
    meaning: str
    index: NDArray[np.int64]


class Highest:
    """The ``count`` samples with the highest values of all that were added; of equal ones those that came first.

    index: int64[k], the highest first. Samples whose value is NaN are left out.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._values = np.empty(0)
        self.index = np.empty(0, np.int64)

    def add(self, start: int, values: NDArray[np.floating[Any]]) -> None:
        """Values of the samples from ``start`` on, which come after those that were added before."""
        found = np.flatnonzero(~np.isnan(values))
        if found.size > self._count:
            least = np.partition(values[found], found.size - self._count)[found.size - self._count]
            above, equal = found[values[found] > least], found[values[found] == least]
            found = np.sort(np.concatenate([above, equal[: self._count - above.size]]))
        both = np.concatenate([self._values, values[found].astype(np.float64)])
        order = np.argsort(-both, kind="stable")[: self._count]
        self._values = both[order]
        self.index = np.concatenate([self.index, found + start])[order]


def choose(
    scores: NDArray[np.float32], epoch: int, training: Training | None, losses: Losses | None, count: int
) -> list[Gallery]:
    """Galleries of ``count`` samples at most; those that are empty are left out.

    scores: float32[N] that the first ``epoch`` epochs left. Raises StoreError for losses that cannot be read.
    """
    summary = Summary(scores)
    if not summary.count:
        return []
    counted = 0 if training is None else epoch - training.since
    least = max(_LEAST, math.ceil(_OFTEN * counted))
    edge = summary.quantiles([1 - _TOP])[0]

    def not_learned(part: slice, values: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
        assert training is not None
        stuck = (scores[part] >= edge) & (scores[part] > summary.mean) & (training.times[part] >= least)
        return np.where(stuck, values, np.nan)

    hardest, easiest, unstable, unlearned = (Highest(count) for _ in range(4))
    for start in range(0, scores.size, _BLOCK):
        part = slice(start, min(start + _BLOCK, scores.size))
        hardest.add(start, scores[part])
        easiest.add(start, -scores[part])
        if training is not None and losses is None:
            unlearned.add(start, not_learned(part, scores[part]))
    for found in losses.moments() if losses else ():
        unstable.add(found.start, np.where(found.times >= _LEAST, found.spread, np.nan))
        if training is not None:
            unlearned.add(found.start, not_learned(slice(found.start, found.start + found.times.size), found.lowest))
    order = "Those whose lowest loss so far is the highest come first." if losses else "The highest score comes first."
    galleries = [
        Gallery("hardest", "Hardest", "The highest scores.", hardest.index),
        Gallery("easiest", "Easiest", "The lowest scores.", easiest.index),
        Gallery(
            "unstable",
            "Most unstable",
            f"The largest standard deviation of the recorded losses, among samples with {_LEAST} of them or more.",
            unstable.index,
        ),
        Gallery(
            "unlearned",
            "Never learned",
            f"Still in the highest {100 * _TOP:g} % of the scores, though trained on {least} times or more, in "
            f"{counted} epochs that were counted ({100 * _OFTEN:g} % of them, {_LEAST} at least). {order}",
            unlearned.index,
        ),
    ]
    return [gallery for gallery in galleries if gallery.index.size]
