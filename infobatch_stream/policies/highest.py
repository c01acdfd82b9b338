"""The rule that keeps the highest scores and none of the others."""

import numpy as np

from infobatch_stream.policies.base import StepRule
from infobatch_stream.score_stats import Summary

__all__ = ["highest"]


def highest(summary: Summary, share: float, keep: float) -> StepRule:
    """Keep the ``share`` of the entries with the highest scores with probability ``keep``, unweighted.

    What has no score counts as higher than all that have one. Of equal scores that only some have room, these are
    chosen by chance.
    """
    counts, unseen = summary.tally()
    seen = int(counts.sum())
    wanted = share * (seen + unseen)
    new = keep * min(wanted / unseen, 1) if unseen else keep
    if not summary.count:
        return StepRule((), (keep,), new, rescale=False)
    wanted = max(wanted - unseen, 0) / seen * summary.count if seen else 0.0
    edge = np.float32(summary.quantiles([1 - wanted / summary.count])[0])
    below, equal = summary.rank(float(edge))
    tied = keep * min((wanted - (summary.count - below - equal)) / equal, 1)
    with np.errstate(over="ignore"):  # from the largest float32
        above = np.nextafter(edge, np.float32(np.inf))
    return StepRule((float(edge), float(above)), (0, tied if tied >= 2**-10 else 0.0, keep), new, rescale=False)
