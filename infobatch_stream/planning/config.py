"""How the epochs of a run are planned: the options that make the picks, validated once."""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infobatch_stream._validation import whole_number
from infobatch_stream.errors import ConfigError
from infobatch_stream.planning.deal import count_steps
from infobatch_stream.planning.epoch_plan import EpochPlan
from infobatch_stream.planning.position import RunPosition
from infobatch_stream.planning.shape import Pool, Shape
from infobatch_stream.policies.base import Policy, Schedule, annealing_of, prunes_always, try_policy
from infobatch_stream.policies.pruning import FullData

__all__ = ["RunConfig"]


@dataclass(frozen=True)
class RunConfig:
    """Everything but data, scores and world that decides what an epoch holds; see `InfoBatchLoader` for each.

    Raises ConfigError for values that cannot work.
    """

    policy: Policy | Schedule
    delta: float
    seed: int
    shuffle: bool
    shuffle_window: int
    drop_last: bool
    constant_steps: bool = False

    def __post_init__(self) -> None:
        """Check every value."""
        if isinstance(self.policy, type) or not isinstance(self.policy, Policy | Schedule):
            raise ConfigError(
                f"policy={self.policy!r} has no rule(summary) (nor check(moment) and at(moment)); use e.g. "
                "SoftPruning(ratio=0.5) or FullData()."
            )
        if type(self.policy).__repr__ is object.__repr__:
            raise ConfigError(
                f"the policy {type(self.policy).__name__} has no repr of its own, by which ranks and checkpoints are "
                "compared: make it a frozen dataclass."
            )
        if not isinstance(self.delta, int | float | np.floating) or not 0 <= self.delta <= 1:
            raise ConfigError(
                f"delta={self.delta!r}: it is the share of epochs before annealing, in [0, 1]; the paper uses 0.875."
            )
        object.__setattr__(self, "delta", float(self.delta))
        object.__setattr__(self, "seed", whole_number("seed", self.seed, 0, 2**64 - 1))
        object.__setattr__(self, "shuffle_window", whole_number("shuffle_window", self.shuffle_window, 1, 2**29))

    def facts(self) -> dict[str, Any]:
        """Its values as plain ones, the policy as its repr: to compare, and to save."""
        return {**{field.name: getattr(self, field.name) for field in fields(self)}, "policy": repr(self.policy)}

    def check(self, position: RunPosition, entries: int, *, epochs: int, seeded: float = 0.0) -> str:
        """What the user should hear of a run of ``epochs`` as it stands; "" if nothing.

        entries: of the epoch. seeded: share of the samples that had a score before the first epoch. Raises ConfigError
        at epoch 0 when no such run can be what the policy asks for, or its rule is none.
        """
        policy, annealing = self.policy, self.annealing(epochs)
        said = "" if isinstance(policy, Policy) else policy.check(position.moment(epochs, annealing, entries, seeded))
        if position.epoch or isinstance(policy, FullData):
            return said
        if annealing > (0 if seeded else 1) or prunes_always(policy):
            later = RunPosition(1, entries=entries, trained=entries) if annealing > 1 else position
            try_policy(
                policy if isinstance(policy, Policy) else policy.at(later.moment(epochs, annealing, entries, seeded))
            )
            return said
        return said or (
            f"nothing can be pruned in this run of {epochs} epoch(s): the first one has no scores to go by, and from "
            f"epoch floor(delta * epochs) = {annealing} on all samples are kept. Raise epochs or delta (here "
            f"{self.delta:g}) until that is at least 2, have the run begin with scores (initial_scores=), or give "
            "policy=FullData()"
        )

    def check_start(self, entries: int, *, epochs: int) -> None:
        """Raise ConfigError as `check` when no run can be what is asked for, not even one that begins with all scores.

        Whether one does is known when the stores of all nodes are open.
        """
        try:
            self.check(RunPosition(), entries, epochs=epochs, seeded=1.0)
        except ConfigError:
            self.check(RunPosition(), entries, epochs=epochs)  # whose error says what can be without
            raise

    def annealing(self, epochs: int) -> int:
        """From which epoch on a run of ``epochs`` trains on all samples, with weight 1; ``epochs`` for none."""
        return annealing_of(self.policy, self.delta, epochs)

    def plan(
        self,
        scores: NDArray[np.float32],
        source: Shape,
        position: RunPosition,
        epochs: int,
        *,
        lanes: int,
        global_batch: int,
        include: NDArray[np.bool_] | None = None,
        seeded: float = 0.0,
    ) -> EpochPlan:
        """The plan of the epoch at ``position`` in a run of ``epochs``. scores: float32[N], committed.

        seeded: share of the samples that had a score before the first epoch.
        """
        epoch = position.epoch
        pool = source.pool(epoch)
        entries = _entries(source.num_samples, pool, include)
        policy: Policy = FullData()
        annealing = self.annealing(epochs)
        if epoch < annealing:
            chosen = self.policy
            moment = position.moment(epochs, annealing, entries, seeded)
            policy = chosen if isinstance(chosen, Policy) else chosen.at(moment)
        return EpochPlan(
            scores,
            policy,
            seed=self.seed,
            epoch=epoch,
            global_batch=global_batch,
            lanes=lanes,
            shard_sizes=source.shard_sizes,
            pool=None if pool is None else (pool.index, pool.units),
            shuffle=self.shuffle,
            window=self.shuffle_window,
            drop_last=self.drop_last,
            constant_steps=self.constant_steps,
            include=include,
        )

    def steps_unpruned(
        self, source: Shape, epoch: int, global_batch: int, include: NDArray[np.bool_] | None = None
    ) -> int:
        """Steps of ``epoch`` if nothing were pruned; with constant steps of every one."""
        entries = _entries(source.num_samples, source.pool(epoch), include)
        return count_steps(entries, global_batch, self.drop_last)

    def total_steps(
        self, source: Shape, epochs: int, global_batch: int, include: NDArray[np.bool_] | None = None
    ) -> int:
        """Steps of all ``epochs``. Raises ConfigError where that is not known in advance."""
        if not self.constant_steps and not isinstance(self.policy, FullData):
            raise ConfigError(
                "how many steps the run has is not known in advance: pruned epochs have fewer. Give InfoBatchLoader("
                "constant_steps=True), or let learning rates follow loader.progress."
            )
        differ = include is not None and source.pool(0) is not None  # epochs that mix streams draw others of them
        counted = range(epochs) if differ else range(1)
        steps = sum(self.steps_unpruned(source, epoch, global_batch, include) for epoch in counted)
        return steps if differ else steps * epochs


def _entries(num_samples: int, pool: Pool | None, include: NDArray[np.bool_] | None) -> int:
    if include is None:
        return num_samples if pool is None else int(pool.index.size)
    return int(np.count_nonzero(include if pool is None else include[pool.index]))
