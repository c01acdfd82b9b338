"""How much memory a training process and its workers hold with very many samples, and whether it grows."""

import itertools
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.contender import Contender, named
from benchmarks.decoding import has
from benchmarks.measure import Spread
from benchmarks.report import Figure
from benchmarks.scale import Numbers
from infobatch_stream import InfoBatchLoader

__all__ = ["TITLE", "run"]

TITLE = "Memory of a training process and its workers"
WORKERS, BATCH = 8, 256


@dataclass(frozen=True)
class Held:
    """MiB of a process and its children: of their own (anonymous or shared), and of mapped files, counted once."""

    own: float
    mapped: float


def run(tiny: bool) -> list[Figure]:
    """After few steps of an epoch, and after many."""
    samples, few, many = (20_000, 5, 40) if tiny else (10**8, 200, 20_000)
    makers: dict[str, tuple[Any, ...]] = {
        f"InfoBatchLoader, {WORKERS} workers": (_ours, samples, {"num_workers": WORKERS}),
        f"InfoBatchLoader, {WORKERS} threads": (_ours, samples, {"num_threads": WORKERS}),
        f"DataLoader(shuffle=True), {WORKERS} workers, {named('torch')}": (_torch, samples),
    }
    if has("grain"):
        makers[f"Grain, {WORKERS} workers, {named('grain')}"] = (_grain, samples)
    figures: list[Figure] = []
    for name, maker in makers.items():
        with Contender(_steps, few, many, *maker) as contender:
            first, last = contender()
        note = f"{samples:,} samples, batches of {BATCH}; after {few:,} and {many:,} steps (ours of the second epoch)"
        figures += [
            Figure(6, f"{name}: memory of its own", Spread.of([last.own]), "MiB", "", note=note),
            Figure(0, f"{name}: growth between", Spread.of([last.own - first.own]), "MiB", ""),
            Figure(0, f"{name}: mapped files", Spread.of([last.mapped]), "MiB", ""),
        ]
    return figures


def _steps(few: int, many: int, make: Callable[..., Iterable[Any]], *args: Any) -> Callable[[], tuple[Held, Held]]:
    def measure() -> tuple[Held, Held]:
        batches = iter(make(*args))
        for _ in itertools.islice(batches, few):
            pass
        first = _held()
        for _ in itertools.islice(batches, many - few):
            pass
        return first, _held()

    return measure


def _held() -> Held:
    pids, kib = ["self"], {"Pss_Anon": 0, "Pss_Shmem": 0, "Pss_File": 0}
    while pids:
        pid = pids.pop()
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in kib:
                kib[name] += int(value.split()[0])
        for task in Path(f"/proc/{pid}/task").iterdir():
            pids += (task / "children").read_text().split()
    return Held((kib["Pss_Anon"] + kib["Pss_Shmem"]) / 1024, kib["Pss_File"] / 1024)


def _ours(samples: int, by: dict[str, int]) -> Iterable[Any]:
    folder = tempfile.TemporaryDirectory(prefix="infobatch-benchmark-")
    loader = InfoBatchLoader(
        Numbers(samples), Path(folder.name) / "scores.zarr", batch_size=BATCH, epochs=10**6, delta=1.0, **by
    )
    _, picks = next(iter(loader))
    loader.update(torch.rand(len(picks)), picks)
    loader.commit()  # the second epoch is planned by scores
    for _, picks in loader:
        loader.update(torch.rand(len(picks)), picks)
        yield folder


def _torch(samples: int) -> Iterable[Any]:
    return DataLoader(Numbers(samples), batch_size=BATCH, shuffle=True, num_workers=WORKERS)


def _grain(samples: int) -> Any:
    import grain

    batches = grain.MapDataset.source(Numbers(samples)).shuffle(seed=0).batch(BATCH)
    options = grain.MultiprocessingOptions(num_workers=WORKERS, per_worker_buffer_size=2)
    return batches.to_iter_dataset(grain.ReadOptions(1, 1)).mp_prefetch(options)
