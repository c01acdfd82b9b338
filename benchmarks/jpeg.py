"""How much of an epoch's time pruning saves where it is spent on decoding JPEG."""

import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from benchmarks.contender import pruning
from benchmarks.measure import Spread, in_turn
from benchmarks.pictures import Crop, jpegs, source
from benchmarks.report import Figure
from infobatch_stream import InfoBatchLoader

__all__ = ["TITLE", "run"]

TITLE = "The time of a pruned epoch of JPEG"

_BATCH = 16  # small, so that what the last step is filled up with is little


class Pictures(Dataset[Any]):
    """JPEG files in a folder, decoded and cropped to ``size`` x ``size``."""

    def __init__(self, folder: Path, size: int = 224) -> None:
        self._files = sorted(folder.glob("*.jpg"))
        self._crop = Crop(size)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Any:
        return self._crop(self._files[index].read_bytes())


class Epochs:
    """Epochs of a loader that keeps ``share`` of the samples: how long one takes, and what it kept."""

    def __init__(self, dataset: Pictures, store: Path, share: float, workers: int) -> None:
        self._loader = InfoBatchLoader(
            dataset, store, batch_size=_BATCH, epochs=10**6, policy=pruning(share), delta=1.0,
            num_workers=workers, persistent_workers=workers > 0,
        )  # fmt: skip
        self.kept: list[float] = []
        self.seconds()  # the first keeps all, whatever the policy
        self.kept.clear()

    def seconds(self) -> float:
        """Of a whole epoch, from iter() with the commit of the one before to the last update."""
        loader, start = self._loader, time.perf_counter()
        for _, picks in loader:
            loader.update(torch.rand(len(picks)), picks)
        taken = time.perf_counter() - start
        stats = loader.stats
        self.kept.append(stats["kept"] / (stats["kept"] + stats["pruned"]))
        return taken


def run(tiny: bool) -> list[Figure]:
    """Epochs that keep half of the samples against epochs that keep all, without workers and with 2."""
    torch.set_num_threads(1)
    count, rounds = (100, 1) if tiny else (4000, 5)
    figures = []
    with tempfile.TemporaryDirectory(prefix="infobatch-benchmark-") as folder:
        print(f"writing {count:,} JPEG files", file=sys.stderr)
        for number, file in enumerate(jpegs(count)):
            Path(folder, f"{number:06}.jpg").write_bytes(file)
        dataset = Pictures(Path(folder))
        for workers in (0, 2):
            full, half = (
                Epochs(dataset, Path(folder, f"{share}-{workers}.zarr"), share, workers) for share in (1.0, 0.5)
            )
            found = in_turn({"full": full.seconds, "half": half.seconds}, rounds, warmup=0)
            figures += _figures(f"{workers or 'no'} workers", found, half.kept, count)
    return figures


def _figures(who: str, found: dict[str, list[float]], kept: list[float], count: int) -> list[Figure]:
    shares = [short / long for short, long in zip(found["half"], found["full"], strict=True)]
    ratios = Spread.of([share / part for share, part in zip(shares, kept, strict=True)])
    figure = partial(Figure, unit="x", limit="the share of samples that it kept")
    note = f"{count:,} JPEG files of 500x375 at quality 90 ({source()}), to 224x224; whole epochs, commit included"
    return [
        figure(5, f"{who}: the share of time a pruned epoch takes", ratios, bound=1.03, at="most", note=note),
        figure(5, f"{who}: the same, from below", ratios, bound=0.97),
        Figure(0, f"{who}: kept", Spread.of(kept).scaled(100), "%", "half was asked for"),
        Figure(0, f"{who}: full epochs", Spread.of([count / taken for taken in found["full"]]), "samples/s", "PIL"),
    ]
