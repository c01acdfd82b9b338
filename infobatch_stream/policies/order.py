"""OrderDP: the highest losses of a random subset."""

from dataclasses import dataclass

import numpy as np

from infobatch_stream.errors import ConfigError
from infobatch_stream.policies.base import StepRule, check_keep
from infobatch_stream.policies.highest import highest
from infobatch_stream.score_stats import Summary

__all__ = ["OrderPruning"]


@dataclass(frozen=True)
class OrderPruning:
    """OrderDP (Jin et al., ICLR 2026, arXiv 2606.08574): of a random subset, the samples with the highest losses.

    For comparison. The gradient is not unbiased: low losses are missing, and what is kept weighs 1. Its expectation is
    the gradient of a surrogate, the mean of the highest losses of a random subset, and not of the mean loss.

    As published, every epoch keeps the same share, ``subset * top``: the first one at random, and there is no annealing
    (``delta`` of the loader has no effect). Here a sample is in the subset by a draw of its own and the cut is at the
    quantile of all scores, so the count varies by chance. Samples without a score count as of the highest losses.

    Attributes:
        subset: Share of the samples that is drawn, in (0, 1]; the published code's 0.75 by default.
        top: Share of these that is kept, in (0, 1]; likewise 0.85.

    Raises:
        ConfigError: For other values.
    """

    subset: float = 0.75
    top: float = 0.85
    prunes_always = True

    def __post_init__(self) -> None:
        """Raise ConfigError for shares outside (0, 1]."""
        for share in (self.subset, self.top):
            if not isinstance(share, int | float | np.floating) or not 0 < share <= 1:
                raise ConfigError(f"{self}: both are shares in (0, 1]; subset=0.75 and top=0.85 keep 64 %.")
        check_keep(str(self), (self.subset * self.top,))

    def rule(self, summary: Summary) -> StepRule:
        """``subset`` from the quantile 1 - ``top`` up, 0 below."""
        return highest(summary, self.top, self.subset)
