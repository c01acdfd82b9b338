"""Process groups: that over which data is split, one of our own to talk in, and what an error in it says."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from infobatch_stream.errors import ConfigError, LostRanksError

__all__ = ["collective", "device_of_exchange", "group_of", "initialised", "own_group", "reaching_others", "timeout"]

# By default process group: one beside it of the same processes, so that a call of ours that a rank makes alone never
# meets another collective of the user's. They last as long as the default one, which takes them along when it ends.
_OWN: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def initialised() -> bool:
    """Whether there is a default process group."""
    return dist.is_available() and dist.is_initialized()


def group_of(given: "dist.ProcessGroup | DeviceMesh | None") -> "dist.ProcessGroup | None":
    """The process group that a mesh of one dimension stands for. Raises ConfigError for one of several."""
    if not isinstance(given, DeviceMesh):
        return given
    if given.ndim != 1:
        names = given.mesh_dim_names or ()
        raise ConfigError(
            f"process_group is a DeviceMesh of {given.ndim} dimensions {names}: give the one over which data is split, "
            'as mesh["dp"]. If it is split over several, as with hybrid sharding, make one of them first: '
            'mesh["replicate", "shard"]._flatten("dp"), and then mesh["dp"].'
        )
    return given.get_group()


def own_group() -> "dist.ProcessGroup":
    """The process group of our own. Collective when there is none yet."""
    world = dist.group.WORLD
    if world not in _OWN:
        _OWN[world] = dist.new_group(timeout=timeout())
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
def reaching_others() -> Iterator[None]:
    """Say what it means for the scores when the other processes are gone, or the network is."""
    try:
        yield
    except RuntimeError as error:  # torch's DistError is one
        raise LostRanksError(
            f"the other ranks cannot be reached ({error}). Look for the first error among them. What was recorded is "
            "in the store, whose committed scores are whole; start the run again, from its last state_dict()."
        ) from error


def device_of_exchange() -> torch.device:
    """Where tensors have to be that the processes exchange: on the CPU unless the backend knows only GPUs, as NCCL."""
    on_cpu = any(part.partition(":")[0] == "cpu" for part in str(dist.get_backend_config()).split(","))
    return torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())


def timeout() -> timedelta | None:
    """How long the default group waits for a process; torch gives a new group the default of 30 minutes instead."""
    backend = dist.group.WORLD._get_backend(device_of_exchange()) if dist.group.WORLD is not None else None
    found = getattr(getattr(backend, "options", None), "_timeout", None)
    return found if isinstance(found, timedelta) else None
