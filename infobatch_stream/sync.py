"""The ranks among which an epoch is split: who they are, and how they act together.

The only module that imports torch.distributed. Ranks talk at the ends of epochs, never at a step.
"""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from infobatch_stream.errors import ConfigError, OutOfStepError

__all__ = ["Ranks"]

T = TypeVar("T")

_REMEDY = (
    "Every rank must make the same loader, iterate it equally far, and call iter(), commit(), state_dict() and "
    "load_state_dict() together with the others."
)


class Ranks:
    """This process among the others.

    Data is split over ``process_group`` (default: all processes). Processes outside of it belong to groups of
    their own with equal data (peers in tensor or pipeline parallelism), so what is done together is done by all
    processes of the default group.

    Attributes:
        rank, world_size: among those over which data is split.
        leads: whether this process acts for all (it is the first of all).
        records: whether this process's losses are recorded: one of each set of peers does.
        nodes: how many machines the processes are on, as torchrun's LOCAL_WORLD_SIZE tells; else 1.
    """

    @staticmethod
    def known() -> bool:
        """Whether it can be told by now who the ranks are."""
        return _initialised() or int(os.environ.get("WORLD_SIZE", "1")) <= 1

    def __init__(self, process_group: "dist.ProcessGroup | None" = None) -> None:
        self.rank, self.world_size, self.nodes = 0, 1, 1
        self.leads = self.records = True
        if not _initialised():
            claimed = int(os.environ.get("WORLD_SIZE", "1"))
            if claimed > 1:
                raise ConfigError(
                    f"WORLD_SIZE is {claimed}, but torch.distributed is not initialised, so every process would "
                    "train on all the data. Call torch.distributed.init_process_group before making the loader."
                )
            return
        self.rank, self.world_size = dist.get_rank(process_group), dist.get_world_size(process_group)
        if self.rank < 0:
            raise ConfigError(
                f"process {dist.get_rank()} is not in the process_group that was given to it: pass each process the "
                "group over which its own data is split."
            )
        self.leads = dist.get_rank() == 0
        self.records = process_group is None or 0 in dist.get_process_group_ranks(process_group)
        everyone = dist.get_world_size()
        local = int(os.environ.get("LOCAL_WORLD_SIZE", str(everyone)))
        self.nodes = max(1, everyone // local) if local > 0 else 1

    def gather(self, value: T) -> list[T]:
        """``value`` of every process, in the order of their ranks. Collective."""
        if not _initialised():
            return [value]
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, value)
        return found

    def _exchange(self, call: str, facts: dict[str, Any]) -> list[dict[str, Any]]:
        """``facts`` of every process, all of which make the same ``call``, or every one of them raises."""
        everyone = self.gather((call, facts))
        for rank, (theirs, _) in enumerate(everyone):
            if theirs != everyone[0][0]:
                raise OutOfStepError(
                    f"the ranks are out of step: rank 0 is in {everyone[0][0]}, rank {rank} in {theirs}. {_REMEDY}"
                )
        return [found for _, found in everyone]

    def agree(self, call: str, **facts: Any) -> None:
        """Raise OutOfStepError on every process unless all make the same call with equal facts. Collective."""
        everyone = self._exchange(call, facts)
        for rank, theirs in enumerate(everyone):
            differing = [name for name, value in everyone[0].items() if theirs.get(name) != value]
            if differing:
                here, there = (
                    ", ".join(f"{name}={found.get(name)!r}" for name in differing) for found in (everyone[0], theirs)
                )
                raise OutOfStepError(
                    f"the ranks are out of step in {call}: rank 0 has {here}, rank {rank} has {there}. {_REMEDY}"
                )

    def together(self, call: str, action: Callable[[], T]) -> T:
        """Run ``action`` on every process; when it fails on one, raise on all. Collective.

        The process on which it failed raises its own error, the others OutOfStepError with its text.
        """
        result: list[T] = []
        error: Exception | None = None
        try:
            result.append(action())
        except Exception as failure:  # raised below, after the others have heard of it
            error = failure
        everyone = self._exchange(call, {"failure": None if error is None else f"{type(error).__name__}: {error}"})
        if error is not None:
            raise error
        for rank, theirs in enumerate(everyone):
            if theirs["failure"] is not None:
                raise OutOfStepError(f"{call} failed on rank {rank}: {theirs['failure']}")
        return result[0]


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()
