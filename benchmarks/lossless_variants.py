"""What the lossless study compares: ways to train on less, and the tables in which they stand."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from infobatch_stream import BudgetPruning, FullData, QuantilePruning, SoftPruning

__all__ = ["ALL", "BUDGETS", "CONSTANT", "FULL", "PAIRS", "STUDY", "TABLES", "VARIANTS", "Table", "Variant", "percent"]

FULL = "full data"
BUDGETS = (0.25, 0.4, 0.5)


@dataclass(frozen=True)
class Variant:
    """A way to spend less.

    policy: of the loader. epochs: share of the full run's. weighted: by the picks' weights. root: learning rates follow
    the square root of the share that an epoch keeps (Task.rate). constant_steps: of the loader. smaller: batches are
    as much smaller as there are fewer epochs, so that the run makes about as many steps as that of full data.
    """

    policy: Any = field(default_factory=FullData)
    epochs: float = 1.0
    weighted: bool = True
    root: bool = False
    constant_steps: bool = False
    smaller: bool = False

    def length(self, epochs: int) -> int:
        """Epochs of its run, when that of full data has ``epochs``."""
        return max(1, round(epochs * self.epochs))

    def batch(self, batch: int, epochs: int) -> int:
        """The size of its batches, when the run of full data has ``batch`` and ``epochs``."""
        return max(1, round(batch * self.length(epochs) / epochs)) if self.smaller else batch


def percent(share: float) -> str:
    """As the names of variants have it."""
    return f"{100 * share:.0f} %"


VARIANTS = {
    FULL: Variant(),
    "InfoBatch, soft": Variant(SoftPruning(0.5)),
    "InfoBatch, quantile": Variant(QuantilePruning((0.20, 0.85), (0.25, 0.5, 1.0))),
    **{f"budget {percent(b)}": Variant(BudgetPruning(b)) for b in BUDGETS},
    **{f"budget, root {percent(b)}": Variant(BudgetPruning(b), root=True) for b in BUDGETS[1:]},
    **{f"at random {percent(b)}": Variant(BudgetPruning(b, power=0.0)) for b in BUDGETS[1:]},
    **{
        f"at random, not rescaled {percent(b)}": Variant(BudgetPruning(b, power=0.0), weighted=False)
        for b in BUDGETS[1:]
    },
    **{f"fewer epochs {percent(b)}": Variant(epochs=1 - b) for b in BUDGETS},
}
SWEEP = {  # of BudgetPruning's own parameters
    f"budget 50 %, power {power:g}, floor {floor:g}": Variant(BudgetPruning(0.5, power, floor))
    for power in (0.25, 0.5, 1.0)
    for floor in (0.05, 0.15, 0.3)
}
SHARES = (0.4, 0.5, 0.7)
CONSTANT_STEPS = {  # each beside its published mode, which is in VARIANTS
    "InfoBatch, soft, constant steps": Variant(SoftPruning(0.5), constant_steps=True),
    **{f"budget, constant steps {percent(b)}": Variant(BudgetPruning(b), constant_steps=True) for b in SHARES[:2]},
    **{
        f"at random, constant steps {percent(b)}": Variant(BudgetPruning(b, power=0.0), constant_steps=True)
        for b in SHARES[:2]
    },
    **{
        f"even, constant steps {percent(b)}": Variant(BudgetPruning(b, spread="even"), constant_steps=True)
        for b in SHARES
    },
    **{
        f"even, at random, constant steps {percent(b)}": Variant(
            BudgetPruning(b, power=0.0, spread="even"), constant_steps=True
        )
        for b in SHARES
    },
    **{f"fewer epochs, smaller batches {percent(b)}": Variant(epochs=1 - b, smaller=True) for b in SHARES},
}
ALL = VARIANTS | SWEEP | CONSTANT_STEPS


class Table(NamedTuple):
    """rows: names of variants. first: its own seeds are the hundred from here on.

    So the runs that chose a default do not judge it, and the runs of a table were made on one machine: another rounds
    otherwise.
    """

    first: int
    rows: tuple[str, ...]


STUDY, CONSTANT = "study", "constant steps"
TABLES = {
    STUDY: Table(0, tuple(VARIANTS)),
    "parameters": Table(100, (FULL, *SWEEP)),
    CONSTANT: Table(
        200,
        (
            FULL,
            "InfoBatch, soft",
            "InfoBatch, soft, constant steps",
            *(
                row
                for b in SHARES
                for name in (
                    "budget",
                    "budget, constant steps",
                    "at random, constant steps",
                    "even, constant steps",
                    "even, at random, constant steps",
                    "fewer epochs",
                    "fewer epochs, smaller batches",
                )
                if (row := f"{name} {percent(b)}") in ALL
            ),
        ),
    ),
}
PAIRS = (  # questions to the table of constant steps: does the first lose less than the second?
    ("InfoBatch, soft, constant steps", "InfoBatch, soft"),
    *(
        (f"{first} {percent(b)}", f"{second} {percent(b)}")
        for b in SHARES
        for first, second in (
            ("budget, constant steps", "budget"),
            ("budget, constant steps", "at random, constant steps"),
            ("even, constant steps", "budget, constant steps"),
            ("even, constant steps", "even, at random, constant steps"),
            ("budget, constant steps", "fewer epochs, smaller batches"),
            ("even, constant steps", "fewer epochs, smaller batches"),
            ("fewer epochs, smaller batches", "fewer epochs"),
        )
    ),
)
