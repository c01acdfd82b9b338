"""The tables of the lossless study: which variants stand in each, with which seeds, and what is asked of them."""

from typing import NamedTuple

from benchmarks.lossless.variants import FULL, IDEAS_TRIED, SWEEP, percent

__all__ = ["CONSTANT", "IDEAS", "LONG", "MAIN", "PAIRS", "SHORT", "STUDY", "TABLES", "TIME", "Table"]

STUDY, CONSTANT, SHORT, LONG, IDEAS, TIME = (
    "study", "constant steps", "12 epochs", "36 epochs", "ideas", "time"
)  # fmt: skip
BUDGETS = (0.25, 0.4, 0.5)  # of the study
SOFT = ("InfoBatch, soft", "InfoBatch, soft, constant steps")
EVEN, RANDOM, CONTROL = "even, constant steps", "even, at random, constant steps", "fewer epochs, smaller batches"
WAYS = ("budget", "budget, constant steps", "at random, constant steps", EVEN, RANDOM, "fewer epochs", CONTROL)


class Table(NamedTuple):
    """first: its own seeds are the hundred from here on. rows: names of variants. epochs: of full data's run; None for
    the task's own.

    So the runs that chose a default do not judge it, and the runs of a table were made on one machine: another rounds
    otherwise.
    """

    first: int
    rows: tuple[str, ...]
    epochs: int | None = None


def _with(shares: tuple[float, ...], *ways: str) -> tuple[str, ...]:
    """Each of ``ways`` with each of ``shares``."""
    return tuple(f"{way} {percent(share)}" for share in shares for way in ways)


TABLES = {
    STUDY: Table(
        0,
        (
            FULL,
            *("InfoBatch, soft", "InfoBatch, quantile"),
            *_with(BUDGETS, "budget"),
            *_with(BUDGETS[1:], "budget, root", "at random", "at random, not rescaled"),
            *_with(BUDGETS, "fewer epochs"),
        ),
    ),
    "parameters": Table(100, (FULL, *SWEEP)),
    CONSTANT: Table(
        200,
        (
            *(FULL, *SOFT, *_with((0.4, 0.5), *WAYS)),
            *_with((0.7,), EVEN, RANDOM, CONTROL),
        ),
    ),
    SHORT: Table(
        300,
        (
            *(FULL, *SOFT),
            *_with((0.3,), "budget", "budget, constant steps", EVEN, "fewer epochs", CONTROL),
            *_with((0.5,), *WAYS),
            *_with((0.7,), EVEN, "fewer epochs", CONTROL),
        ),
        12,
    ),
    LONG: Table(400, (FULL, *_with((0.3,), EVEN, CONTROL), *_with((0.5,), "budget", EVEN, RANDOM, CONTROL)), 36),
    IDEAS: Table(500, (FULL, *_with((0.5,), EVEN, CONTROL), *IDEAS_TRIED), 12),
    TIME: Table(600, (FULL, *_with((0.5,), "budget", EVEN, CONTROL)), 12),  # with a curve
}  # fmt: skip
MAIN = [  # rows that answer most; these have more seeds
    *(FULL, *SOFT, *_with((0.3,), EVEN, CONTROL)),
    *_with((0.5,), "budget", "budget, constant steps", EVEN, RANDOM, "fewer epochs", CONTROL),
]
PAIRS = (  # questions to a table: does the first lose less than the second?
    (SOFT[1], SOFT[0]),
    *(
        (f"{first} {percent(share)}", f"{second} {percent(share)}")
        for share in (0.3, 0.4, 0.5, 0.7)
        for first, second in (
            ("budget, constant steps", "budget"),
            ("budget, constant steps", "at random, constant steps"),
            (EVEN, "budget, constant steps"),
            (EVEN, RANDOM),
            ("budget, constant steps", CONTROL),
            (EVEN, CONTROL),
            (EVEN, "fewer epochs"),
            (CONTROL, "fewer epochs"),
        )
    ),
    *((idea, f"{EVEN} 50 %") for idea in IDEAS_TRIED),
)
