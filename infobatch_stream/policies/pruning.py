"""The published policies, and the one that prunes nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from infobatch_stream.errors import ConfigError
from infobatch_stream.policies.base import StepRule, check_keep
from infobatch_stream.score_stats import Summary

__all__ = ["FullData", "QuantilePruning", "SoftPruning"]


@dataclass(frozen=True)
class FullData:
    """Every sample in every epoch, weight 1."""

    def rule(self, summary: Summary) -> StepRule:
        """Keep everything."""
        return StepRule((), (1.0,))


@dataclass(frozen=True)
class SoftPruning:
    """InfoBatch's rule (Qin et al., ICLR 2024): below the mean score, drop with probability ``ratio``.

    Kept low scores weigh 1 / (1 - ratio).

    Attributes:
        ratio: In [0, 1); the paper's 0.5 by default.

    Raises:
        ConfigError: For other values.
    """

    ratio: float = 0.5

    def __post_init__(self) -> None:
        """Raise ConfigError for a ratio outside [0, 1), or so near 1 that weights pass 1024."""
        if not isinstance(self.ratio, int | float | np.floating) or not 0 <= self.ratio < 1:
            raise ConfigError(
                f"SoftPruning(ratio={self.ratio!r}): ratio is the share of low-score samples to drop, in [0, 1); "
                "the paper uses 0.5. To drop none, use FullData()."
            )
        check_keep(f"SoftPruning(ratio={self.ratio})", (1 - self.ratio,))

    def rule(self, summary: Summary) -> StepRule:
        """``1 - ratio`` below the mean, 1 from the mean up."""
        return StepRule((summary.mean,), (1 - self.ratio, 1.0))


@dataclass(frozen=True)
class QuantilePruning:
    """Bands between quantiles of the scores, each kept with its own probability.

    The defaults are those of the paper's 40 % row on ImageNet: the lowest 20 % kept with probability 0.25, up to
    85 % with 0.5, the hardest 15 % always. Scores that are all equal fall into the last band.

    Attributes:
        quantiles: Shares in (0, 1) that increase.
        keep: One probability more than there are quantiles, each in [2^-10, 1], or 0 for a band that is dropped
            altogether (the gradient is then no longer unbiased).

    Raises:
        ConfigError: For other values.
    """

    quantiles: Sequence[float] = (0.20, 0.85)
    keep: Sequence[float] = (0.25, 0.5, 1.0)

    def __post_init__(self) -> None:
        """Raise ConfigError for quantiles that do not increase within (0, 1), or for a wrong ``keep``."""
        try:
            object.__setattr__(self, "quantiles", tuple(float(q) for q in self.quantiles))
            object.__setattr__(self, "keep", tuple(float(p) for p in self.keep))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"QuantilePruning(quantiles={self.quantiles!r}, keep={self.keep!r}): both are lists of numbers."
            ) from error
        name = f"QuantilePruning(quantiles={self.quantiles}, keep={self.keep})"
        bounds = (0.0, *self.quantiles, 1.0)
        if not all(low < high for low, high in pairwise(bounds)):
            raise ConfigError(f"{name}: quantiles must increase strictly within (0, 1), as (0.20, 0.85) does.")
        if len(self.keep) != len(self.quantiles) + 1:
            raise ConfigError(
                f"{name}: {len(self.quantiles)} quantiles make {len(self.quantiles) + 1} bands, "
                f"but keep has {len(self.keep)} probabilities."
            )
        if not any(self.keep):
            raise ConfigError(f"{name}: keeps nothing; at least one probability must be above 0.")
        check_keep(name, self.keep)

    def rule(self, summary: Summary) -> StepRule:
        """Step at each quantile."""
        return StepRule(tuple(summary.quantiles(self.quantiles)), tuple(self.keep))
