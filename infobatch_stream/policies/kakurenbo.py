"""KAKURENBO: the lowest losses are hidden, fewer of them as the run goes on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from infobatch_stream.errors import ConfigError
from infobatch_stream.policies.base import Moment, Policy, StepRule, annealing_epoch
from infobatch_stream.policies.highest import highest
from infobatch_stream.policies.pruning import FullData
from infobatch_stream.score_stats import Summary

__all__ = ["HidingPruning", "KakurenboPruning"]


@dataclass(frozen=True)
class HidingPruning:
    """Hide the ``fraction`` of the entries with the lowest scores; what has no score is never hidden."""

    fraction: float

    def rule(self, summary: Summary) -> StepRule:
        """0 below the quantile, 1 above."""
        return replace(highest(summary, 1 - self.fraction, 1.0), unseen=1.0)


@dataclass(frozen=True)
class KakurenboPruning:
    """How KAKURENBO hides samples (Nguyen et al., NeurIPS 2023, arXiv 2310.10102): those with the lowest losses.

    For comparison. The gradient is not unbiased: low losses are missing, and what is kept weighs 1. The first epoch
    hides nothing, the others hide ``fraction`` times the factor of their part of the run. As published there is no
    annealing at the end (``delta`` of the loader has no effect).

    Three parts of KAKURENBO are left out. Samples that are predicted wrongly or with a confidence under 0.7 are not
    moved back, since the store holds losses alone. Hidden samples are not run through the model at the end of each
    epoch: their score stays that of the last visit, until others fall below it or the fraction falls. The learning
    rate is not multiplied by 1 / (1 - fraction): divide it by ``loader.kept_share`` yourself.

    Attributes:
        fraction: The largest share of the samples that is hidden, in [0, 1).
        milestones: Shares of the run, increasing within (0, 1), at which the factor changes.
        factors: One more than there are milestones, each in [0, 1].

    Raises:
        ConfigError: For other values.
    """

    fraction: float = 0.3
    milestones: Sequence[float] = (0.3, 0.6, 0.8)
    factors: Sequence[float] = (1.0, 0.8, 0.6, 0.4)
    prunes_always = True

    def __post_init__(self) -> None:
        """Raise ConfigError for a fraction outside [0, 1), and for milestones or factors that do not fit."""
        try:
            for field in ("milestones", "factors"):
                object.__setattr__(self, field, tuple(float(value) for value in getattr(self, field)))
            bounds = np.array([0.0, *self.milestones, 1.0])
            fits = len(self.factors) == len(self.milestones) + 1 and 0 <= self.fraction < 1
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{self}: a number and two lists of numbers.") from error
        if not (fits and (np.diff(bounds) > 0).all() and all(0 <= factor <= 1 for factor in self.factors)):
            raise ConfigError(
                f"{self}: fraction is a share in [0, 1), milestones increase within (0, 1), and factors are one more "
                "than these, each in [0, 1]."
            )

    def check(self, moment: Moment) -> str:
        """Nothing to say."""
        return ""

    def at(self, moment: Moment) -> Policy:
        """The fraction of this epoch; 0 in the first."""
        passed = sum(moment.epoch >= annealing_epoch(share, moment.epochs) for share in self.milestones)
        fraction = self.fraction * self.factors[passed] if moment.epoch else 0
        return HidingPruning(fraction) if fraction else FullData()
