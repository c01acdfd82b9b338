"""The ranks: which of the processes this one is, and how all of them act together."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import torch.distributed as dist

from infobatch_stream._process_wide import let_gloo_end
from infobatch_stream.distributed.groups import Groups
from infobatch_stream.distributed.process_group import group_of, initialised, own_group, reaching_others
from infobatch_stream.errors import ConfigError, LostRanksError, OutOfStepError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Ranks"]

T = TypeVar("T")

_REMEDY = (
    "Every rank must make the same loader, iterate it equally far, and call iter(), commit(), state_dict() and "
    "load_state_dict() together with the others."
)

_NODES: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # by default process group: on how many nodes it is


class Ranks:
    """This process among the others.

    Data is split over ``process_group`` (default: all processes). Processes outside of it belong to groups of
    their own with equal data (peers in tensor or pipeline parallelism), so what is done together is done by all
    processes of the default group.

    Attributes:
        rank, world_size: among those over which data is split.
        process, processes: this one's number among all, and their number.
        records: whether this process's losses are recorded: one of each set of peers does.
        nodes: how many machines the processes are on, as their launcher tells; else 1. A guess until `count_nodes`.
    """

    @staticmethod
    def known() -> bool:
        """Whether it can be told by now who the ranks are."""
        return initialised() or int(os.environ.get("WORLD_SIZE", "1")) <= 1

    def __init__(self, process_group: "dist.ProcessGroup | DeviceMesh | None" = None) -> None:
        self.rank, self.world_size, self.nodes = 0, 1, 1
        self.process, self.processes = 0, 1
        self.records = True
        self._groups: Groups | None = None
        if not initialised():
            claimed = int(os.environ.get("WORLD_SIZE", "1"))
            if claimed > 1:
                raise ConfigError(
                    f"WORLD_SIZE is {claimed}, but torch.distributed is not initialised, so every process would "
                    "train on all the data. Call torch.distributed.init_process_group before making the loader."
                )
            return
        let_gloo_end()
        self.process, self.processes = dist.get_rank(), dist.get_world_size()
        process_group = group_of(process_group)
        self.rank, self.world_size = dist.get_rank(process_group), dist.get_world_size(process_group)
        if self.rank < 0:
            raise ConfigError(
                f"process {self.process} is not in the process_group that was given to it: pass each process the "
                "group over which its own data is split."
            )
        self.records = process_group is None or 0 in dist.get_process_group_ranks(process_group)
        guess = max(1, self.processes // (_told("LOCAL_WORLD_SIZE") or self.processes))
        self.nodes = _told("GROUP_WORLD_SIZE") or _NODES.get(dist.group.WORLD) or guess

    def count_nodes(self) -> None:
        """Have `nodes` equal on all processes, as it has to be before anything is planned. Collective.

        torchrun tells it. Other launchers, as Ray Train, only tell each process how many there are on its own node.
        """
        if self.processes > 1 and not _told("GROUP_WORLD_SIZE") and dist.group.WORLD not in _NODES:
            everyone = self._exchange("counting the nodes", {"local": _told("LOCAL_WORLD_SIZE") or self.processes})
            self.nodes = _NODES[dist.group.WORLD] = max(1, round(sum(1 / facts["local"] for facts in everyone)))

    def gather(self, value: T) -> list[T]:
        """``value`` of every process, in the order of their ranks. Collective."""
        if not initialised():
            if self.processes > 1:
                raise OutOfStepError(
                    f"the process group of {self.processes} processes was ended, and this is a call of all ranks: "
                    "leave the loader's 'with' block, or call commit(), before destroy_process_group()."
                )
            return [value]
        found: list[Any] = [None] * dist.get_world_size()
        with reaching_others():
            dist.all_gather_object(found, value, group=own_group())
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
        except LostRanksError:
            raise  # there is nobody to tell
        except Exception as failure:  # raised below, after the others have heard of it
            error = failure
        everyone = self._exchange(call, {"failure": None if error is None else f"{type(error).__name__}: {error}"})
        if error is not None:
            raise error
        for rank, theirs in enumerate(everyone):
            if theirs["failure"] is not None:
                raise OutOfStepError(f"{call} failed on rank {rank}: {theirs['failure']}")
        return result[0]

    def grouped(self, members: list[list[int]]) -> "Groups":
        """The processes in groups, each of which works on one copy of something. Collective.

        members: disjoint lists of ascending process numbers, together all of them; equal on every process.
        """
        if self._groups is None or self._groups.members != members:  # their process groups last as long as the run
            self._groups = Groups(members, self.process)
        return self._groups


def _told(name: str) -> int:
    """What the launcher tells in this environment variable; 0: nothing."""
    return int(os.environ.get(name) or "0")
