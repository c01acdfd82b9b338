"""A cold cache: what is read from the disk, and how quickly, when only a part of the samples is kept."""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from benchmarks.contender import Contender, Epochs, epochs_of, named, others, pruning
from benchmarks.measure import Spread, disk_bytes_read, drop_cache, in_turn, ratio
from benchmarks.report import Figure
from benchmarks.shards import LARGE, SMALL, TINY, Load, workspace, write
from benchmarks.wds import webdataset
from infobatch_stream import IndexedWebDataset, InfoBatchLoader, ScoreStore

TITLE = "Loading shards from the disk, cold cache"
SHARES = (1.0, 0.6, 0.2)
_NAMES = {"wds": "WebDataset", "mds": "MDS"}


@dataclass(frozen=True)
class Epoch:
    """samples delivered, seconds they took, bytes that came from the disk for them."""

    samples: int
    seconds: float
    read: int

    @property
    def rate(self) -> float:
        """Samples per second."""
        return self.samples / self.seconds

    @property
    def cost(self) -> float:
        """Bytes from the disk per sample."""
        return self.read / self.samples


def run(tiny: bool) -> list[Figure]:
    """Compare without workers, so that the process that is looked at reads."""
    small = replace(SMALL, count=30_000)  # a cold read of each takes a while
    with workspace() as root:
        figures = list(_large(TINY[LARGE] if tiny else LARGE, root, tiny))
        figures += _small(TINY[SMALL] if tiny else small, root, tiny)
    return sorted(figures, key=lambda figure: figure.target == 0)


def _large(load: Load, root: Path, tiny: bool) -> Iterator[Figure]:
    folders = {format: write(format, load, root) for format in ("wds", "mds")}
    makers: dict[tuple[str, float], tuple[Any, ...]] = {
        (format, share): (_ours, format, folder, load, share) for format, folder in folders.items() for share in SHARES
    }
    makers["webdataset", 0.6] = (webdataset, folders["wds"], load)
    makers["streaming", 1.0] = (_streaming, folders["mds"], load)
    found = _epochs(makers, folders, load, rounds=1 if tiny else 5)
    whole = sum(file.stat().st_size for file in folders["wds"].glob("*.tar"))
    forgot = Spread.of([epoch.read / whole for epoch in found["webdataset", 0.6]])
    if forgot.median < 0.9:
        print(f"only {forgot.median:.0%} came from the disk: its cache cannot be dropped here", file=sys.stderr)
    yield Figure(
        target=3,
        what=f"WebDataset, {load.name}, cold, 60 % kept: kept samples per second",
        value=_rates(found["wds", 0.6], found["webdataset", 0.6]),
        unit="x",
        limit=f"{named('webdataset')}: WebDataset().select(60 % at random).shuffle(1000).batched()",
        bound=1.8,
        note=f"{load.count:,} samples, whole epochs in new processes. Kept samples are counted on both sides.",
    )
    for format in folders if forgot.median else ():
        for share in SHARES[1:]:
            kept, full = found[format, share], found[format, 1.0]
            yield Figure(
                target=3,
                what=f"{_NAMES[format]}, {load.name}, cold, {_percent(share)} kept: bytes from the disk per sample",
                value=ratio([epoch.cost for epoch in kept], [epoch.cost for epoch in full]),
                unit="x",
                limit="a full epoch's bytes per sample: in proportion is 1",
                bound=1.05,
                at="most",
                note="read_bytes of /proc/self/io.",
            )
        for share in SHARES:
            yield Figure(
                target=0,
                what=f"{_NAMES[format]}, {load.name}, cold, {_percent(share)} kept: bytes from the disk",
                value=Spread.of([epoch.cost / load.size for epoch in found[format, share]]),
                unit="x",
                limit="the bytes of the kept samples",
            )
    yield Figure(
        target=0,
        what=f"webdataset, {load.name}, cold, 60 % kept: bytes from the disk",
        value=forgot,
        unit="x",
        limit="the bytes of its shards",
        note="1 shows that the system did forget them.",
    )
    for format in folders:
        yield Figure(
            target=0,
            what=f"{_NAMES[format]}, {load.name}, cold, 60 % kept: seconds of an epoch",
            value=ratio(*([epoch.seconds for epoch in found[format, share]] for share in (0.6, 1.0))),
            unit="x",
            limit="a full epoch of ours",
        )
    yield Figure(
        target=0,
        what=f"MDS, {load.name}, cold, all kept: samples per second",
        value=_rates(found["mds", 1.0], found["streaming", 1.0]),
        unit="x",
        limit=f"{named('mosaicml-streaming')}: StreamingDataset(shuffle=True) in a DataLoader",
    )
    for (who, share), epochs in found.items():
        name = f"InfoBatchLoader, {_NAMES[who]}" if who in _NAMES else who
        yield Figure(
            target=0,
            what=f"{load.name}, cold, {_percent(share)} kept: {name}",
            value=Spread.of([epoch.samples * load.size / epoch.seconds / 1e6 for epoch in epochs]),
            unit="MB/s",
            limit="",
        )


def _small(load: Load, root: Path, tiny: bool) -> Iterator[Figure]:
    folders = {"wds": write("wds", load, root)}
    makers: dict[tuple[str, float], tuple[Any, ...]] = {
        ("wds", share): (_ours, "wds", folders["wds"], load, share) for share in (1.0, 0.6)
    }
    makers["webdataset", 0.6] = (webdataset, folders["wds"], load)
    found = _epochs(makers, folders, load, rounds=1 if tiny else 5)
    yield Figure(
        target=0,
        what=f"WebDataset, {load.name}, cold, 60 % kept: kept samples per second",
        value=_rates(found["wds", 0.6], found["webdataset", 0.6]),
        unit="x",
        limit=f"{named('webdataset')}, as for 100 KB",
    )
    if all(epoch.read for epoch in found["wds", 1.0]):
        yield Figure(
            target=0,
            what=f"WebDataset, {load.name}, cold, 60 % kept: bytes from the disk per sample",
            value=ratio([epoch.cost for epoch in found["wds", 0.6]], [epoch.cost for epoch in found["wds", 1.0]]),
            unit="x",
            limit="a full epoch's bytes per sample: in proportion is 1",
            note="a page of 4 KiB holds more than two of them, with their headers, and is read whole.",
        )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _rates(above: list[Epoch], below: list[Epoch]) -> Spread:
    return ratio([epoch.rate for epoch in above], [epoch.rate for epoch in below])


def _epochs(
    makers: dict[tuple[str, float], tuple[Any, ...]], folders: dict[str, Path], load: Load, rounds: int
) -> dict[tuple[str, float], list[Epoch]]:
    """One cold epoch of each contender in turn, each in a new process: a mapped page would not be dropped."""
    contenders: dict[str, Callable[[], Any]] = {}
    for (who, share), maker in makers.items():
        folder = folders["mds" if who in ("mds", "streaming") else "wds"]
        contenders[f"{who} {share}"] = partial(_once, folder, load, *maker)
    found = in_turn(contenders, rounds, warmup=0)
    return {(who, share): found[f"{who} {share}"] for who, share in makers}  # type: ignore[misc]


def _once(*args: Any) -> Epoch:
    with Contender(_reading, *args) as contender:
        return contender()


def _reading(folder: Path, load: Load, make: Callable[..., Epochs], *args: Any) -> Callable[[], Epoch]:
    epochs = make(*args)

    def read() -> Epoch:
        drop_cache(folder)
        before, start = disk_bytes_read(), time.perf_counter()
        count = sum(1 for _ in epochs())
        return Epoch(count * load.batch, time.perf_counter() - start, disk_bytes_read() - before)

    return read


def _streaming(folder: Path, load: Load) -> Epochs:
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=str(folder), shuffle=True, batch_size=load.batch)
    return others(DataLoader(dataset, batch_size=load.batch, collate_fn=list, drop_last=True), load.batch)


def _ours(format: str, folder: Path, load: Load, share: float) -> Epochs:
    """One epoch that keeps ``share``, of scores that are there from the start."""
    dataset: Any
    if format == "wds":
        dataset = IndexedWebDataset(folder)
    else:
        from streaming import StreamingDataset

        dataset = StreamingDataset(local=str(folder), batch_size=load.batch)
    place = tempfile.TemporaryDirectory(prefix="infobatch-benchmark-")
    path = Path(place.name) / "scores.zarr"
    options = {"batch_size": load.batch, "epochs": 2, "delta": 1.0, "drop_last": True, "collate_fn": list}
    InfoBatchLoader(dataset, path, **options).commit()  # makes the store
    store = ScoreStore.open(path)
    store.record(np.arange(load.count), np.random.default_rng(0).random(load.count, dtype=np.float32))
    store.commit()
    loader = InfoBatchLoader(dataset, path, policy=pruning(share), existing="continue", **options)
    return epochs_of(loader, place)


def plot(file: Path, figures: list[Figure]) -> None:
    """Bytes from the disk against the share of samples kept."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    drawn, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    read = {figure.what: figure.value.median for figure in figures}
    percent = [100 * share for share in SHARES]
    for name, marker in (("WebDataset", "o"), ("MDS", "s")):
        values = [
            read.get(f"{name}, {LARGE.name}, cold, {_percent(share)} kept: bytes from the disk") for share in SHARES
        ]
        if None not in values:
            axes.plot(percent, np.multiply(percent, values), marker=marker, label=name)
    axes.plot([0, 100], [0, 100], color="gray", linestyle=":", label="in proportion")
    axes.set(
        xlabel="samples kept (%)", ylabel="read from disk, of all samples' bytes (%)", xlim=(0, 105), ylim=(0, None)
    )
    axes.legend()
    drawn.savefig(file, dpi=120)
    plt.close(drawn)
