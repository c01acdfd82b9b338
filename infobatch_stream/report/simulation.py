"""What a policy would have kept, with the scores that a run left in its store."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from infobatch_stream import BudgetPruning, FullData, QuantilePruning, ScoreStore, SoftPruning
from infobatch_stream.errors import ConfigError
from infobatch_stream.planning.selection import Selection
from infobatch_stream.policies.base import Moment, Policy, Schedule, StepRule, annealing_of, prunes_always, rule_of
from infobatch_stream.score_stats import Summary, share_known
from infobatch_stream.store.recorded_losses import replay

__all__ = ["Outcome", "doubts", "recommend", "scores_of", "simulate", "table", "usual_policies"]

_BLOCK = 1 << 20
_MUCH = 0.25  # share of the samples of a run
_LONG = 36  # epochs
_CAPTION = (
    "skipped: of the samples of the whole run. effective: what is kept estimates an epoch's gradient as well as so "
    "large a share chosen at random would, in the worst epoch."
)
_OF_BATCHES = (
    "batch: the samples of a step with constant_steps, in the smallest epoch; effective batch: as many, chosen at "
    "random, would give as good a gradient."
)


@dataclass(frozen=True)
class Outcome:
    """What a policy makes of a run.

    kept: samples of each epoch. effective: share of the samples that, chosen at random, would give as good an estimate
    of the epoch's gradient as what is kept, if a score is the square of the norm of the sample's gradient. (So it is,
    roughly, of a loss: docs/lossless.md has measurements.) NaN where the estimate is biased.
    """

    policy: Policy | Schedule
    num_samples: int
    kept: list[int]
    effective: list[float]

    @property
    def saved(self) -> float:
        """Share of the samples of all epochs that is not trained on."""
        return 1 - sum(self.kept) / (self.num_samples * len(self.kept))

    @property
    def least(self) -> float:
        """The least share of the samples that an epoch keeps."""
        return min(self.kept) / self.num_samples

    @property
    def worst(self) -> float:
        """The least effective share of an epoch; NaN where an estimate is biased."""
        return float(np.min(self.effective))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        effective = [None if math.isnan(share) else share for share in self.effective]
        return {"policy": repr(self.policy), "saved": self.saved, "kept": self.kept, "effective": effective}


def simulate(
    policies: Iterable[Policy | Schedule],
    scores: Iterable[NDArray[np.float32]],
    *,
    epochs: int,
    delta: float = 0.875,
    seed: int = 0,
    include: NDArray[np.bool_] | None = None,
) -> list[Outcome]:
    """What each of ``policies`` makes of a run of ``epochs``.

    scores: what each epoch is planned with, float32[N], NaN = never seen. include: bool[N], the samples of the run;
    None: all. With the scores of a run, its samples, policy and seed, what is kept is what that run kept. Raises
    ConfigError for a budget that no such run meets.
    """
    policies, seeded = list(policies), 0.0
    shares: list[list[tuple[int, float]]] = [[] for _ in policies]
    size = 0
    for epoch, known in enumerate(islice(scores, epochs)):
        size = known.size if include is None else int(np.count_nonzero(include))
        if epoch == 0:
            seeded = share_known(known, include)
        for policy, planned in zip(policies, shares, strict=True):
            skipped = epoch * size - sum(kept for kept, _ in planned)
            annealing = annealing_of(policy, delta, epochs)
            chosen = policy if epoch < annealing else FullData()
            if not isinstance(chosen, Policy):
                moment = Moment(epoch, epochs, annealing, size, epoch * size, skipped, seeded)
                chosen.check(moment)
                chosen = chosen.at(moment)
            planned.append(_plan(chosen, known, seed, epoch, include))
    return [
        Outcome(policy, size, [kept for kept, _ in planned], [effective for _, effective in planned])
        for policy, planned in zip(policies, shares, strict=True)
    ]


def scores_of(store: ScoreStore) -> Iterator[NDArray[np.float32]]:
    """What each epoch of a run is planned with, without end: of those of the run where they were kept, then the last.

    Where they were not, all epochs are planned with what the store has now, but for the first of a run that began
    without scores.
    """
    kept = replay(store.path, store.num_samples)
    began_without = store.epoch and store.seeded is None
    yield next(kept, np.full(store.num_samples, np.nan, np.float32) if began_without else store.scores)
    yield from kept
    while True:
        yield store.scores


def _plan(
    policy: Policy, scores: NDArray[np.float32], seed: int, epoch: int, include: NDArray[np.bool_] | None
) -> tuple[int, float]:
    """How many samples are kept, and the effective share.

    With keep probabilities p and squared norms s of the gradients, the estimate of their sum has the variance
    sum(s (1/p - 1)), as if all were kept with the probability sum(s) / sum(s / p).
    """
    summary = Summary(scores, include=include)
    scores = summary.scores
    rule = rule_of(policy, summary)
    selection = Selection(scores, rule, seed, epoch, include)
    # What has no score counts nothing where it is always kept, and else as of middling score, as the policy has it.
    unseen = 0.0
    if prunes_always(policy):
        unseen = float(np.nanmedian(scores)) if summary.count else 1.0
    kept, squares, weighted = 0, 0.0, 0.0
    for start in range(0, scores.size, _BLOCK):
        part = scores[start : start + _BLOCK]
        stop = start + part.size
        square = np.maximum(np.nan_to_num(part.astype(np.float64), nan=unseen), 0)
        if include is not None:
            square *= include[start:stop]
        kept += int(np.count_nonzero(selection.keep(start, stop)))
        squares += float(square.sum())
        weighted += float(square @ selection.weight(np.arange(start, stop)))
    if isinstance(rule, StepRule) and not ((rule.rescale and all(rule.keep)) or selection.keeps_all):
        return kept, math.nan
    return kept, squares / weighted if weighted else 1.0


def _percent(share: float) -> str:
    return "biased" if math.isnan(share) else f"{share:.1%}"


def usual_policies(epochs: int, delta: float = 0.875, seeded: float = 0.0) -> list[Policy | Schedule]:
    """What one might choose from; of budgets, those that such a run can meet (`BudgetPruning.largest`)."""
    shares = [percent / 100 for percent in (10, 20, 25, 30, 40, 50, 60, 70)]
    budgets = [BudgetPruning(share) for share in shares] + [BudgetPruning(share, spread="even") for share in shares]
    return [
        *(SoftPruning(ratio) for ratio in (0.3, 0.5, 0.7, 0.9)),
        QuantilePruning(),
        *(budget for budget in budgets if budget.fraction <= budget.largest(epochs, delta, seeded)),
    ]


def recommend(outcomes: Iterable[Outcome], wish: float, tolerance: float = 0.01) -> Outcome:
    """Of those that skip the share ``wish``, or little more than is needed for it, the one whose estimate is best.

    Those that are biased are left out.

    Raises ConfigError when none skips so much.
    """
    found = [one for one in outcomes if one.saved >= wish - tolerance and not math.isnan(one.worst)]
    if not found:
        raise ConfigError(
            f"none of these policies skips {wish:.0%} without bias; train for more epochs, or ask for less."
        )
    least = min(one.saved for one in found)
    return max((one for one in found if one.saved <= max(least, wish) + 5 * tolerance), key=lambda one: one.worst)


def doubts(outcomes: Iterable[Outcome], epochs: int) -> list[str]:
    """Where skipping as much as ``outcomes`` do cost accuracy in docs/does-it-pay.md, in sentences."""
    outcomes = [one for one in outcomes if one.saved >= _MUCH]
    found = []
    if outcomes and epochs < _LONG:
        found.append(
            f"{epochs} epochs are few to skip so much: in the project's study (docs/does-it-pay.md) three of five "
            "families of models were clearly worse after 12 epochs with 30 % skipped; after "
            f"{_LONG} epochs they lost less. Compare with a run of fewer epochs."
        )
    if any(isinstance(one.policy, BudgetPruning) and one.policy.spread == "middle" for one in outcomes):
        found.append(
            "A budget over the middle epochs skips most of these. In the study, after 12 epochs with half skipped, it "
            'lost more than one that is spread evenly: BudgetPruning(fraction, spread="even") with constant_steps=True.'
        )
    return found


def table(outcomes: Iterable[Outcome], best: Outcome | None = None, batch_size: int | None = None) -> Table:
    """A row for each outcome; of a single one, a row for each of its epochs. ``best`` is marked.

    batch_size: of the loader; then it says what a step of constant steps holds, and is worth.
    """
    outcomes = list(outcomes)
    caption = _CAPTION if batch_size is None else f"{_CAPTION} {_OF_BATCHES}"
    shown = Table(box=None, pad_edge=False, header_style="dim", caption=caption, caption_justify="left")
    batches = [] if batch_size is None else ["batch", "effective batch"]

    def of_batch(*shares: float) -> list[str]:
        """Of a batch these shares; none where there is none."""
        if batch_size is None:
            return []
        return ["biased" if math.isnan(share) else f"{batch_size * share:.0f}" for share in shares]

    if len(outcomes) == 1 and best is None:
        (one,) = outcomes
        for name in ("epoch", "kept", "share", "effective", *batches):
            shown.add_column(name, justify="right")
        for epoch, (kept, effective) in enumerate(zip(one.kept, one.effective, strict=True)):
            share = kept / one.num_samples
            shown.add_row(f"{epoch}", f"{kept:,}", f"{share:.1%}", _percent(effective), *of_batch(share, effective))
        shown.add_section()
        shown.add_row("all", f"{sum(one.kept):,}", f"{1 - one.saved:.1%}")
        return shown
    shown.add_column("policy", overflow="fold")
    for name in ("skipped", "effective", *batches, ""):
        shown.add_column(name, justify="right", no_wrap=True)
    for one in outcomes:
        mark = "recommended" if one is best else ""
        batch = of_batch(one.least, one.worst)
        shown.add_row(repr(one.policy), f"{one.saved:.1%}", _percent(one.worst), *batch, mark)
    return shown
