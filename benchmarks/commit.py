"""What a commit costs a sample: on one node, in memory and on disk, and what it sends between nodes."""

import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.measure import Spread
from benchmarks.report import Figure
from infobatch_stream.distributed import Ranks
from infobatch_stream.store.replicated import ReplicatedStore
from infobatch_stream.store.score_store import ScoreStore

__all__ = ["TITLE", "exchanged", "run"]

TITLE = "The commit of an epoch's losses"

_SHARES = {"all": 1.0, "60 %": 0.6, "none": 0.0}
_BLOCK = 1 << 22
_MEMORY = Path("/dev/shm")


def run(tiny: bool) -> list[Figure]:
    """Commit 1e8 losses, of which all, some or none were seen; then merge and commit on several nodes."""
    samples, rounds = (300_000, 1) if tiny else (100_000_000, 3)
    figures: list[Figure] = []
    for medium, parent in (("tmpfs", _MEMORY), ("disk", None)):
        if parent is not None and (not parent.is_dir() or shutil.disk_usage(parent).free < 14 * samples):
            print(f"commit: {parent} has no room for {samples:,} samples", file=sys.stderr)
            continue
        with tempfile.TemporaryDirectory(prefix="infobatch-benchmark-", dir=parent) as folder:
            figures += _one_node(medium, Path(folder), samples, rounds)
    for nodes in (2, 4):
        figures += _between_nodes(300_000 if tiny else 20_000_000, nodes)
    return figures


# ---- one node


def _one_node(medium: str, folder: Path, samples: int, rounds: int) -> Iterator[Figure]:
    store = ScoreStore.create(folder / "scores.zarr", samples)
    plain = folder / "plain"
    np.zeros(samples, np.float32).tofile(plain)
    walls: dict[str, list[float]] = {share: [] for share in _SHARES}
    works: dict[str, list[float]] = {share: [] for share in _SHARES}
    copies: list[float] = []
    for number in range(1 + rounds):
        for name, share in _SHARES.items():
            _record(store, share, seed=number)
            store.flush()  # what was recorded in an epoch has mostly been written out by its end
            wall, work = _cost(store.commit)
            if number:
                walls[name].append(1e9 * wall / samples)
                works[name].append(1e9 * work / samples)
        copies.append(1e9 * _cost(lambda: _copy(store, plain))[0] / samples)
    copied = f"{Spread.of(copies).median:.3g} ns a sample: one array copied into another file by its map, and flushed"
    for name in _SHARES:
        clock, processor = Spread.of(walls[name]), Spread.of(works[name])
        what = f"commit of {samples:.0e} samples, {name} seen"
        if medium == "tmpfs":
            yield Figure(7, f"tmpfs: {what}", clock, "ns/sample", copied, bound=2, at="most",
                         note="wall-clock; flushing costs nothing here, so this is the commit without it")  # fmt: skip
        else:
            yield Figure(7, f"disk: {what}: processor", processor, "ns/sample", "user and system time, with flushing",
                         bound=2, at="most",
                         note="1.5 to 2.4 in several runs with losses seen: the system, writing pages out,"
                         " takes most")  # fmt: skip
            yield Figure(0, f"disk: {what}", clock, "ns/sample", copied,
                         note="wall-clock; up to three arrays are flushed, one after the other")  # fmt: skip


def _record(store: ScoreStore, share: float, seed: int) -> None:
    """Have ``share`` of the samples seen, at random."""
    rng = np.random.default_rng(seed)
    for start in range(0, store.num_samples, _BLOCK):
        size = min(_BLOCK, store.num_samples - start)
        losses = rng.random(size, dtype=np.float32)
        losses[rng.random(size, dtype=np.float32) >= share] = np.nan
        store.put_pending(start, losses)


def _copy(store: ScoreStore, file: Path) -> None:
    copied = np.memmap(file, dtype=np.float32, mode="r+")
    copied[:] = store.scores
    copied.flush()


def _cost(act: Any) -> tuple[float, float]:
    """(Wall-clock, processor) seconds of ``act``."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    act()
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    return wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


# ---- several nodes


def _between_nodes(samples: int, nodes: int) -> Iterator[Figure]:
    found = exchanged(samples, nodes)
    if found is None:
        return
    yield Figure(
        7, f"{nodes} nodes: sent by each at a commit of {samples:.0e} samples", Spread.of([found.sent]), "bytes/sample",
        "4 bytes of a float32, plus 5 %", bound=4.2, at="most",
        note="all were seen; as the interface lo counts in a network namespace of their own, with all headers and "
        "acknowledgements",
    )  # fmt: skip
    yield Figure(0, f"{nodes} nodes: commit with the exchange", Spread.of([found.seconds]), "ns/sample",
                 "wall-clock over loopback, all nodes on this machine")  # fmt: skip


class Exchanged(NamedTuple):
    """Of a commit, per sample: bytes that each node sent, nanoseconds, and those of a node's processor."""

    sent: float
    seconds: float
    processor: float


def exchanged(samples: int, nodes: int) -> Exchanged | None:
    """Commit on as many processes, each with a store of its own, in a network of their own: all in it is theirs.

    None, with a line on stderr, where no such network can be made.
    """
    root = [] if os.geteuid() == 0 else ["--map-root-user"]
    here = [sys.executable, "-m", "benchmarks.commit"]
    with tempfile.TemporaryDirectory(prefix="infobatch-benchmark-") as folder:
        command = ["unshare", *root, "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *here]
        command += [folder, str(samples), str(nodes)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            print(f"commit: no network of their own for {nodes} nodes: {error}", file=sys.stderr)
            return None
        if done.returncode:
            print(f"commit: no network of their own for {nodes} nodes: {done.stderr}", file=sys.stderr)
            return None
        found = json.loads(Path(folder, "found.json").read_text())
    times = (1e9 * found[clock] / samples for clock in ("seconds", "processor"))
    return Exchanged(found["bytes"] / nodes / samples, *times)


def _network(folder: Path, samples: int, count: int) -> None:
    """Runs the nodes; nothing else is in this network."""
    context = multiprocessing.get_context("spawn")
    nodes = [context.Process(target=_node, args=(node, folder, samples, count)) for node in range(count)]
    for node in nodes:
        node.start()
    for node in nodes:
        node.join()
        if node.exitcode:
            sys.exit(f"a node ended with {node.exitcode}")


def _node(node: int, folder: Path, samples: int, count: int) -> None:
    torch.set_num_threads(1)
    address = f"file://{folder}/meeting"
    dist.init_process_group("gloo", address, timeout=timedelta(seconds=300), rank=node, world_size=count)
    with _store(folder / f"node{node}", samples) as shared:
        own = range(node, samples, count)  # a sample has its loss on one node
        shared.store.record(np.array(own), np.random.default_rng(node).random(len(own)))
        dist.barrier()
        before, start, worked = _carried(), time.perf_counter(), time.process_time()
        shared.commit(0)
        worked = time.process_time() - worked
        dist.barrier()
        found = {"bytes": _carried() - before, "seconds": time.perf_counter() - start, "processor": worked}
        assert not np.isnan(shared.store.scores).any()
        if node == 0:
            (folder / "found.json").write_text(json.dumps(found))
        dist.barrier()
    dist.destroy_process_group()


@contextmanager
def _store(folder: Path, samples: int) -> Iterator[ReplicatedStore]:
    folder.mkdir()
    yield ReplicatedStore.open(Ranks(), folder / "scores.zarr", samples, "", "error")


def _carried() -> int:
    """Bytes that lo carried so far: what is sent there is received there, so one of the two counts."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split()[1])


if __name__ == "__main__":
    _network(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
