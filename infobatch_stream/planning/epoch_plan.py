"""An epoch as a table: which entries every step holds, and how a step is dealt to the ranks.

One row per lane; time runs to the right; a step is a block of columns.

    lane 0 | a a a a | a a a a | a a 0 0 |     the kept entries, shards permuted, are cut into equal lanes;
    lane 1 | b b b b | b b b b | b 0 0 0 |     each lane is shuffled within a window; a step's entries, lane by
             step 0    step 1    step 2         lane, are dealt to the ranks in order; 0: filled up, weight 0

Pure: a function of (scores, policy, seed, epoch, lanes, global batch, window). The world size is not among them, so
any rank of any world computes any step directly, and a step holds the same on every world.
"""

import math

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.errors import ConfigError
from infobatch_stream.planning.entries import Entries, KeptEntries, KeptPool, KeptSamples, KeptShards
from infobatch_stream.planning.lanes import Lane, PermutedLane, StraightLane, WindowLane, fill
from infobatch_stream.planning.rng import permutation
from infobatch_stream.planning.selection import Selection
from infobatch_stream.policies.base import Policy, rule_of, threshold_of
from infobatch_stream.policies.pruning import FullData
from infobatch_stream.score_stats import Summary

__all__ = ["EpochPlan", "count_steps"]


def count_steps(entries: int, global_batch: int, drop_last: bool) -> int:
    """Steps of an epoch of ``entries``: the last one filled up, or dropped unless it is the only one."""
    return max(1, entries // global_batch) if drop_last else -(-entries // global_batch)


class EpochPlan:
    """What each step of an epoch holds.

    Args:
        scores: float32[N], committed scores, NaN = never seen. Read whenever a step is asked for, so they must
            not change while the plan is used.
        policy: how samples are chosen.
        seed: 0 <= seed < 2^64. epoch: from 0. Together they make the order and the choice.
        global_batch: entries per step over all ranks. lanes: how many equal lanes; divides ``global_batch``.
        shard_sizes: int64[S], samples per shard, or None for data without shards, which is permuted as a whole.
        pool: (index int64[P], units int64[U]) of a mixed epoch, instead of each sample once.
        shuffle: False keeps the order of the indices. window: entries among which a lane is shuffled.
        drop_last: drop the last step unless it is full (or the only one), instead of filling it up.

    Raises ConfigError when lanes do not divide the global batch, or when nothing is kept.

    Attributes:
        epoch: as given. entries: how many entries the epoch draws from (N without a pool).
        kept: how many of them are kept. steps: how many steps every rank makes. trained: entries that these hold,
        filled-up ones not counted; ``kept`` without drop_last.
        infinite: how many scores are that, and count as never seen.
        threshold: the score from which most is kept, NaN without one. mean_score: of the scores, NaN if none is known.
    """

    def __init__(
        self,
        scores: NDArray[np.float32],
        policy: Policy,
        *,
        seed: int,
        epoch: int,
        global_batch: int,
        lanes: int = 1,
        shard_sizes: NDArray[np.int64] | None = None,
        pool: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None,
        shuffle: bool = True,
        window: int = 65536,
        drop_last: bool = False,
    ) -> None:
        if lanes < 1 or global_batch % lanes:
            raise ConfigError(
                f"the global batch of {global_batch} cannot be cut into {lanes} equal lanes; "
                "choose canonical_nodes (lanes) that divides batch_size * world size."
            )
        summary = Summary(scores, None if pool is None else pool[0])
        rule = rule_of(policy, summary) if summary.count and not isinstance(policy, FullData) else None
        selection = Selection(summary.scores, rule, seed, epoch)
        self.infinite = summary.infinite
        self.mean_score = summary.mean
        self.threshold = math.nan if rule is None else threshold_of(rule)
        self.entries = int(scores.size) if pool is None else int(pool[0].size)
        kept = _kept(selection, seed, epoch, shard_sizes, pool, shuffle) if self.entries else None
        if kept is None or not kept.size:
            raise ConfigError(f"{policy} keeps none of the {self.entries} entries of epoch {epoch}; keep more.")
        self.kept = kept.size
        self.steps = count_steps(self.kept, global_batch, drop_last)
        self.trained = min(self.kept, self.steps * global_batch)
        self.epoch = epoch
        self._global_batch = global_batch
        share, extra = divmod(self.kept, lanes)
        cuts = [lane * share + min(lane, extra) for lane in range(lanes + 1)]
        self._lanes: list[Lane] = []
        for lane in range(lanes):
            span = cuts[lane], cuts[lane + 1]
            if not shuffle:
                self._lanes.append(StraightLane(kept, *span))
            elif isinstance(kept, KeptSamples):
                self._lanes.append(PermutedLane(kept, *span, global_batch // lanes, (seed, epoch)))
            else:
                self._lanes.append(WindowLane(kept, *span, window, (seed, epoch, lane)))

    def step(self, step: int, rank: int = 0, world_size: int = 1) -> Entries:
        """What ``rank`` of ``world_size`` reads in ``step``: Entries of global batch / world size.

        The steps of all ranks, one after the other, are the same on every world size.
        """
        if self._global_batch % world_size:
            raise ConfigError(f"{world_size} ranks cannot share a global batch of {self._global_batch} equally.")
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of an epoch of {self.steps} steps")
        own = self._global_batch // world_size
        first, last = rank * own, (rank + 1) * own
        width = self._global_batch // len(self._lanes)
        parts = []
        for number in range(first // width, (last - 1) // width + 1):
            start = step * width + max(first - number * width, 0)
            stop = step * width + min(last - number * width, width)
            lane = self._lanes[number]
            full = min(max(lane.size, start), stop)
            if start < full:
                parts.append(lane.entries(start, full))
            if full < stop:  # with fewer entries than lanes some lanes are empty: they repeat the first one's
                parts.append(fill(lane if lane.size else self._lanes[0], full, stop))
        return Entries.join(parts)


def _kept(
    selection: Selection,
    seed: int,
    epoch: int,
    shard_sizes: NDArray[np.int64] | None,
    pool: tuple[NDArray[np.int64], NDArray[np.int64]] | None,
    shuffle: bool,
) -> KeptEntries:
    if shard_sizes is None and pool is None:
        return KeptSamples(selection)
    units = shard_sizes if pool is None else pool[1]
    assert units is not None
    order = permutation(seed, epoch, units.size) if shuffle else np.arange(units.size, dtype=np.int64)
    if pool is None:
        return KeptShards(selection, units, order)
    return KeptPool(selection, pool[0], units, order)
