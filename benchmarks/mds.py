"""MDS shards in a warm cache: InfoBatchLoader against StreamingDataset's own iteration, and others."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

from benchmarks.contender import Epochs, infobatch, named, others, plot_rates, rate_figures, rates
from benchmarks.measure import ratio
from benchmarks.report import Figure
from benchmarks.shards import LARGE, SMALL, TINY, Files, Load, has_litdata, workspace, write
from infobatch_stream.workers.health import widen

TITLE = "Loading MDS shards, warm cache"
BOUNDS = {(SMALL, 0): 8.0, (SMALL, 2): 4.0, (LARGE, 0): 4.0, (LARGE, 2): 1.3}
plot = plot_rates


def run(tiny: bool) -> list[Figure]:
    """Compare, for samples of 800 bytes and of 100 KB, without workers and with 2."""
    with workspace() as root:
        figures = [figure for load in (SMALL, LARGE) for figure in _compare(load, root, tiny)]
    return sorted(figures, key=lambda figure: figure.target == 0)  # what has a target comes first


def _compare(full: Load, root: Path, tiny: bool) -> Iterator[Figure]:
    load = TINY[full] if tiny else full
    shards, files = write("mds", load, root), write("files", load, root)
    makers: dict[str, tuple[Any, ...]] = {}
    for workers in (0, 2):
        makers[f"InfoBatchLoader, {workers} workers"] = (_ours, shards, load, workers)
        makers[f"StreamingDataset, {workers} workers"] = (_streaming, shards, load, workers)
    makers["InfoBatchLoader, 2 threads"] = (_ours, shards, load, 0, 2)
    makers["bytes from memory, 2 workers"] = (_passing, load)
    makers["DataLoader over files, 0 workers"] = (_files, files, load)
    if not tiny and has_litdata():
        makers["LitData, 0 workers"] = (litdata, write("litdata", load, root), load)
    found = rates(makers, load.batch, rounds=1 if tiny else 3)
    for workers in (0, 2):
        yield Figure(
            target=3,
            what=f"MDS, {load.name}, {workers or 'no'} workers: samples per second",
            value=ratio(found[f"InfoBatchLoader, {workers} workers"], found[f"StreamingDataset, {workers} workers"]),
            unit="x",
            limit=f"{named('mosaicml-streaming')}: StreamingDataset(shuffle=True) in a DataLoader",
            bound=BOUNDS[full, workers],
            note=f"{load.count:,} samples of one bytes column in batches of {load.batch}, all kept on both "
            "sides, from the first batch of an epoch to the last.",
        )
    yield Figure(
        target=0,
        what=f"MDS, {load.name}, 2 workers: share of what two processes can pass on",
        value=ratio(found["InfoBatchLoader, 2 workers"], found["bytes from memory, 2 workers"]),
        unit="x",
        limit=f"{named('torch')}: DataLoader whose workers hand out as many bytes objects, unread, by a pipe as wide",
        note="how far from the limit: with workers, passing the bytes on is what a batch costs most.",
    )
    if "LitData, 0 workers" in found:
        yield against_litdata("MDS", load, found["InfoBatchLoader, 0 workers"], found["LitData, 0 workers"])
    yield Figure(
        target=0,
        what=f"MDS, {load.name}: 2 threads against 2 workers",
        value=ratio(found["InfoBatchLoader, 2 threads"], found["InfoBatchLoader, 2 workers"]),
        unit="x",
        limit="InfoBatchLoader with num_workers=2",
    )
    yield from rate_figures(found, load.name)


def against_litdata(format: str, load: Load, ours: list[float], theirs: list[float]) -> Figure:
    """How many times as fast as `litdata` all samples of ``load`` came, in ``format``."""
    return Figure(
        target=3,
        what=f"{format}, {load.name}, no workers: samples per second, against LitData",
        value=ratio(ours, theirs),
        unit="x",
        limit=f"{named('litdata')}: its optimized format, shuffled, by its StreamingDataLoader",
        bound=1.2 if load is SMALL else 1.0,
    )


def _mds(folder: Path, load: Load, shuffle: bool) -> Any:
    from streaming import StreamingDataset

    return StreamingDataset(local=str(folder), shuffle=shuffle, batch_size=load.batch)


def _ours(folder: Path, load: Load, workers: int, threads: int = 0) -> Epochs:
    dataset = _mds(folder, load, shuffle=False)  # its order is the loader's
    return infobatch(dataset, load.batch, workers, threads=threads)


def _streaming(folder: Path, load: Load, workers: int) -> Epochs:
    dataset = _mds(folder, load, shuffle=True)
    return others(
        DataLoader(dataset, batch_size=load.batch, num_workers=workers, collate_fn=list, drop_last=True), load.batch
    )


class _Memory(Dataset[bytes]):
    """As many bytes objects as a batch holds, new ones each time, since pickle passes the same object on once only."""

    def __init__(self, load: Load) -> None:
        self._load = load

    def __len__(self) -> int:
        return self._load.count

    def __getitems__(self, indices: list[int]) -> list[bytes]:
        return [self._load[index] for index in indices]


def _passing(load: Load) -> Epochs:
    return others(_Wide(_Memory(load), load), load.batch)


class _Wide:
    """A plain DataLoader with 2 workers and a pipe as wide as ours."""

    def __init__(self, dataset: Dataset[Any], load: Load) -> None:
        self._loader = DataLoader(dataset, batch_size=load.batch, num_workers=2, collate_fn=list, drop_last=True)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self._loader)
        widen(batches)
        return batches


def _files(folder: Path, load: Load) -> Epochs:
    dataset = Files(folder, load.count)
    return others(DataLoader(dataset, batch_size=load.batch, shuffle=True, collate_fn=list, drop_last=True), load.batch)


def litdata(folder: Path, load: Load) -> Epochs:
    """Epochs of LitData's own loader."""
    from litdata import StreamingDataLoader, StreamingDataset

    dataset = StreamingDataset(str(folder), shuffle=True, drop_last=True)
    return others(StreamingDataLoader(dataset, batch_size=load.batch, collate_fn=list, drop_last=True), load.batch)
