"""The ranks among which an epoch is split: who they are, and how they act together.

The only module that imports torch.distributed. Ranks talk at the ends of epochs, never at a step.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from infobatch_stream._process_wide import let_gloo_end
from infobatch_stream.errors import ConfigError, LostRanksError, OutOfStepError

__all__ = ["Groups", "Ranks", "collective"]

T = TypeVar("T")

_REMEDY = (
    "Every rank must make the same loader, iterate it equally far, and call iter(), commit(), state_dict() and "
    "load_state_dict() together with the others."
)


# By default process group: one beside it of the same processes, so that a call of ours that a rank makes alone never
# meets another collective of the user's. They last as long as the default one, which takes them along when it ends.
_OWN: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
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
        return _initialised() or int(os.environ.get("WORLD_SIZE", "1")) <= 1

    def __init__(self, process_group: "dist.ProcessGroup | None" = None) -> None:
        self.rank, self.world_size, self.nodes = 0, 1, 1
        self.process, self.processes = 0, 1
        self.records = True
        self._groups: Groups | None = None
        if not _initialised():
            claimed = int(os.environ.get("WORLD_SIZE", "1"))
            if claimed > 1:
                raise ConfigError(
                    f"WORLD_SIZE is {claimed}, but torch.distributed is not initialised, so every process would "
                    "train on all the data. Call torch.distributed.init_process_group before making the loader."
                )
            return
        let_gloo_end()
        self.process, self.processes = dist.get_rank(), dist.get_world_size()
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
        if not _initialised():
            if self.processes > 1:
                raise OutOfStepError(
                    f"the process group of {self.processes} processes was ended, and this is a call of all ranks: "
                    "leave the loader's 'with' block, or call commit(), before destroy_process_group()."
                )
            return [value]
        found: list[Any] = [None] * dist.get_world_size()
        with _reaching_others():
            dist.all_gather_object(found, value, group=_own())
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


class Groups:
    """Groups of processes that each hold one copy of a long array, and how the copies are made equal.

    The j-th processes of all groups make up column j, which works on the j-th share of the array:

                   share 0    share 1
        group 0    process 0  process 1       two nodes of two ranks: the columns are {0, 2} and {1, 3}, so all links
        group 1    process 2  process 3       of a node are used, and each entry crosses between nodes once

    Attributes:
        members: the processes of each group. count: number of groups. mine: which of them is this process's.
        leads: whether this process is the first of its group.
        leaders: the first process of each.
    """

    def __init__(self, members: list[list[int]], process: int) -> None:
        self.members, self.count = members, len(members)
        self.mine = next(group for group, ranks in enumerate(members) if process in ranks)
        self.leaders = [ranks[0] for ranks in members]
        self.leads = self.leaders[self.mine] == process
        self._width = min(map(len, members))
        place = members[self.mine].index(process)
        self._column = place if place < self._width else None
        self._peers: Any = None
        if self.count > 1:
            for column in range(self._width):
                with _reaching_others():
                    peers = dist.new_group([ranks[column] for ranks in members], timeout=_timeout())
                if column == self._column:
                    self._peers = peers

    def share(self, length: int) -> range:
        """The entries, of ``length``, that this process brings to the other groups; empty where others do."""
        if self._column is None:
            return range(0)
        return range(self._column * length // self._width, (self._column + 1) * length // self._width)

    def merge(self, losses: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32[k]: of each entry the largest loss that a process of this column has, NaN where none has one.

        Collective among them. Each gathers a piece: the others send it what they have seen there, so that a loss which
        one process has crosses once; then the pieces go round. Of each entry a process so sends little more than 4
        bytes, however many processes there are; in an all-reduce in a ring it would be up to 8::

            process 0 has 1 . . 4, and gathers the first half: 1 2
            process 1 has . 2 3 ., and gathers the second:         3 4
        """
        place = dist.get_rank(self._peers)  # not always that of the group: torch sorts the processes
        size = -(-losses.size // (32 * self.count)) * 32  # of a piece: whole words of bits
        pieces = np.full((self.count, size), np.nan, dtype=np.float32)
        pieces.reshape(-1)[: losses.size] = losses
        own = pieces[place].copy()
        own[np.isnan(own)] = np.nan  # the same NaN on all, so that files are equal to the bit
        pieces[place] = np.nan  # nothing of it is sent
        with _reaching_others():
            for parcel in self._swap([_parcel(piece) for piece in pieces]):
                seen = np.flatnonzero(np.unpackbits(parcel[: size // 32].view(np.uint8), count=size).view(np.bool_))
                own[seen] = np.fmax(own[seen], parcel[size // 32 :].view(np.float32))
            everyones = torch.empty((self.count, size), dtype=torch.float32, device=_device())
            dist.all_gather(list(everyones), torch.from_numpy(own).to(everyones.device), group=self._peers)
        return everyones.cpu().numpy().reshape(-1)[: losses.size]

    def _swap(self, parcels: list[NDArray[np.int32]]) -> Iterator[NDArray[np.int32]]:
        """Send parcel number j to the j-th process of this column; -> what each sends here."""
        sizes = torch.tensor([parcel.size for parcel in parcels], device=_device())
        theirs = torch.empty_like(sizes)
        dist.all_to_all_single(theirs, sizes, group=self._peers)
        found = torch.empty(int(theirs.sum()), dtype=torch.int32, device=sizes.device)
        sent = torch.from_numpy(np.concatenate(parcels)).to(sizes.device)
        dist.all_to_all_single(found, sent, theirs.tolist(), sizes.tolist(), group=self._peers)
        yield from np.split(found.cpu().numpy(), np.cumsum(theirs.tolist())[:-1])

    def from_group(self, group: int, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """``values`` (float32[k]) of the leader of ``group``. Collective among the leaders."""
        tensor = torch.from_numpy(values).to(_device())
        with _reaching_others():
            dist.broadcast(tensor, self.leaders[group], group=self._peers)
        return tensor.cpu().numpy()


def _parcel(losses: NDArray[np.float32]) -> NDArray[np.int32]:
    """A bit for each of ``losses`` (float32[32 k]) that says whether it is not NaN; then those that are not."""
    seen = ~np.isnan(losses)
    values: NDArray[np.int32] = losses[np.flatnonzero(seen)].view(np.int32)
    return np.concatenate([np.packbits(seen).view(np.int32), values])


def _told(name: str) -> int:
    """What the launcher tells in this environment variable; 0: nothing."""
    return int(os.environ.get(name) or "0")


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def _own() -> "dist.ProcessGroup":
    """The process group of our own. Collective when there is none yet."""
    world = dist.group.WORLD
    if world not in _OWN:
        _OWN[world] = dist.new_group(timeout=_timeout())
    group: dist.ProcessGroup = _OWN[world]
    return group


@contextmanager
def collective(call: str) -> Iterator[None]:
    """Have the error of ranks that wait for others in vain say that it was in ``call``, which all have to make."""
    try:
        yield
    except LostRanksError as error:
        raise LostRanksError(
            f"{call} is collective: every rank must call it, at the same place of the run. Here a rank did not, or "
            f"{error}"
        ) from error


@contextmanager
def _reaching_others() -> Iterator[None]:
    """Say what it means for the scores when the other processes are gone, or the network is."""
    try:
        yield
    except RuntimeError as error:  # torch's DistError is one
        raise LostRanksError(
            f"the other ranks cannot be reached ({error}). Look for the first error among them. What was recorded is "
            "in the store, whose committed scores are whole; start the run again, from its last state_dict()."
        ) from error


def _device() -> torch.device:
    """Where tensors have to be that the processes exchange: on the CPU unless the backend knows only GPUs, as NCCL."""
    on_cpu = any(part.partition(":")[0] == "cpu" for part in str(dist.get_backend_config()).split(","))
    return torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())


def _timeout() -> timedelta | None:
    """How long the default group waits for a process; torch gives a new group the default of 30 minutes instead."""
    backend = dist.group.WORLD._get_backend(_device()) if dist.group.WORLD is not None else None
    found = getattr(getattr(backend, "options", None), "_timeout", None)
    return found if isinstance(found, timedelta) else None
