"""Shared memory that StreamingDatasets of killed processes left: until it is removed, their folders count as in use."""

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from infobatch_stream.errors import ConfigError

__all__ = ["SharedState", "remove_stale_memory"]

_SEGMENT = re.compile(
    r"(\d{6})_(locals|barrier|next_epoch|cache_usage|shard_states|shard_access_times|resume|epoch_shape|epoch_data)"
)
_MAPPED = re.compile(r"^\S+ \S+ \S+ ([0-9a-f]+):([0-9a-f]+) (\d+) ", re.M)  # device and inode: see proc(5)

_FIRST_NAMESPACE = "pid:[4026531836]"  # PROC_PID_INIT_INO of Linux


@dataclass(frozen=True)
class SharedState:
    """The shared memory of one StreamingDataset: the folders of its streams, and the processes that have it open."""

    folders: tuple[str, ...]
    processes: tuple[int, ...]


def remove_stale_memory(
    memory: Path = Path("/dev/shm"),  # noqa: S108
    *,
    not_shared: bool = False,
) -> tuple[list[SharedState], list[SharedState]]:
    """Remove the shared memory of StreamingDatasets that no living process has open: (what was removed, what stays).

    Call it before a run, and where the run will be: it sees the processes of this container, or this machine, and only
    what belongs to this user. (streaming's `clean_stale_shared_memory` also takes what other runs are using.)

    Raises ConfigError where the system does not tell which memory a process has open. Such is a container, whose shared
    memory others may have too; unless the caller knows that it is ``not_shared``.
    """
    processes = Path("/proc")
    if not memory.is_dir() or not (processes / "self" / "maps").exists():
        raise ConfigError(
            f"this system has no {memory} and /proc, so it cannot be told which shared memory is in use. When no "
            "other run is on this machine, call streaming.base.util.clean_stale_shared_memory()."
        )
    found: dict[str, list[Path]] = {}
    places: dict[tuple[int, int, int], Path] = {}  # names are used again
    for file in sorted(memory.iterdir()):
        match = _SEGMENT.fullmatch(file.name)
        with suppress(FileNotFoundError):  # its process ends just now, and removes it
            if match and (stat := file.stat()) and os.geteuid() in (stat.st_uid, 0):
                found.setdefault(match[1], []).append(file)
                places[os.major(stat.st_dev), os.minor(stat.st_dev), stat.st_ino] = file
    users = _users(processes, places)
    states = {
        prefix: SharedState(
            _folders(memory / f"{prefix}_locals"), tuple(sorted({user for file in files for user in users[file]}))
        )
        for prefix, files in found.items()
    }
    unused = {prefix: state for prefix, state in states.items() if not state.processes}
    if unused and not not_shared and not _sees_all(processes):
        folders = ", ".join(sorted({folder for state in unused.values() for folder in state.folders}))
        raise ConfigError(
            f"this process is in a container, and sees no process outside of it. Such may use {memory} too, if that is "
            "shared (docker's --ipc=host or --ipc=container:..., a pod), so nothing is removed. No process in here "
            f"uses {folders or 'what is there'}. If {memory} is not shared, or no other run uses it, call "
            "'infobatch-stream unlock --not-shared'; else call 'infobatch-stream unlock' outside of all containers, as "
            "the same user."
        )
    for prefix in unused:
        for file in found[prefix]:
            file.unlink(missing_ok=True)
    return list(unused.values()), [state for state in states.values() if state.processes]


def _sees_all(processes: Path) -> bool:
    """Whether ``processes`` are those of the whole machine: this one is in the first namespace of process numbers."""
    try:
        return str((processes / "self" / "ns" / "pid").readlink()) == _FIRST_NAMESPACE
    except OSError:
        return False


def _users(processes: Path, places: dict[tuple[int, int, int], Path]) -> dict[Path, set[int]]:
    """The living processes that have each of the files mapped. places: (device, in two numbers, and inode) of each."""
    users: dict[Path, set[int]] = {file: set() for file in places.values()}
    for process in processes.iterdir():
        if not process.name.isdigit():
            continue
        with suppress(OSError):  # it has ended; or it is another user's, who cannot open what is ours
            for major, minor, inode in _MAPPED.findall((process / "maps").read_text()):
                place = int(major, 16), int(minor, 16), int(inode)
                if place in places:
                    users[places[place]].add(int(process.name))
    return users


def _folders(segment: Path) -> tuple[str, ...]:
    """What streaming's `_pack_locals` wrote."""
    try:
        data = segment.read_bytes()
    except OSError:
        return ()
    size = int.from_bytes(data[:4], "little")
    return tuple(data[4:size].decode(errors="replace").split("\0")[:-1])
