"""JPEG files decoded to 224x224 on two cores: InfoBatchLoader with threads and with processes, against its peers."""

import importlib.util
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from benchmarks.contender import Epochs, infobatch, named, others, plot_rates, rate_figures, rates
from benchmarks.measure import Spread, ratio
from benchmarks.pictures import Crop, jpegs, source
from benchmarks.report import Figure
from benchmarks.shards import Load, has_litdata, staged, workspace, write
from infobatch_stream import IndexedWebDataset

__all__ = ["TITLE", "has", "run"]

TITLE = "Decoding JPEG on two cores"
CORES = 2
plot = plot_rates


@dataclass(frozen=True)
class Jpegs(Load):
    """The files of ``folder``, of ``size`` x ``size`` once they are decoded."""

    folder: Path

    def __getitem__(self, index: int) -> bytes:
        """The bytes of a file."""
        return _file(self.folder, index).read_bytes()


class Files(Dataset[Any]):
    """Decoded, one by one."""

    def __init__(self, load: Jpegs) -> None:
        self._load, self._crop = load, Crop(224)

    def __len__(self) -> int:
        """How many."""
        return self._load.count

    def __getitem__(self, index: int) -> Any:
        """A picture."""
        return self._crop(self._load[index])


class Field:
    """The picture of a sample of which one field is the file."""

    def __init__(self, name: str) -> None:
        self._name, self._crop = name, Crop(224)

    def __call__(self, sample: dict[str, bytes]) -> Any:
        """It."""
        return self._crop(sample[self._name])


def run(tiny: bool) -> list[Figure]:
    """Compare."""
    with workspace() as root:
        return _compare(root, tiny)


def _compare(root: Path, tiny: bool) -> list[Figure]:
    load = _written(root, 120 if tiny else 4000)
    tars, mds = write("wds", load, root), write("mds", load, root)
    makers: dict[str, tuple[Any, ...]] = {
        "InfoBatchLoader over tars, 2 threads": (_ours, tars, load, {"threads": CORES}),
        "InfoBatchLoader over tars, 2 processes": (_ours, tars, load, {"workers": CORES}),
        "InfoBatchLoader over MDS, 2 threads": (_ours_mds, mds, load, {"threads": CORES}),
        "InfoBatchLoader over files, 2 threads": (_ours_files, load, {"threads": CORES}),
        f"DataLoader over files, 2 processes, {named('torch')}": (_torch, load),
        f"StreamingDataset, 2 processes, {named('mosaicml-streaming')}": (_streaming, mds, load),
        f"WebDataset, 2 processes, {named('webdataset')}": (_webdataset, tars, load),
    }
    if has_litdata():
        folder = write("litdata", load, root)
        makers[f"LitData, 2 processes, {named('litdata')}"] = (_litdata, folder, load)
    if has("spdl"):
        makers[f"SPDL over files, 2 threads, {named('spdl')}"] = (_spdl, load)
    if has("grain"):
        makers[f"Grain over files, 2 threads, {named('grain')}"] = (_grain, load, False)
        makers[f"Grain over files, 2 processes, {named('grain')}"] = (_grain, load, True)
    found = rates(makers, load.batch, rounds=1 if tiny else 5)
    ours = found["InfoBatchLoader over tars, 2 threads"]
    figures = [
        Figure(
            target=5,
            what=f"tars with 2 threads, pictures per second: against {peer}",
            value=ratio(ours, found[peer]),
            unit="x",
            limit="the same files, the same decoding by Pillow and torchvision",
            bound=1.0,
        )
        for peer in makers
        if "InfoBatchLoader" not in peer
    ]
    note = f"{load.count:,} files of 500x375 ({source()}), random crop and flip, in batches of {load.batch}, all kept"
    per_core = Spread.of(ours).scaled(1 / CORES)
    figures.append(Figure(0, "tars with 2 threads, per core", per_core, "pictures/s", "", note=note))
    return [*figures, *rate_figures(found, "JPEG at 224")]


def has(package: str) -> bool:
    """Whether it is installed; if not, says on stderr that its figures are left out."""
    if importlib.util.find_spec(package) is not None:
        return True
    print(f"{package} is not installed: its figures are left out", file=sys.stderr)
    return False


def _file(folder: Path, index: int) -> Path:
    return folder / f"{index:06}.jpg"


def _written(root: Path, count: int) -> Jpegs:
    folder = root / f"jpegs-{count}"
    if not folder.exists():
        print(f"writing {count:,} JPEG files", file=sys.stderr)
        with staged(folder) as new:
            for index, data in enumerate(jpegs(count)):
                _file(new, index).write_bytes(data)
    batch, shard = (16, 1 << 20) if count < 1000 else (64, 1 << 25)
    return Jpegs("JPEG", 224, count, batch, shard, folder)


def _ours(folder: Path, load: Jpegs, by: dict[str, int]) -> Epochs:
    return infobatch(IndexedWebDataset(folder).map(Field("bin")), load.batch, collate=default_collate, **by)


def _ours_mds(folder: Path, load: Jpegs, by: dict[str, int]) -> Epochs:
    return infobatch(_decoded(folder, load, shuffle=False), load.batch, collate=default_collate, **by)


def _ours_files(load: Jpegs, by: dict[str, int]) -> Epochs:
    return infobatch(Files(load), load.batch, collate=default_collate, **by)


def _torch(load: Jpegs) -> Epochs:
    loader = DataLoader(Files(load), batch_size=load.batch, shuffle=True, num_workers=CORES, drop_last=True)
    return others(loader, load.batch)


def _decoded(folder: Path, load: Jpegs, shuffle: bool) -> Any:
    from streaming import StreamingDataset

    class Decoded(StreamingDataset):
        picture = Field("data")

        def __getitem__(self, index: int) -> Any:
            return self.picture(super().__getitem__(index))

    return Decoded(local=str(folder), shuffle=shuffle, batch_size=load.batch)


def _streaming(folder: Path, load: Jpegs) -> Epochs:
    dataset = _decoded(folder, load, shuffle=True)
    return others(DataLoader(dataset, batch_size=load.batch, num_workers=CORES, drop_last=True), load.batch)


def _webdataset(folder: Path, load: Jpegs) -> Epochs:
    import webdataset

    urls = sorted(map(str, folder.glob("*.tar")))
    dataset = (
        webdataset.WebDataset(urls, shardshuffle=100).shuffle(1000).map(Field("bin")).batched(load.batch, partial=False)
    )
    return others(DataLoader(dataset, batch_size=None, num_workers=CORES), load.batch)


def _litdata(folder: Path, load: Jpegs) -> Epochs:
    from litdata import StreamingDataLoader, StreamingDataset

    crop = Crop(224)

    class Decoded(StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            return crop(super().__getitem__(index))

    dataset = Decoded(str(folder), shuffle=True, drop_last=True)
    loader = StreamingDataLoader(dataset, batch_size=load.batch, num_workers=CORES, drop_last=True)
    return others(loader, load.batch)


def _spdl(load: Jpegs) -> Epochs:
    from spdl.pipeline import PipelineBuilder

    files = Files(load)

    def epoch() -> Iterator[Any]:
        order = random.sample(range(load.count), load.count)
        builder = PipelineBuilder().add_source(order).pipe(files.__getitem__, concurrency=CORES, output_order="input")
        builder = builder.aggregate(load.batch, drop_last=True).pipe(torch.stack).add_sink(2 * CORES)
        pipeline = builder.build(num_threads=CORES + 1)  # one to collate
        with pipeline.auto_stop():
            for batch in pipeline:
                torch.rand(load.batch).mean()
                yield batch

    return epoch


def _grain(load: Jpegs, processes: bool) -> Epochs:
    import grain

    def stacked(pictures: Sequence[Any]) -> Any:
        return torch.stack(list(pictures))

    shuffled = grain.MapDataset.source(Files(load)).shuffle(seed=0)
    batches = shuffled.batch(load.batch, drop_remainder=True, batch_fn=stacked)
    if processes:
        options = grain.MultiprocessingOptions(num_workers=CORES, per_worker_buffer_size=2)
        return others(batches.to_iter_dataset(grain.ReadOptions(1, 1)).mp_prefetch(options), load.batch)
    return others(batches.to_iter_dataset(grain.ReadOptions(CORES, 2 * CORES)), load.batch)
