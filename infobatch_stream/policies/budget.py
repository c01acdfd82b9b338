"""Skipping a share that the user chose: keep probabilities that grow with the score, scaled to meet a budget.

Among unbiased estimates of a sum that cost the same, the variance is least when each term is kept with a probability
proportional to its size (Neyman, "On the two different aspects of the representative method", 1934). For a gradient
the terms are the samples' gradients, and a power of the loss stands in for their norms.
"""

import math
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from infobatch_stream._validation import check_choice
from infobatch_stream.errors import ConfigError
from infobatch_stream.policies.base import Moment, Policy, annealing_epoch, check_keep
from infobatch_stream.score_stats import Summary, upper_halves

__all__ = ["BudgetPruning", "ProportionalPruning", "TableRule"]

_ONE: Final = 1 << 16
_INFINITE: Final = 0x7F80  # the upper half of infinity; those above it are of what is not a number
_SIGN: Final = 0x8000
_ASCENDING: Final = np.concatenate([np.arange(_SIGN + _INFINITE - 1, _SIGN - 1, -1), np.arange(_INFINITE)])
_UNIT: Final = np.ones(1, np.float32)
_ROUNDING: Final = 1e-9


@dataclass(frozen=True, eq=False)
class TableRule:
    """A keep probability for each upper half of a float32's bits, in units of 2^-16: uint32[2^16], each at least 1.

    So any function of the score is one lookup, with steps of less than 1 % of the score.
    """

    units: NDArray[np.uint32]

    @property
    def threshold(self) -> float:
        """The lowest score from which everything is kept; NaN when there is none."""
        pruned = np.flatnonzero(self.units[:_INFINITE] < _ONE)
        lowest = int(pruned[-1]) + 1 if pruned.size else 0
        return math.nan if lowest == _INFINITE else float(_scores_of(np.array([lowest]), 0)[0])

    def __call__(self, scores: NDArray[np.float32]) -> NDArray[np.float64]:
        """Keep probabilities float64[n] of ``scores``, float32[n]."""
        chance: NDArray[np.float64] = self.units[upper_halves(scores)] / _ONE
        return chance


@dataclass(frozen=True)
class ProportionalPruning:
    """Skip ``share`` of the entries of an epoch: keep with probability ``clip(c * score**power, floor, 1)``.

    c is such that the expected number of kept entries is what was asked for, to 2^-16 of them. What has no score is
    kept, and the others make up for it as far as ``floor`` allows; or, with ``prunes_always``, it counts as of the
    median score. Scores of 0 and below count as the smallest one above.

    Attributes:
        share: Of the entries of the epoch that is skipped.
        power: In [0, 2], rounded to 2^-16; 0 draws all alike.
        floor: The least keep probability.
        prunes_always: Whether what has no score is pruned too.
    """

    share: float
    power: float
    floor: float
    prunes_always: bool = False

    def rule(self, summary: Summary) -> TableRule:
        """The table. The same bits on every machine: all it takes are operations that IEEE 754 rounds correctly."""
        counts, unseen = summary.tally()
        median = _median(counts)
        if self.prunes_always:
            counts[median] += unseen
            unseen = 0
        present = np.flatnonzero(counts)
        counts = counts[present]
        wanted = round(((1 - self.share) * (int(counts.sum()) + unseen) - unseen) * _ONE)
        sizes = _sizes(self.power)
        least = math.ceil(self.floor * _ONE)

        def excess(scale: float) -> int:
            return int(counts @ _units(scale * sizes[present], least)) - wanted

        low, high = least / _ONE / float(sizes.max()), 1 / float(sizes.min())  # all at the floor; all kept
        while low < (middle := math.sqrt(low) * math.sqrt(high)) < high:
            low, high = (middle, high) if excess(middle) < 0 else (low, middle)
        units = _units(min((low, high), key=lambda scale: abs(excess(scale))) * sizes, least)
        # Not a number: never seen.
        units[_INFINITE:_SIGN] = units[_SIGN + _INFINITE :] = units[median] if self.prunes_always else _ONE
        return TableRule(units.astype(np.uint32))


def _median(counts: NDArray[np.int64]) -> int:
    """The upper half of the median of so many scores by upper half, int64[2^16]; of 1.0 when there is none."""
    ends = np.cumsum(counts[_ASCENDING])
    return int(_ASCENDING[ends.searchsorted(ends[-1] / 2, "right")]) if ends[-1] else int(upper_halves(_UNIT)[0])


@dataclass(frozen=True, repr=False)
class BudgetPruning:
    """Skip ``fraction`` of the samples of the whole run, keeping with probability ``clip(c * score**power, floor, 1)``.

    What is kept weighs by the inverse of its probability. With spread="middle", the first epoch (which has no scores,
    unless the run begins with some) and annealing skip nothing; c is solved for the share that is still to be skipped,
    divided evenly among the epochs between them. So the run meets its budget although every draw is by chance and
    samples without a score are always kept, as far as the epochs that are left allow; the loader warns when they do
    not. With spread="even" every epoch skips the same share: there is no annealing, and samples without a score count
    as of the median score, so that the first epoch skips at random.

    Attributes:
        fraction: Of all samples of the run that is skipped, in [0, 1); see `largest` for what can be met.
        power: Of the score, in [0, 2]: 0 skips at random, 1 keeps in proportion to the loss.
        floor: The least keep probability, in [2^-10, 1]; no sample weighs more than 1 / floor.
        spread: "middle" or "even".

    Raises:
        ConfigError: For other values.
    """

    fraction: float
    power: float = 0.5
    floor: float = 0.15
    spread: Literal["middle", "even"] = "middle"

    def __post_init__(self) -> None:
        """Raise ConfigError for values that cannot work."""
        name = f"BudgetPruning(fraction={self.fraction!r}, power={self.power!r}, floor={self.floor!r})"
        if not all(isinstance(value, int | float | np.floating) for value in (self.fraction, self.power, self.floor)):
            raise ConfigError(f"{name}: all three are numbers.")
        check_choice(f"{name}: spread", self.spread, ("middle", "even"))
        if not 0 <= self.fraction < 1:
            raise ConfigError(
                f"{name}: fraction is the share of the whole run's samples to skip, in [0, 1); 0.4 skips 40 %."
            )
        if not 0 <= self.power <= 2:
            raise ConfigError(f"{name}: power is that of the score, in [0, 2]; 0 skips at random, 0.5 is the default.")
        if self.floor == 0:
            raise ConfigError(f"{name}: a floor of 0 would never look again at what it skips; choose 2^-10 or more.")
        check_keep(name, (self.floor,))
        for field in ("fraction", "power", "floor"):
            object.__setattr__(self, field, float(getattr(self, field)))

    def __repr__(self) -> str:
        """As of a dataclass; without the spread where it is the default, as in states of before there were two."""
        spread = "" if self.spread == "middle" else f", spread={self.spread!r}"
        return f"BudgetPruning(fraction={self.fraction!r}, power={self.power!r}, floor={self.floor!r}{spread})"

    @property
    def prunes_always(self) -> bool:
        """Whether the first epoch and those of annealing prune too."""
        return self.spread == "even"

    def largest(self, epochs: int, delta: float = 0.875, seeded: float = 0.0) -> float:
        """The largest fraction that can be met in a run.

        Args:
            epochs: Of the run, of which floor(delta * epochs) may prune.
            delta: As of the loader.
            seeded: Share of the samples that have a score before the first epoch; True: all.

        Returns:
            A share of all samples of the run, in [0, 1).
        """
        return self._most(Moment(0, epochs, annealing_epoch(delta, epochs), 0, 0, 0, seeded))

    def _most(self, moment: Moment) -> float:
        """Of a whole run."""
        if self.prunes_always:
            return 1 - self.floor
        return self._left(replace(moment, epoch=0)) / moment.epochs * (1 - self.floor)

    def check(self, moment: Moment) -> str:
        """At epoch 0 raise ConfigError for a fraction above the largest; later say when it cannot be met any more."""
        most = self._most(moment)
        too_much = self.fraction > most + _ROUNDING
        if self.prunes_always and too_much:
            raise ConfigError(
                f"{self} asks for more than can be skipped: each epoch keeps at least {self.floor:g}, so the largest "
                f"fraction is {math.floor(most * 10000) / 10000:g}. Ask for less, or lower the floor."
            )
        if moment.epoch == 0 and too_much:
            first, pruning = "all but the first", max(0, moment.annealing - 1)
            if moment.seeded:
                first, pruning = f"in the first the {moment.seeded:.0%} that have a score", moment.annealing
            raise ConfigError(
                f"{self} asks for more than can be skipped: of {moment.epochs} epochs {pruning} may prune ({first}, "
                f"not those of annealing from {moment.annealing} on), and each keeps at least {self.floor:g}, so the "
                f"largest fraction is {math.floor(most * 10000) / 10000:g}. Ask for less, raise epochs or delta, lower "
                "the floor, or have the run begin with scores (initial_scores=)."
            )
        if moment.offered is None or moment.skipped is None or self.prunes_always:
            return ""
        run = moment.offered + moment.entries * (moment.epochs - moment.epoch)
        reached = (moment.skipped + moment.entries * self._left(moment) * (1 - self.floor)) / run
        if reached > self.fraction - 0.01 - 3 * math.sqrt(moment.entries) / run:  # chance stays well within
            return ""
        return (
            f"{self} cannot be met any more: {max(reached, 0):.3f} of the run's samples can be skipped at most. Epochs "
            "that prune went by without (samples that were not seen, losses that are not finite, epochs that were "
            "raised)."
        )

    @staticmethod
    def _left(moment: Moment) -> float:
        """Epochs that may prune, this one included; the first as far as it has scores."""
        first = moment.seeded if moment.epoch == 0 < moment.annealing else 0
        return max(0, moment.annealing - max(1, moment.epoch)) + first

    def at(self, moment: Moment) -> Policy:
        """What is left to skip, divided by the epochs that are left for it."""
        if self.prunes_always:
            return ProportionalPruning(self.fraction, self.power, self.floor, prunes_always=True)
        if moment.offered is None or moment.skipped is None:
            share = self.fraction * moment.epochs / (self._left(replace(moment, epoch=0)) or 1)
        else:
            run = moment.offered + moment.entries * (moment.epochs - moment.epoch)
            share = (self.fraction * run - moment.skipped) / (moment.entries * (self._left(moment) or 1))
        if moment.epoch == 0:
            share *= moment.seeded
        return ProportionalPruning(min(max(share, 0.0), 1 - self.floor), self.power, self.floor)


def _units(chance: NDArray[np.float64], least: int) -> NDArray[np.int64]:
    """Keep probabilities in units of 2^-16, int64[n] in least..2^16."""
    return np.rint(np.clip(chance * _ONE, least, _ONE)).astype(np.int64)


def _scores_of(halves: NDArray[np.int64], lower: int) -> NDArray[np.float32]:
    """float32[n] of these upper halves and the lower half ``lower``."""
    return (halves << 16 | lower).astype(np.uint32).view(np.float32)


def _sizes(power: float) -> NDArray[np.float64]:
    """float64[2^16]: for each upper half of a score's bits, the score in its middle to ``power``, in [0, 2].

    By square roots and products, which are the same bits on every processor, as pow is not: ranks that differ in one
    keep probability would differ in their steps.
    """
    scores = np.full(_ONE, float(np.finfo(np.float32).tiny))  # of negative ones, and of what is not a number
    scores[:_INFINITE] = np.maximum(_scores_of(np.arange(_INFINITE), 0x8000), scores[0])
    whole, rest = divmod(round(power * _ONE), _ONE)
    result = np.ones(_ONE)
    for _ in range(whole):
        result *= scores
    for bit in range(15, -1, -1):
        scores = np.sqrt(scores)
        if rest >> bit & 1:
            result *= scores
    return result
