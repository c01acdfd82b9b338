"""How much memory a training process and its workers hold with very many samples, and whether it grows."""

import itertools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
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
from benchmarks.shards import SMALL, TINY, Load, has_litdata, staged, workspace, write
from infobatch_stream import InfoBatchLoader

__all__ = ["TITLE", "run"]

TITLE = "Memory of a training process and its workers"
BATCH = 256


@dataclass(frozen=True)
class Held:
    """MiB of a process and its children: of their own (anonymous or shared), and of mapped files, counted once."""

    own: float
    mapped: float


@dataclass(frozen=True)
class Case:
    """The batches that ``make`` gives for a number of samples and ``args``, and how many of them are taken."""

    many: int
    make: Callable[..., Iterable[Any]]
    args: tuple[Any, ...] = ()


def run(tiny: bool) -> list[Figure]:
    """After few steps of an epoch, and after many."""
    samples, few = (20_000, 5) if tiny else (10**8, 200)
    with workspace() as root:
        return [figure for name, case in _cases(root, tiny) for figure in _measured(name, case, samples, few)]


def _cases(root: Path, tiny: bool) -> Iterator[tuple[str, Case]]:
    workers = 2 if tiny else 8
    shard = Load("8 B", 8, 1000 if tiny else 10**6, BATCH, 1 << 30)
    small = TINY[SMALL] if tiny else SMALL
    many, fewer = (40, 10) if tiny else (20_000, 4_000)  # of loaders that need minutes for the latter
    by: list[tuple[str, dict[str, int]]] = [
        (f"{workers} workers", {"num_workers": workers}),
        (f"{workers} threads", {"num_threads": workers}),
    ]
    for name, how in by:
        yield f"InfoBatchLoader, {name}", Case(many, _ours, (how,))
    yield f"DataLoader(shuffle=True), {workers} workers, {named('torch')}", Case(many, _torch, (workers,))
    if not tiny and has("grain"):
        yield f"Grain, {workers} workers, {named('grain')}", Case(many, _grain, (workers,))
    mds = write("mds", shard, root)
    for name, how in by:
        yield f"InfoBatchLoader over MDS, {name}", Case(fewer, _ours_mds, (mds, how))
    yield f"StreamingDataset, {workers} workers, {named('mosaicml-streaming')}", Case(fewer, _streaming, (mds, workers))
    if not tiny and has_litdata():
        chunk = write("litdata", shard, root)
        yield f"LitData, {workers} workers, {named('litdata')}", Case(fewer, _litdata, (chunk, workers))
    tars = write("wds", small, root)
    case = Case(fewer, _webdataset, (tars, small.count, workers))
    yield f"webdataset, {workers} workers, {named('webdataset')}", case


def _measured(name: str, case: Case, samples: int, few: int) -> Iterator[Figure]:
    with Contender(_steps, few, case.many, case.make, samples, *case.args) as contender:
        first, last = contender()
    note = f"{samples:,} samples, batches of {BATCH}; after {few:,} and {case.many:,} steps"
    yield Figure(6, f"{name}: memory of its own", Spread.of([last.own]), "MiB", "", note=note)
    yield Figure(0, f"{name}: growth between", Spread.of([last.own - first.own]), "MiB", "")
    yield Figure(0, f"{name}: mapped files", Spread.of([last.mapped]), "MiB", "")


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
    return _second_epoch(Numbers(samples), by)


def _second_epoch(dataset: Any, by: dict[str, int]) -> Iterator[Any]:
    folder = tempfile.TemporaryDirectory(prefix="infobatch-benchmark-")
    loader = InfoBatchLoader(
        dataset, Path(folder.name) / "scores.zarr", batch_size=BATCH, epochs=10**6, delta=1.0, **by
    )
    _, picks = next(iter(loader))
    loader.update(torch.rand(len(picks)), picks)
    loader.commit()  # the second epoch is planned by scores
    for _, picks in loader:
        loader.update(torch.rand(len(picks)), picks)
        yield folder


def _torch(samples: int, workers: int) -> Iterable[Any]:
    return DataLoader(Numbers(samples), batch_size=BATCH, shuffle=True, num_workers=workers)


def _grain(samples: int, workers: int) -> Any:
    import grain

    batches = grain.MapDataset.source(Numbers(samples)).shuffle(seed=0).batch(BATCH)
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    return batches.to_iter_dataset(grain.ReadOptions(1, 1)).mp_prefetch(options)


# ---- over shards


def _linked(one: Path, samples: int, listed: str) -> Path:
    """A folder of ``samples``: the one shard of the folder ``one`` again and again, by hard links.

    listed: The key under which index.json has the shards.
    """
    folder = one.with_name(f"{one.name}-as-{samples}")
    if folder.exists():
        return folder
    index = json.loads((one / "index.json").read_text())
    (entry,) = index[listed]
    (data,) = (file for file in one.iterdir() if file.suffix != ".json")
    names = [f"{number:05}-{data.name}" for number in range(samples // int(one.name.rpartition("x")[2]))]
    index[listed] = [json.loads(json.dumps(entry).replace(data.name, name)) for name in names]
    with staged(folder) as new:
        (new / "index.json").write_text(json.dumps(index))
        for name in names:
            (new / name).hardlink_to(data)
    return folder


def _ours_mds(samples: int, one: Path, by: dict[str, int]) -> Iterable[Any]:
    return _second_epoch(_mds(samples, one, shuffle=False), by)


def _streaming(samples: int, one: Path, workers: int) -> Iterable[Any]:
    return DataLoader(_mds(samples, one, shuffle=True), batch_size=BATCH, num_workers=workers)


def _mds(samples: int, one: Path, shuffle: bool) -> Any:
    from streaming import StreamingDataset

    return StreamingDataset(local=str(_linked(one, samples, "shards")), shuffle=shuffle, batch_size=BATCH)


def _litdata(samples: int, one: Path, workers: int) -> Iterable[Any]:
    from litdata import StreamingDataLoader, StreamingDataset

    dataset = StreamingDataset(str(_linked(one, samples, "chunks")), shuffle=True)
    return StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers)


def _webdataset(samples: int, folder: Path, count: int, workers: int) -> Iterable[Any]:
    from webdataset import WebDataset

    shards = sorted(map(str, folder.glob("*.tar"))) * (samples // count)
    pipeline = WebDataset(shards, shardshuffle=len(shards), empty_check=False)
    return DataLoader(pipeline.shuffle(1000).batched(BATCH, collation_fn=list), batch_size=None, num_workers=workers)
