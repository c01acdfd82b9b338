"""WebDataset tars in a warm cache, 60 % of the samples kept: InfoBatchLoader against webdataset, and wids."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Sampler

from benchmarks.contender import Epochs, infobatch, named, others, plot_rates, rate_figures, rates
from benchmarks.mds import against_litdata, litdata
from benchmarks.measure import ratio
from benchmarks.report import Figure
from benchmarks.shards import LARGE, SMALL, TINY, Load, find_wids, has_litdata, wids_index, workspace, write
from infobatch_stream import IndexedWebDataset

# By the end of a load's name.
LIMIT = {
    " B": "",
    "KB": " What holds it back: one copy of 100 KB, which alone takes half of a sample's time or more, as fast as the "
    "memory of the machine is. Finding the sample takes 2 us, a look at whether it is in memory 2, the loader and "
    "update 3 to 5. Tried: reads instead of a map (half as long again), a look at both ends (2 us more); kept: all "
    "copies of a batch one after the other (2 us less).",
}
TITLE = "Loading WebDataset tars, warm cache, 60 % kept"
SHARE = 0.6
plot = plot_rates


def run(tiny: bool) -> list[Figure]:
    """Compare, for samples of 800 bytes and of 100 KB."""
    with workspace() as root:
        figures = [figure for full in (SMALL, LARGE) for figure in _compare(TINY[full] if tiny else full, root, tiny)]
    return sorted(figures, key=lambda figure: figure.target == 0)


def _compare(load: Load, root: Path, tiny: bool) -> Iterator[Figure]:
    folder = write("wds", load, root)
    makers: dict[str, tuple[Any, ...]] = {}
    for workers in (0, 2):
        makers[f"InfoBatchLoader, {workers} workers"] = (_ours, folder, load, workers)
        makers[f"webdataset, {workers} workers"] = (webdataset, folder, load, workers)
    if find_wids():
        dataset = IndexedWebDataset(folder)
        samples = {Path(url).name: int(size) for url, size in zip(dataset.urls, dataset.shard_sizes, strict=True)}
        makers["wids, 0 workers"] = (_wids, wids_index(folder, root, samples), load)
    if not tiny and has_litdata():
        makers["InfoBatchLoader, 0 workers, all kept"] = (_ours, folder, load, 0, 1)
        makers["LitData, 0 workers, all"] = (litdata, write("litdata", load, root), load)
    found = rates(makers, load.batch, rounds=1 if tiny else 5)
    ours = found["InfoBatchLoader, 0 workers"]
    yield Figure(
        target=3,
        what=f"WebDataset, {load.name}, no workers, 60 % kept: kept samples per second",
        value=ratio(ours, found["webdataset, 0 workers"]),
        unit="x",
        limit=f"{named('webdataset')}: WebDataset().select(60 % at random).shuffle(1000).batched()",
        bound=8.0,
        note=f"of {load.count:,} samples of one member each, in batches of {load.batch}. On both sides those are "
        "counted that are delivered, not those passed over, from the first batch to the last." + LIMIT[load.name[-2:]],
    )
    if "wids, 0 workers" in found:
        yield Figure(
            target=3,
            what=f"WebDataset, {load.name}, no workers, 60 % kept: kept samples per second, against wids",
            value=ratio(ours, found["wids, 0 workers"]),
            unit="x",
            limit="wids of webdataset 0.2.111: ShardListDataset with its index, given 60 % at random, shard by shard",
            bound=1.0,
            note="all shards stay mapped (lru_size), and nothing is decoded (transformations=[]).",
        )
    if "LitData, 0 workers, all" in found:
        ours, theirs = found["InfoBatchLoader, 0 workers, all kept"], found["LitData, 0 workers, all"]
        yield against_litdata("WebDataset, all kept", load, ours, theirs)
    yield Figure(
        target=0,
        what=f"WebDataset, {load.name}, 2 workers, 60 % kept: kept samples per second",
        value=ratio(found["InfoBatchLoader, 2 workers"], found["webdataset, 2 workers"]),
        unit="x",
        limit=f"{named('webdataset')}, as above, with 2 workers",
    )
    yield from rate_figures(found, load.name)


def _ours(folder: Path, load: Load, workers: int, share: float = SHARE) -> Epochs:
    return infobatch(IndexedWebDataset(folder), load.batch, workers, share)


def webdataset(folder: Path, load: Load, workers: int = 0) -> Epochs:
    """Epochs of webdataset's own pipeline that keep 60 % of the samples at random."""
    from webdataset import WebDataset

    shards = sorted(map(str, folder.glob("*.tar")))
    pipeline = WebDataset(shards, shardshuffle=len(shards), empty_check=False)
    kept = pipeline.select(_chosen).shuffle(1000).batched(load.batch, collation_fn=list, partial=False)
    return others(DataLoader(kept, batch_size=None, num_workers=workers), load.batch)


def _chosen(sample: Any) -> bool:
    return random.random() < SHARE


def _wids(index: Path, load: Load) -> Epochs:
    if not find_wids():  # this process has a path of its own
        raise ImportError("wids")
    from wids import ShardListDataset

    dataset = ShardListDataset(str(index), lru_size=200, localname=str, keep=True, transformations=[])
    loader = DataLoader(dataset, batch_size=load.batch, sampler=_Chosen(dataset), collate_fn=list, drop_last=True)
    return others(loader, load.batch)


class _Chosen(Sampler[int]):
    """60 % of the samples at random, in the order of wids' own sampler: shard by shard, shuffled within each."""

    def __init__(self, dataset: Any) -> None:
        from wids import ShardedSampler

        self._all = ShardedSampler(dataset)

    def __iter__(self) -> Iterator[int]:
        return (index for index in self._all if random.random() < SHARE)
