"""What the lossless study compares: ways to train on less."""

from dataclasses import dataclass, field, replace
from typing import Any

from infobatch_stream import BudgetPruning, FullData, QuantilePruning, SoftPruning
from infobatch_stream.policies.base import Moment, Policy
from infobatch_stream.policies.budget import ProportionalPruning

__all__ = ["ALL", "FULL", "IDEAS_TRIED", "SWEEP", "Growing", "Variant", "percent"]

FULL = "full data"
_SHARES = (0.25, 0.3, 0.4, 0.5, 0.7)


@dataclass(frozen=True)
class Variant:
    """A way to spend less.

    policy: of the loader. epochs: share of the full run's. weighted: by the picks' weights. root: learning rates follow
    the square root of the share that an epoch keeps (Task.rate). constant_steps: of the loader. smaller: batches are
    as much smaller as there are fewer epochs, so that the run makes about as many steps as that of full data. smooth:
    the score is so much of the one before, and the rest of it is the loss.
    """

    policy: Any = field(default_factory=FullData)
    epochs: float = 1.0
    weighted: bool = True
    root: bool = False
    constant_steps: bool = False
    smaller: bool = False
    smooth: float = 0.0

    def length(self, epochs: int) -> float:
        """Epochs of its run, when that of full data has ``epochs``; the last one may be a part of one."""
        return max(1.0, round(epochs * self.epochs, 9))

    def batch(self, batch: int) -> int:
        """The size of its batches, when the run of full data has ``batch``."""
        return max(1, round(batch * self.epochs)) if self.smaller else batch


@dataclass(frozen=True)
class Growing:
    """BudgetPruning with spread="even" whose share grows evenly from 0 to twice ``fraction``, as far as ``floor`` lets.

    What the last epochs cannot skip is not made up for.
    """

    fraction: float
    floor: float = 0.15
    prunes_always: bool = True

    def check(self, moment: Moment) -> str:
        """Nothing to say."""
        return ""

    def at(self, moment: Moment) -> Policy:
        """Of the middle of the epoch."""
        share = 2 * self.fraction * (moment.epoch + 0.5) / moment.epochs
        return ProportionalPruning(min(share, 1 - self.floor), 0.5, self.floor, prunes_always=True)


def percent(share: float) -> str:
    """As the names of variants have it."""
    return f"{100 * share:.0f} %"


_BUDGETS = {
    name: variant
    for b in _SHARES
    for name, variant in {
        f"budget {percent(b)}": Variant(BudgetPruning(b)),
        f"budget, root {percent(b)}": Variant(BudgetPruning(b), root=True),
        f"at random {percent(b)}": Variant(BudgetPruning(b, power=0.0)),
        f"at random, not rescaled {percent(b)}": Variant(BudgetPruning(b, power=0.0), weighted=False),
        f"fewer epochs {percent(b)}": Variant(epochs=1 - b),
        f"budget, constant steps {percent(b)}": Variant(BudgetPruning(b), constant_steps=True),
        f"at random, constant steps {percent(b)}": Variant(BudgetPruning(b, power=0.0), constant_steps=True),
        f"even, constant steps {percent(b)}": Variant(BudgetPruning(b, spread="even"), constant_steps=True),
        f"even, at random, constant steps {percent(b)}": Variant(
            BudgetPruning(b, power=0.0, spread="even"), constant_steps=True
        ),
        f"fewer epochs, smaller batches {percent(b)}": Variant(epochs=1 - b, smaller=True),
    }.items()
}
SWEEP = {  # of BudgetPruning's own parameters
    f"budget 50 %, power {power:g}, floor {floor:g}": Variant(BudgetPruning(0.5, power, floor))
    for power in (0.25, 0.5, 1.0)
    for floor in (0.05, 0.15, 0.3)
}
_EVEN = Variant(BudgetPruning(0.5, spread="even"), constant_steps=True)
IDEAS_TRIED = {  # to make an even budget pay more
    "even, smooth 0.5, constant steps 50 %": replace(_EVEN, smooth=0.5),
    "even, smooth 0.8, constant steps 50 %": replace(_EVEN, smooth=0.8),
    "even, floor 1/3, constant steps 50 %": replace(_EVEN, policy=BudgetPruning(0.5, floor=1 / 3, spread="even")),
    "even, power 0.25, constant steps 50 %": replace(_EVEN, policy=BudgetPruning(0.5, power=0.25, spread="even")),
    "even, power 1, constant steps 50 %": replace(_EVEN, policy=BudgetPruning(0.5, power=1.0, spread="even")),
    "growing, constant steps 50 %": replace(_EVEN, policy=Growing(0.5)),
}
ALL = {
    FULL: Variant(),
    "InfoBatch, soft": Variant(SoftPruning(0.5)),
    "InfoBatch, soft, constant steps": Variant(SoftPruning(0.5), constant_steps=True),
    "InfoBatch, quantile": Variant(QuantilePruning((0.20, 0.85), (0.25, 0.5, 1.0))),
    **_BUDGETS,
    **SWEEP,
    **IDEAS_TRIED,
}
