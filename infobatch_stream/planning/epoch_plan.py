"""An epoch as a table: which entries every step holds, and how a step is dealt to the ranks.

One row per lane; time runs to the right; a step is a block of columns.

    lane 0 | a a a a | a a a a | a a 0 0 |     the kept entries, shards permuted, are cut into lanes; each lane is
    lane 1 | b b b b | b b b b | b 0 0 0 |     shuffled within a window; a step's entries, lane by lane, are dealt
             step 0    step 1    step 2         to the ranks in order; 0: filled up, weight 0

    lane 0 | a a a | a a a | a a | a a |        with constant steps: as many as if nothing were pruned, and narrower
    lane 1 | b b   | b b   | b b | b b |

Pure: a function of (scores, policy, seed, epoch, lanes, global batch, window). The world size is not among them, so
any rank of any world computes any step directly, and a step holds the same on every world.
"""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.errors import ConfigError
from infobatch_stream.planning.deal import Deal, Span, count_steps
from infobatch_stream.planning.entries import Entries, KeptEntries, KeptPool, KeptSamples, KeptShards
from infobatch_stream.planning.lanes import Lane, PermutedLane, StraightLane, WindowLane, fill, repeat
from infobatch_stream.planning.rng import permutation
from infobatch_stream.planning.selection import Selection
from infobatch_stream.policies.base import Policy, rule_of, threshold_of
from infobatch_stream.score_stats import Summary

__all__ = ["EpochPlan"]


class EpochPlan:
    """What each step of an epoch holds.

    Args:
        scores: float32[N], committed scores, NaN = never seen. Read whenever a step is asked for, so they must
            not change while the plan is used.
        policy: How samples are chosen.
        seed: 0 <= seed < 2^64; with the epoch it makes the order and the choice.
        epoch: From 0.
        global_batch: Entries per step over all ranks, if nothing were pruned.
        lanes: How many lanes; divides ``global_batch``.
        shard_sizes: int64[S], samples per shard, or None for data without shards, which is permuted as a whole.
        pool: (index int64[P], units int64[U]) of a mixed epoch, instead of each sample once.
        shuffle: False keeps the order of the indices.
        window: Entries among which a lane is shuffled.
        drop_last: Make no more steps than are full (but one), if nothing were pruned.
        constant_steps: Make as many steps as if nothing were pruned, of fewer entries each.
        include: bool[N], the samples that there are entries of; None: all.

    Raises ConfigError when lanes do not divide the global batch, or when nothing is kept.

    Attributes:
        epoch: As given.
        entries: How many entries the epoch draws from (N without a pool and a mask).
        kept: How many of them are kept.
        steps: How many steps every rank makes.
        trained: Entries that these hold, filled-up ones not counted; ``kept`` without drop_last.
        smallest: Entries of the smallest step over all ranks, filled-up ones included.
        infinite: How many scores are that, and count as never seen.
        threshold: The score from which most is kept, NaN without one.
        mean_score: Of the scores, NaN if none is known.
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
        constant_steps: bool = False,
        include: NDArray[np.bool_] | None = None,
    ) -> None:
        if lanes < 1 or global_batch % lanes:
            raise ConfigError(
                f"the global batch of {global_batch} cannot be cut into {lanes} equal lanes; "
                "choose canonical_nodes (lanes) that divides batch_size * world size."
            )
        index = None if pool is None else pool[0]
        self.entries = int(scores.size) if index is None else int(index.size)
        if include is not None:
            index = None if index is None else index[include[index]]
            self.entries = int(np.count_nonzero(include)) if index is None else int(index.size)
        summary = Summary(scores, index, include)
        rule = rule_of(policy, summary)
        selection = Selection(summary.scores, rule, seed, epoch, include)
        self.infinite = summary.infinite
        self.mean_score = summary.mean
        self.threshold = threshold_of(rule) if rule and summary.count else math.nan
        kept = _kept(selection, seed, epoch, shard_sizes, pool, shuffle) if self.entries else None
        if kept is None or not kept.size:
            raise ConfigError(f"{policy} keeps none of the {self.entries} entries of epoch {epoch}; keep more.")
        self.kept = kept.size
        if constant_steps:
            steps = count_steps(self.entries, global_batch, drop_last)
            self._deal = Deal.even(min(self.kept, steps * global_batch), lanes, steps)
        else:
            self._deal = Deal.full(self.kept, lanes, global_batch, drop_last)
        self.steps, self.smallest = self._deal.steps, self._deal.size
        self.trained = min(self.kept, self.steps * global_batch)
        self.epoch = epoch
        self._global_batch = global_batch
        self._lanes: list[Lane] = []
        stop = 0
        for lane, size in enumerate(self._deal.lane_sizes):
            start, stop = stop, stop + size
            if not shuffle:
                self._lanes.append(StraightLane(kept, start, stop))
            elif isinstance(kept, KeptSamples):
                self._lanes.append(PermutedLane(kept, start, stop, self._deal.stretches(lane), (seed, epoch)))
            else:
                self._lanes.append(WindowLane(kept, start, stop, window, (seed, epoch, lane)))

    def step(self, step: int, rank: int = 0, world_size: int = 1) -> Entries:
        """What ``rank`` of ``world_size`` reads in ``step``: global batch / world size entries, or its share.

        The steps of all ranks, one after the other, are the same on every world size, but for what is filled up.
        """
        if self._global_batch % world_size:
            raise ConfigError(f"{world_size} ranks cannot share a global batch of {self._global_batch} equally.")
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of an epoch of {self.steps} steps")
        parts = [part for span in self._deal.spans(step, rank, world_size) for part in self._read(span)]
        if not parts:  # fewer entries than ranks
            lane, start, stop = self._deal.idle(step, rank, world_size)
            parts = [repeat(self._lanes[lane].entries(start, stop))]
        return Entries.join(parts)

    def _read(self, span: Span) -> Iterator[Entries]:
        lane = self._lanes[span.lane]
        full = min(max(lane.size, span.start), span.stop)
        if span.start < full:
            yield lane.entries(span.start, full)
        if full < span.stop:  # with fewer entries than lanes some lanes are empty: they repeat the first one's
            yield fill(lane if lane.size else self._lanes[0], full, span.stop)


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
