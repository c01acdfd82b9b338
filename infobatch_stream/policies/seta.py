"""SeTa: a window over clusters of losses that slides from easy to hard."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from infobatch_stream._validation import whole_number
from infobatch_stream.errors import ConfigError
from infobatch_stream.policies.base import Moment, Policy, StepRule, annealing_epoch, check_keep
from infobatch_stream.score_stats import Summary

__all__ = ["SetaPruning", "WindowPruning", "WindowRule"]


class WindowRule(StepRule):
    """Of three bands the middle one."""

    @property
    def threshold(self) -> float:
        """Where the middle band begins."""
        return self.edges[0]


@dataclass(frozen=True)
class WindowPruning:
    """Keep the share ``keep``, by chance, of ``window`` of the clusters; ``turn`` says at which these begin."""

    keep: float
    groups: int
    window: float
    turn: int
    prunes_always = True

    def rule(self, summary: Summary) -> StepRule:
        """``keep`` in the window, 0 outside, unweighted. What has no score is in every window."""
        if self.groups == 1 or not summary.count:
            return StepRule((), (self.keep,), self.keep, rescale=False)
        starts = _clusters(summary.tally()[0], self.groups)
        size = max(1, round(self.window * len(starts)))
        first = self.turn % (len(starts) - size + 1)
        edges = (starts[first], [*starts, math.inf][first + size])
        return WindowRule(edges, (0.0, self.keep, 0.0), self.keep, rescale=False)


def _clusters(counts: NDArray[np.int64], groups: int) -> list[float]:
    """The lowest score of each of at most ``groups`` clusters, ascending: k-means by Lloyd's steps.

    counts: int64[2^16], how often each upper half of a score's bits occurs. The same bits on every machine: roots are
    rounded correctly, and sums made in order.
    """
    counts[0] += counts[0x8000]  # -0.0 is 0.0
    counts[0x8000] = 0
    halves = np.flatnonzero(counts)
    halves = halves[np.argsort(_scores(halves, 0x8000))]
    lowest, middle = _scores(halves, np.where(halves >> 15, 0xFFFF, 0)), _scores(halves, 0x8000)
    many = counts[halves]
    number, total = np.append(0, np.cumsum(many)), np.append(0, np.cumsum(many * middle))
    # Of many clusters there are best as many as density^(1/3) says (Panter and Dite, "Quantization distortion in
    # pulse-count modulation with nonuniform spacing of levels", 1951). To begin with, density^(1/4) is near enough.
    width = np.diff(lowest, prepend=lowest[0])
    spread = np.cumsum(np.sqrt(np.sqrt(many * width) * width))
    places = np.arange(min(groups, halves.size) + 1)
    cuts = spread.searchsorted(places / places[-1] * spread[-1])
    cuts = np.minimum(np.maximum.accumulate(cuts - places), halves.size - places[-1]) + places  # none is empty
    for _ in range(300):
        before, centers = cuts, np.diff(total[cuts]) / np.diff(number[cuts])
        edges = middle.searchsorted((centers[1:] + centers[:-1]) / 2)
        cuts = np.unique(np.concatenate([[0], edges, [halves.size]]))  # without those that became empty
        if np.array_equal(cuts, before):
            break
    starts: list[float] = lowest[cuts[:-1]].tolist()
    return starts


def _scores(halves: NDArray[np.int64], lower: NDArray[np.int64] | int) -> NDArray[np.float64]:
    """float64[n] of the float32 with these upper halves and the lower half or halves ``lower``."""
    return (halves << 16 | lower).astype(np.uint32).view(np.float32).astype(np.float64)


@dataclass(frozen=True)
class SetaPruning:
    """SeTa (Zhou et al., CVPR 2025, arXiv 2503.13385): losses of middling size, by a window that slides to harder ones.

    For comparison. The gradient is not unbiased: losses outside the window are missing, and what is kept weighs 1. In
    every epoch a share ``ratio`` of the samples is dropped at random. The losses are put into ``groups`` clusters by
    k-means, and ``window`` of these are kept; each epoch the window begins one cluster higher, and after the highest at
    the lowest again. The first epoch and those from floor(delta * epochs) on only drop at random (partial annealing).

    Clusters are those of all scores, and not of the share that is not dropped; they are found from a histogram with
    steps of less than 1 % of the score. Fewer distinct losses than ``groups`` make fewer clusters. Samples without a
    score are in every window.

    Attributes:
        ratio: Share dropped at random, in [0, 1). The defaults are those of the published code for CIFAR.
        groups: How many clusters, from 1 on.
        window: Share of the clusters that is kept, in (0, 1]; their number is rounded, as in the published code.
        delta: Share of the epochs before annealing, in [0, 1]. That of the loader has no effect.

    Raises:
        ConfigError: For other values.
    """

    ratio: float = 0.1
    groups: int = 5
    window: float = 0.9
    delta: float = 0.875
    prunes_always = True

    def __post_init__(self) -> None:
        """Raise ConfigError for values that cannot work."""
        shares = (self.ratio, self.window, self.delta)
        if not all(isinstance(share, int | float | np.floating) and 0 <= share <= 1 for share in shares):
            raise ConfigError(f"{self}: ratio, window and delta are shares in [0, 1].")
        if self.ratio == 1 or self.window == 0:
            raise ConfigError(f"{self}: keeps nothing; ratio is under 1, and window above 0.")
        check_keep(str(self), (1 - self.ratio,))
        object.__setattr__(self, "groups", whole_number(f"{self}: groups", self.groups, 1, 1000))

    def check(self, moment: Moment) -> str:
        """Nothing to say."""
        return ""

    def at(self, moment: Moment) -> Policy:
        """The window of this epoch."""
        slides = 0 < moment.epoch < annealing_epoch(self.delta, moment.epochs)
        return WindowPruning(1 - self.ratio, self.groups if slides else 1, self.window, moment.epoch)
