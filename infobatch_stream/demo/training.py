"""The demo's training runs: one small CNN, on all the data or with InfoBatch, over MDS or WebDataset shards.

Run by ``demo`` in its own process, or by torchrun on several (``-m infobatch_stream.demo.training SPEC``).
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from infobatch_stream import FullData, IndexedWebDataset, InfoBatchLoader, ScoreStore, SoftPruning

__all__ = ["SCORE_EDGES", "ProgressCallback", "Run", "Spec", "runs_of", "train_all"]

SCORE_EDGES: Final = np.concatenate([[0.0], 10.0 ** np.linspace(-6, 2, 65)])
"""Bounds of the bins of `Run.histograms`: float64[66]."""

ProgressCallback = Callable[["Run", int, int, int], None]
"""Called after each step: (run, epoch, steps done, steps of the epoch)."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is trained on what. folder: holds mds/, wds/ and test.npz. batch: samples per step over all ranks.

    optimizer: "adamw", or "sgd" with momentum 0.9.
    """

    folder: str
    classes: int
    epochs: int
    batch: int
    seeds: int
    optimizer: str


@dataclasses.dataclass
class Run:
    """One training run and what came of it.

    name, format, prune, seed: which. trained: samples trained on after each epoch, all ranks together; accuracy: on the
    test set, after each epoch. seconds: of training, evaluation left out. saved: share of samples not trained on.
    histograms: how many committed scores lie between `SCORE_EDGES`, after each epoch; means: the mean of them.
    """

    name: str
    format: str
    prune: bool
    seed: int
    trained: list[int] = dataclasses.field(default_factory=list)
    accuracy: list[float] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    saved: float = 0.0
    histograms: list[list[int]] = dataclasses.field(default_factory=list)
    means: list[float] = dataclasses.field(default_factory=list)

    def outcome(self) -> str:
        """What came of it, on one line."""
        return (
            f"{self.name}, seed {self.seed}: {self.accuracy[-1]:.2%} right, {self.trained[-1]:,} samples trained on, "
            f"{self.saved:.1%} saved, {self.seconds:.1f} s"
        )


class SmallCNN(nn.Sequential):
    """Two convolutions and two linear layers, for images of ``side`` x ``side``."""

    def __init__(self, side: int, classes: int) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(32 * (side // 4) ** 2, 128), nn.ReLU(), nn.Linear(128, classes),
        )  # fmt: skip


def runs_of(spec: Spec) -> list[Run]:
    """All runs, seed by seed, so that what is compared was run at the same time."""
    return [
        Run(f"{'InfoBatch' if prune else 'all data'}, {name}", kind, prune, seed)
        for seed in range(spec.seeds)
        for kind, name in (("mds", "MDS"), ("wds", "WebDataset"))
        for prune in (False, True)
    ]


def train_all(spec: Spec, progress: ProgressCallback, ended: Callable[[Run], None]) -> list[Run]:
    """Train all runs, one after the other, and call ``ended`` after each; the same results on every rank."""
    runs = runs_of(spec)
    for run in runs:
        _train(spec, run, progress)
        ended(run)
    return runs


def _train(spec: Spec, run: Run, progress: ProgressCallback) -> None:
    test_images, test_labels = _test_set(Path(spec.folder))
    torch.manual_seed(run.seed)
    net: nn.Module = SmallCNN(test_images.shape[-1], spec.classes)
    model = nn.parallel.DistributedDataParallel(net) if dist.is_initialized() else net
    optimizer, peak = _optimizer(spec.optimizer, net)
    store = Path(spec.folder) / f"{run.format}-{'soft' if run.prune else 'full'}-{run.seed}.zarr"
    world = dist.get_world_size() if dist.is_initialized() else 1
    with InfoBatchLoader(
        _dataset(Path(spec.folder) / run.format, run.format),
        store,
        batch_size=spec.batch // world,
        epochs=spec.epochs,
        policy=SoftPruning(ratio=0.5) if run.prune else FullData(),
        seed=run.seed,
        existing="overwrite",
        collate_fn=_batch,
    ) as loader:
        for epoch in range(loader.epoch, loader.epochs):
            start = time.perf_counter()
            model.train()
            for (images, labels), picks in loader:
                for group in optimizer.param_groups:
                    group["lr"] = peak * _schedule(loader.progress)
                losses = F.cross_entropy(model(images), labels, reduction="none")
                loss = loader.update(losses, picks)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                progress(run, epoch, loader.step, len(loader))
            stats = loader.stats
            loader.commit()
            run.seconds += time.perf_counter() - start
            run.saved = stats["saved"]
            run.trained.append(int(stats["kept"]) + (run.trained[-1] if run.trained else 0))
            run.accuracy.append(_accuracy(net, test_images, test_labels))
            scores = ScoreStore.open(store, mode="r").scores
            run.means.append(float(scores.mean(dtype=np.float64)))
            run.histograms.append(np.histogram(scores, SCORE_EDGES)[0].tolist())


def _optimizer(name: str, net: nn.Module) -> tuple[torch.optim.Optimizer, float]:
    """The optimizer and its highest learning rate."""
    if name == "adamw":
        return torch.optim.AdamW(net.parameters()), 2e-3
    return torch.optim.SGD(net.parameters(), momentum=0.9, nesterov=True, weight_decay=5e-4), 5e-2


def _schedule(progress: float) -> float:
    """Linear warm-up over the first tenth of the run, then a cosine to 0."""
    return progress / 0.1 if progress < 0.1 else 0.5 * (1 + math.cos(math.pi * (progress - 0.1) / 0.9))


def _dataset(folder: Path, kind: str) -> Any:
    if kind == "wds":
        return IndexedWebDataset(folder).decode().to_tuple("npy", "cls")
    from streaming import StreamingDataset

    return StreamingDataset(local=str(folder))


def _batch(samples: list[Any]) -> tuple[Tensor, Tensor]:
    """(float32[b, 1, side, side] in 0..1, int64[b]) of MDS's dicts or WebDataset's tuples."""
    pairs = [(s["image"], s["label"]) if isinstance(s, dict) else s for s in samples]
    images = torch.from_numpy(np.stack([image for image, _ in pairs]))
    return images[:, None].float() / 255, torch.tensor([int(label) for _, label in pairs])


def _test_set(folder: Path) -> tuple[Tensor, Tensor]:
    with np.load(folder / "test.npz", allow_pickle=False) as saved:
        return torch.from_numpy(saved["images"])[:, None].float() / 255, torch.from_numpy(saved["labels"])


@torch.no_grad()
def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    right = sum(
        int((model(images[start : start + 1000]).argmax(1) == labels[start : start + 1000]).sum())
        for start in range(0, len(images), 1000)
    )
    return right / len(images)


def main(path: Path) -> None:
    """Train what the spec at ``path`` says as one rank of torchrun; rank 0 prints what is done, and writes the runs."""
    dist.init_process_group("gloo")
    try:
        leads = dist.get_rank() == 0

        def progress(run: Run, epoch: int, step: int, steps: int) -> None:
            if leads and step == steps:
                sys.stderr.write(f"{run.name}, seed {run.seed}: epoch {epoch + 1}, {step} steps\n")

        def ended(run: Run) -> None:
            if leads:
                sys.stdout.write(f"{run.outcome()}\n")
                sys.stdout.flush()

        runs = train_all(Spec(**json.loads(path.read_text())), progress, ended)
        if leads:
            path.with_name("runs.json").write_text(json.dumps([dataclasses.asdict(run) for run in runs]))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
