"""The steps that come next, and the shards that they need first: what can be downloaded ahead of use."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.planning.entries import Entries
from infobatch_stream.planning.epoch_plan import EpochPlan

__all__ = ["Lookahead", "UpcomingStep", "cache_advice", "shards_in_window"]


@dataclass(frozen=True)
class UpcomingStep:
    """One step, and the shards to fetch with it.

    Attributes:
        entries: Of the step.
        shards: That it needs, in groups by the step that first needed them.
        readahead: Shards that later steps need, to be fetched in advance.
    """

    entries: Entries
    shards: tuple[tuple[int, ...], ...]
    readahead: tuple[int, ...]


class Lookahead:
    """The entries of one rank, step by step, each computed once, with the shards of the steps that follow.

    Memory: the entries of ``ahead`` steps, and two numbers for each of their shards.

    Args:
        shard_sizes: int64[S], samples per shard.
        ahead: How many steps it looks ahead, at least 0.
        capacity: At most so many shards are in view, the current step's included; None: any number. (To fetch more
            than a cache holds would drop what is needed before.)
    """

    def __init__(self, shard_sizes: NDArray[np.int64], ahead: int, capacity: int | None = None) -> None:
        self._ends = np.cumsum(shard_sizes)
        self._ahead = ahead
        self._capacity = capacity

    def steps(self, plan: EpochPlan, first: int, rank: int, world_size: int) -> Iterator[UpcomingStep]:
        """Each of the steps first.. of ``plan``, with what is in view from there.

        The view widens gradually, so that each of several workers gets a share of what is in it at the start.
        """
        coming = self._coming(plan, first, rank, world_size)
        following, coming_step = next(coming, None), first
        seen: deque[tuple[Entries, list[int]]] = deque()
        known: dict[int, list[int]] = {}  # shards in view: the first step that needs each, and how many do
        while seen or following is not None:
            step = coming_step - len(seen)
            new: list[int] = []
            widest = min(step + self._ahead, coming_step + 1 + self._ahead // 8)
            while following is not None and (not seen or coming_step <= widest):
                unknown = [shard for shard in following[1] if shard not in known]
                if seen and self._capacity is not None and len(known) + len(unknown) > self._capacity:
                    break
                for shard in unknown:
                    known[shard] = [coming_step, 0]
                for shard in following[1]:
                    known[shard][1] += 1
                new += unknown
                seen.append(following)
                following, coming_step = next(coming, None), coming_step + 1
            entries, shards = seen.popleft()
            now: dict[int, list[int]] = {}
            for shard in shards:
                now.setdefault(known[shard][0], []).append(shard)
            groups = tuple(tuple(now[need]) for need in sorted(now))
            yield UpcomingStep(entries, groups, tuple(shard for shard in new if known[shard][0] != step))
            for shard in shards:
                known[shard][1] -= 1
                if not known[shard][1]:
                    del known[shard]

    def _coming(self, plan: EpochPlan, first: int, rank: int, world_size: int) -> Iterator[tuple[Entries, list[int]]]:
        """Each step's entries and shards."""
        for step in range(first, plan.steps):
            entries = plan.step(step, rank, world_size)
            yield entries, np.unique(np.searchsorted(self._ends, entries.index, side="right")).tolist()


def shards_in_window(shard_sizes: NDArray[np.int64], plan: EpochPlan, window: int, lanes: int) -> int:
    """About how many shards a step in mid-epoch draws from: those of a ``window`` of kept entries in each lane."""
    shards = int((shard_sizes > 0).sum())
    return min(shards, lanes * (1 + -(-min(window, plan.kept) * shards // plan.kept)))


def cache_advice(shard_sizes: NDArray[np.int64], capacity: int, plan: EpochPlan, window: int, lanes: int) -> str:
    """What to say of a cache of ``capacity`` shards that drops some within an epoch; "" of one that is large enough."""
    needed = shards_in_window(shard_sizes, plan, window, lanes)
    if capacity >= needed:
        return ""
    return (
        f"the cache_limit of the dataset holds about {capacity} shards, but a shuffle_window of {window} entries lies "
        f"in {needed}: shards will be dropped and downloaded again within an epoch. Raise the cache_limit, or lower "
        "shuffle_window."
    )
