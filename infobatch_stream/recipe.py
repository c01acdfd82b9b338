"""How the epochs of a run are planned: the options that make the picks, validated once."""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.arguments import whole_number
from infobatch_stream.errors import ConfigError
from infobatch_stream.plan import EpochPlan, count_steps
from infobatch_stream.policies import FullData, Moment, Policy, Schedule, annealing_epoch, try_policy
from infobatch_stream.sources.base import Source

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe:
    """Everything but data, scores and world that decides what an epoch holds; see `InfoBatchLoader` for each.

    Raises ConfigError for values that cannot work.
    """

    policy: Policy | Schedule
    delta: float
    seed: int
    shuffle: bool
    shuffle_window: int
    drop_last: bool

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

    def check(self, epoch: int, entries: int, *, epochs: int, so_far: tuple[int, int] | None) -> str:
        """What the user should hear of the run as it stands; "" if nothing.

        entries: of the epoch; see `plan` for the others.
        Raises ConfigError at epoch 0 when no run of ``epochs`` can be what the policy asks for, or its rule is none.
        """
        policy, annealing = self.policy, annealing_epoch(self.delta, epochs)
        said = "" if isinstance(policy, Policy) else policy.check(self._moment(epoch, entries, epochs, so_far))
        if epoch or isinstance(policy, FullData):
            return said
        if annealing > 1:
            try_policy(
                policy
                if isinstance(policy, Policy)
                else policy.at(self._moment(1, entries, epochs, (entries, entries)))
            )
            return said
        return said or (
            f"nothing can be pruned in this run of {epochs} epoch(s): the first one has no scores to go by, and from "
            f"epoch floor(delta * epochs) = {annealing} on all samples are kept. Raise epochs or delta (here "
            f"{self.delta:g}) until that is at least 2, or give policy=FullData()"
        )

    def anneals(self, epoch: int, epochs: int) -> bool:
        """Whether ``epoch`` of a run of ``epochs`` trains on all samples, with weight 1."""
        return epoch >= annealing_epoch(self.delta, epochs)

    def plan(
        self,
        scores: NDArray[np.float32],
        source: Source,
        epoch: int,
        *,
        epochs: int,
        so_far: tuple[int, int] | None,
        lanes: int,
        global_batch: int,
    ) -> EpochPlan:
        """The plan of ``epoch`` in a run of ``epochs``.

        scores: float32[N], committed. so_far: entries of the epochs before, and how many of them were trained on; None
        where that is not known.
        """
        pool = source.pool(epoch)
        entries = source.num_samples if pool is None else int(pool.index.size)
        policy: Policy = FullData()
        if not self.anneals(epoch, epochs):
            chosen = self.policy
            policy = chosen if isinstance(chosen, Policy) else chosen.at(self._moment(epoch, entries, epochs, so_far))
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
        )

    def _moment(self, epoch: int, entries: int, epochs: int, so_far: tuple[int, int] | None) -> Moment:
        offered, skipped = (None, None) if so_far is None else (so_far[0], so_far[0] - so_far[1])
        return Moment(epoch, epochs, annealing_epoch(self.delta, epochs), entries, offered, skipped)

    def steps_unpruned(self, source: Source, epoch: int, global_batch: int) -> int:
        """Steps of ``epoch`` if nothing were pruned."""
        pool = source.pool(epoch)
        return count_steps(source.num_samples if pool is None else int(pool.index.size), global_batch, self.drop_last)
