"""What a policy is: it turns a summary of the scores into a rule, from scores to keep probabilities.

A policy is a frozen dataclass, validated once, with one method ``rule(summary)``. A rule is a pure function. Samples
without a score are not a policy's business: they are always kept. A policy that is another one in every epoch is a
`Schedule`. docs/policies.md shows how to write one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.errors import ConfigError
from infobatch_stream.score_stats import Summary

__all__ = [
    "Moment", "Policy", "Rule", "Schedule", "StepRule", "annealing_epoch", "annealing_of", "check_keep",
    "keep_probabilities", "prunes_always", "rule_of", "threshold_of", "try_policy",
]  # fmt: skip

# Weights are 1 / probability. Under 2^-10 a single sample would outweigh a thousand others.
_SMALLEST = 2.0**-10


class Rule(Protocol):
    """A pure, vectorised function from scores to keep probabilities.

    It may have an attribute ``threshold``: float, the score from which most is kept, for `stats` and the history.
    """

    def __call__(self, scores: NDArray[np.float32]) -> NDArray[np.float64]:
        """Keep probabilities float64[n], each 0 or in [2^-10, 1], of ``scores`` (float32[n] without NaN)."""


@runtime_checkable
class Policy(Protocol):
    """How an epoch chooses its samples from what is known of their scores."""

    def rule(self, summary: Summary) -> Rule:
        """The rule for scores of this summary (its count is at least 1). Pure."""


@dataclass(frozen=True)
class Moment:
    """Where a run stands when an epoch is planned.

    Attributes:
        epoch: From 0.
        epochs: Of the whole run.
        annealing: From this epoch on everything is kept.
        entries: Of this epoch.
        offered: Total entries of the epochs before; None where that is not known, because the run was continued
            without a checkpoint.
        skipped: How many of those were not trained on; None likewise.
        seeded: Share of the samples that had a score before the first epoch, so that it may prune too.
    """

    epoch: int
    epochs: int
    annealing: int
    entries: int
    offered: int | None
    skipped: int | None
    seeded: float = 0.0


@runtime_checkable
class Schedule(Protocol):
    """A policy for each epoch, by where the run stands."""

    def check(self, moment: Moment) -> str:
        """What the user should hear of at this moment; "" if nothing. Asked in every epoch, those of annealing too.

        Pure. Raises ConfigError, at epoch 0, for a run that cannot be what is asked for.
        """

    def at(self, moment: Moment) -> Policy:
        """The policy of an epoch that may prune. Pure."""


@dataclass(frozen=True)
class StepRule:
    """``keep[i]`` for scores under ``edges[i]`` (and not under ``edges[i-1]``), ``keep[-1]`` for the rest.

    Attributes:
        edges: n scores, none below the one before.
        keep: n + 1 keep probabilities, each 0 or in [2^-10, 1].
        unseen: The keep probability of samples without a score.
        rescale: Whether what is kept weighs 1 / probability; else 1, and the gradient is biased.

    Raises:
        ConfigError: For edges or probabilities that are not so.
    """

    edges: tuple[float, ...]
    keep: tuple[float, ...]
    unseen: float = 1.0
    rescale: bool = True

    def __post_init__(self) -> None:
        """Check them."""
        if len(self.keep) != len(self.edges) + 1 or not all(low <= high for low, high in pairwise(self.edges)):
            raise ConfigError(f"{self}: n edges, none below the one before, part n + 1 probabilities.")
        check_keep(str(self), (*self.keep, self.unseen))

    @property
    def threshold(self) -> float:
        """The last edge; NaN when there is none."""
        return self.edges[-1] if self.edges else math.nan

    def __call__(self, scores: NDArray[np.float32]) -> NDArray[np.float64]:
        """Keep probabilities float64[n] of ``scores``, float32[n]."""
        chance = np.full(scores.shape, self.keep[-1])
        for edge, keep in self.descending:
            np.copyto(chance, keep, where=scores < edge)
        return chance

    @property
    def descending(self) -> list[tuple[np.float32, float]]:
        """(edge, keep probability under it) from the highest edge down; edges such that float32 scores compare alike.

        A later pair overrules those before it.
        """
        pairs = zip(self.edges, self.keep[:-1], strict=True)
        return [(_float32_at_least(edge), keep) for edge, keep in pairs][::-1]


def _float32_at_least(edge: float) -> np.float32:
    """The smallest float32 not below ``edge``: float32 scores are under the one just if under the other."""
    nearest = np.float32(edge)
    return nearest if float(nearest) >= edge else np.nextafter(nearest, np.float32(np.inf))


def annealing_epoch(delta: float, epochs: int) -> int:
    """The first epoch of a run of ``epochs`` that keeps everything, as published."""
    return math.floor(delta * epochs)


def prunes_always(policy: object) -> bool:
    """Whether ``policy`` prunes every epoch alike: also the first, which has no scores, and those of annealing.

    It says so by an attribute ``prunes_always``. Its rules say how often NaN is kept: tables, or steps with ``unseen``.
    """
    return bool(getattr(policy, "prunes_always", False))


def annealing_of(policy: object, delta: float, epochs: int) -> int:
    """From which epoch on a run of ``epochs`` under ``policy`` keeps everything; ``epochs`` for none."""
    return epochs if prunes_always(policy) else annealing_epoch(delta, epochs)


def check_keep(name: str, keep: Sequence[float]) -> None:
    """Raise ConfigError, about the policy ``name``, for keep probabilities that are neither 0 nor in [2^-10, 1]."""
    for p in keep:
        if p != 0 and not _SMALLEST <= p <= 1:
            raise ConfigError(
                f"{name}: keeps with probability {p:g}; allowed are 0 and [2^-10, 1], "
                "so that no sample weighs more than 1024."
            )


def rule_of(policy: Policy, summary: Summary) -> Rule | None:
    """``policy.rule(summary)``; None, to keep everything, where no sample has a score to go by.

    Raises ConfigError unless it is a function.
    """
    if not summary.count and not prunes_always(policy):
        return None
    rule = policy.rule(summary)
    if not callable(rule):
        raise ConfigError(
            f"{policy}.rule(summary) returned {type(rule).__name__}; it must return a function that takes scores, "
            "float32[n], and returns keep probabilities, float64[n]. See docs/policies.md."
        )
    return rule


def threshold_of(rule: Rule) -> float:
    """The threshold that ``rule`` names; NaN without one."""
    return float(getattr(rule, "threshold", math.nan))


def keep_probabilities(rule: Rule, scores: NDArray[np.float32]) -> NDArray[np.float64]:
    """``rule(scores)``, float64[n]. Raises ConfigError unless it is one probability per score, 0 or in [2^-10, 1]."""
    found = rule(scores)
    try:
        chance = np.asarray(found, dtype=np.float64)
    except (TypeError, ValueError):  # of tensors on a device, and of what is no array
        chance = np.empty(0)
    if chance.shape != scores.shape:
        shape = list(getattr(found, "shape", [])) or ""
        raise ConfigError(
            f"the rule {rule!r} returned {type(found).__name__}{shape} for {scores.size} scores; it must return an "
            f"array with one keep probability per score, float64[{scores.size}]. See docs/policies.md."
        )
    wrong = chance[(chance != 0) & ~((chance >= _SMALLEST) & (chance <= 1))]  # a NaN is among them
    check_keep(f"the rule {rule!r}", wrong[:1].tolist())
    return chance


def try_policy(policy: Policy) -> None:
    """Raise ConfigError for one whose rule is none; else that would show after an epoch, when there are scores."""
    scores = np.linspace(0, 4, 64, dtype=np.float32)
    rule = rule_of(policy, Summary(scores))
    assert rule is not None
    threshold_of(rule)
    keep_probabilities(rule, scores)
