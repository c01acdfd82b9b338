"""Shared memory that StreamingDatasets of killed processes left: until it is removed, their folders count as in use."""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from infobatch_stream.errors import ConfigError

__all__ = ["SharedState", "remove_stale_memory"]

_SEGMENT = re.compile(
    r"(\d{6})_(locals|barrier|next_epoch|cache_usage|shard_states|shard_access_times|resume|epoch_shape|epoch_data)"
)
_MAPPED = re.compile(r"^\S+ \S+ \S+ ([0-9a-f]+):([0-9a-f]+) (\d+) ", re.M)  # device and inode: see proc(5)


@dataclass(frozen=True)
class SharedState:
    """The shared memory of one StreamingDataset: the folders of its streams, and the processes that have it open."""

    folders: tuple[str, ...]
    processes: tuple[int, ...]


def remove_stale_memory(memory: Path = Path("/dev/shm")) -> tuple[list[SharedState], list[SharedState]]:  # noqa: S108
    """Remove the shared memory of StreamingDatasets that no living process has open: (what was removed, what stays).

    Call it before a run, and where the run will be: it sees the processes of this container, or this machine, and only
    what belongs to this user. (streaming's `clean_stale_shared_memory` also takes what other runs are using.)

    Raises ConfigError where the system does not tell which memory a process has open.
    """
    processes = Path("/proc")
    if not memory.is_dir() or not (processes / "self" / "maps").exists():
        raise ConfigError(
            f"this system has no {memory} and /proc, so it cannot be told which shared memory is in use. When no "
            "other run is on this machine, call streaming.base.util.clean_stale_shared_memory()."
        )
    found: dict[str, list[Path]] = {}
    for file in sorted(memory.iterdir()):
        if (match := _SEGMENT.fullmatch(file.name)) and file.stat().st_uid in (os.geteuid(), *_if_root(file)):
            found.setdefault(match[1], []).append(file)
    users = _users(processes, [file for files in found.values() for file in files])
    removed, kept = [], []
    for prefix, files in found.items():
        state = SharedState(_folders(memory / f"{prefix}_locals"), tuple(sorted({u for f in files for u in users[f]})))
        if state.processes:
            kept.append(state)
            continue
        for file in files:
            file.unlink(missing_ok=True)
        removed.append(state)
    return removed, kept


def _if_root(file: Path) -> Iterator[int]:
    """Root may remove, and sees the processes of, everybody."""
    if os.geteuid() == 0:
        yield file.stat().st_uid


def _users(processes: Path, files: list[Path]) -> dict[Path, set[int]]:
    """The living processes that have each of ``files`` mapped; by device and inode, since names are used again."""
    by_place: dict[tuple[int, int, int], Path] = {}
    for file in files:
        stat = file.stat()
        by_place[os.major(stat.st_dev), os.minor(stat.st_dev), stat.st_ino] = file
    users: dict[Path, set[int]] = {file: set() for file in files}
    for process in processes.iterdir():
        if not process.name.isdigit():
            continue
        with suppress(OSError):  # it has ended; or it is another user's, who cannot open what is ours
            for major, minor, inode in _MAPPED.findall((process / "maps").read_text()):
                place = int(major, 16), int(minor, 16), int(inode)
                if place in by_place:
                    users[by_place[place]].add(int(process.name))
    return users


def _folders(segment: Path) -> tuple[str, ...]:
    """What streaming's `_pack_locals` wrote."""
    try:
        data = segment.read_bytes()
    except OSError:
        return ()
    size = int.from_bytes(data[:4], "little")
    return tuple(data[4:size].decode(errors="replace").split("\0")[:-1])
