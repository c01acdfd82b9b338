"""A ResNet trained on JPEG shards: what the loader and `update` cost the device, and what pruning saves of a run.

With CUDA: ResNet-50 at 224x224 in bf16 and channels_last, and how long the device had nothing to do. Without: a small
ResNet at small pictures, to see that it works; its figures say little.
"""

import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Spread, in_turn, ratio
from benchmarks.pictures import Crop, jpegs, source
from benchmarks.report import Figure
from infobatch_stream import FullData, IndexedWebDataset, InfoBatchLoader, SoftPruning
from infobatch_stream.convert import write_shards
from infobatch_stream.formats.schema import EncodedImage
from infobatch_stream.picks import Picks
from infobatch_stream.policies.base import Policy

__all__ = ["TITLE", "run"]

TITLE = "Training on JPEG shards"

_CLASSES = 100
_Update = Callable[[Tensor, Picks], Tensor]
_Batches = Iterable[tuple[tuple[Tensor, Tensor], Picks]]


@dataclass(frozen=True)
class Scale:
    """How large all is. pixels: height and width. rounds: of the comparison. epochs: of the whole runs."""

    device: str
    samples: int
    batch: int
    pixels: int
    workers: int
    rounds: int
    epochs: int


def run(tiny: bool) -> list[Figure]:
    """Samples per second and idle time with the loader and with tensors in place; the time that pruning saves."""
    cuda, cores = torch.cuda.is_available(), os.cpu_count() or 1
    if tiny:
        scale = Scale("cuda" if cuda else "cpu", 32, 8, 64, 1, rounds=1, epochs=3)
    elif cuda:
        scale = Scale("cuda", 12_800, 256, 224, min(cores, 16), rounds=3, epochs=8)
    else:
        scale = Scale("cpu", 640, 32, 64, min(cores, 2), rounds=3, epochs=8)
    who = f"{torch.cuda.get_device_name()}, ResNet-50" if cuda else "CPU, a small ResNet"
    who = f"{who} at {scale.pixels}x{scale.pixels}, batch {scale.batch}"
    with tempfile.TemporaryDirectory(prefix="infobatch-benchmark-") as folder:
        print(f"writing {scale.samples:,} JPEG files as shards", file=sys.stderr)
        files = enumerate(jpegs(scale.samples))
        samples = ({"image": EncodedImage(file, "jpg"), "label": number % _CLASSES} for number, file in files)
        write_shards(samples, Path(folder, "shards"), "wds", shard_bytes=1 << 26)
        return [*_loops(scale, Path(folder), who), *_whole_runs(scale, Path(folder), who)]


def _loader(scale: Scale, folder: Path, store: str, policy: Policy, epochs: int) -> InfoBatchLoader:
    shards = [str(shard) for shard in sorted(Path(folder, "shards").glob("*.tar"))]
    dataset = IndexedWebDataset(shards).to_tuple("jpg", "cls").map_tuple(Crop(scale.pixels), int)
    return InfoBatchLoader(
        dataset, folder / store, batch_size=scale.batch, epochs=epochs, policy=policy, num_workers=scale.workers,
        persistent_workers=scale.workers > 0, pin_memory=scale.device == "cuda",
    )  # fmt: skip


class Trainer:
    """A model and its step. With CUDA, no call of a step waits for the device."""

    def __init__(self, scale: Scale) -> None:
        from torchvision.models.resnet import BasicBlock, ResNet, resnet50

        torch.manual_seed(0)
        self._cuda = scale.device == "cuda"
        torch.backends.cudnn.benchmark = self._cuda
        model = resnet50(num_classes=_CLASSES) if self._cuda else ResNet(BasicBlock, [1, 1, 1, 1], _CLASSES)
        self._device = torch.device(scale.device)
        self._model = model.to(self._device, memory_format=torch.channels_last)
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=0.02, momentum=0.9)

    def place(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Both on the device."""
        images = images.to(self._device, non_blocking=True)
        return images.contiguous(memory_format=torch.channels_last), labels.to(self._device, non_blocking=True)

    def step(self, images: Tensor, labels: Tensor, picks: Picks, update: _Update) -> None:
        """One step, with the loss that ``update`` makes of a loss for each sample."""
        images, labels = self.place(images, labels)
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._cuda):
            losses = torch.nn.functional.cross_entropy(self._model(images / 255), labels, reduction="none")
        update(losses, picks).backward()
        self._optimizer.step()

    def wait(self) -> None:
        """For the device."""
        if self._cuda:
            torch.cuda.synchronize()

    def rate(self, batches: _Batches, update: _Update, watch: AbstractContextManager[Any]) -> float:
        """Samples per second, from the second of ``batches`` to the end of the last step; ``watch`` is around that."""
        rest = iter(batches)
        self._take(next(rest), update)
        self.wait()
        with watch:
            start = time.perf_counter()
            count = sum(self._take(batch, update) for batch in rest)
            self.wait()
            return count / (time.perf_counter() - start)

    def _take(self, batch: tuple[tuple[Tensor, Tensor], Picks], update: _Update) -> int:
        (images, labels), picks = batch
        self.step(images, labels, picks, update)
        return len(picks)


def _mean(losses: Tensor, picks: Picks) -> Tensor:
    return losses.mean()


# ---- the loader and update, beside tensors that are in place


def _loops(scale: Scale, folder: Path, who: str) -> Iterator[Figure]:
    trainer = Trainer(scale)
    loader = _loader(scale, folder, "loops.zarr", FullData(), 10**6)
    steps = scale.samples // scale.batch

    def preloaded(update: _Update, watch: AbstractContextManager[Any]) -> float:
        return trainer.rate(_in_place(trainer, loader, steps), update, watch)

    contenders: dict[str, Callable[[AbstractContextManager[Any]], float]] = {
        "preloaded": partial(preloaded, _mean),
        "update": partial(preloaded, loader.update),
        "loader": lambda watch: trainer.rate(loader, loader.update, watch),
    }
    found = in_turn({name: partial(contender, nullcontext()) for name, contender in contenders.items()}, scale.rounds)
    note = f"{scale.workers} workers decode {scale.samples:,} JPEG files of 500x375 ({source()}) in tar shards"
    if scale.device != "cuda":
        note += "; NO CUDA DEVICE was at hand: what the target asks for, a ResNet-50 on one, is not measured"
    yield Figure(9, f"{who}: loader and update", ratio(found["loader"], found["preloaded"]), "x",
                 "samples per second of the same loop with tensors on the device", note=note)  # fmt: skip
    yield Figure(9, f"{who}: update alone", ratio(found["update"], found["preloaded"]), "x", "as above")
    for name in contenders:
        yield Figure(0, f"{who}: {name}", Spread.of(found[name]), "samples/s", "the decoding of JPEG, and the device")
    if scale.device == "cuda":
        idle = {name: _idle(contender) for name, contender in contenders.items()}
        for name, beside in (("update", "preloaded"), ("loader", "update")):
            yield Figure(9, f"{who}: idle because of the {name}".replace("the update", "update"),
                         Spread.of([100 * (idle[name] - idle[beside])]), "%",
                         f"{100 * idle[beside]:.3g} % idle without it",
                         note="time without a kernel on the device, by torch.profiler")  # fmt: skip


def _in_place(trainer: Trainer, loader: InfoBatchLoader, steps: int) -> _Batches:
    """``steps`` batches that are on the device already, with picks of an epoch of ``loader``."""
    few = [(trainer.place(*data), picks) for data, picks in itertools.islice(loader, min(steps, 8))]
    trainer.wait()
    return itertools.islice(itertools.cycle(few), steps)


def _idle(train: Callable[[AbstractContextManager[Any]], Any]) -> float:
    """Share of the time, from the first kernel of ``train`` to its last, in which no kernel ran."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    profiler = profile(activities=[ProfilerActivity.CUDA])
    train(profiler)
    return _gaps(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type == DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset"))
    )


def _gaps(spans: Iterable[tuple[float, float]]) -> float:
    """The share of the time from the first start to the last end that is in none of the ``spans`` (start, end)."""
    ordered = sorted(spans)
    first = until = ordered[0][0]
    busy = 0.0
    for start, end in ordered:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return 1 - busy / (until - first)


# ---- whole runs


def _whole_runs(scale: Scale, folder: Path, who: str) -> Iterator[Figure]:
    taken, saved = {}, 0.0
    for name, policy in (("full", FullData()), ("pruned", SoftPruning(0.5))):
        loader = _loader(scale, folder, f"{name}.zarr", policy, scale.epochs)
        trainer = Trainer(scale)
        start = time.perf_counter()
        for _ in range(loader.epoch, loader.epochs):
            for (images, labels), picks in loader:
                trainer.step(images, labels, picks, loader.update)
            saved = loader.stats["saved"]
        loader.commit()
        trainer.wait()
        taken[name] = time.perf_counter() - start
    share = 100 * (1 - taken["pruned"] / taken["full"])
    yield Figure(9, f"{who}: time saved of {scale.epochs} epochs", Spread.of([share]), "%",
                 f"{100 * saved:.3g} % of the samples were not trained on",
                 note="SoftPruning(0.5), delta 0.875, against FullData; start of workers and commits "
                 "included, made once")  # fmt: skip
    for name, seconds in taken.items():
        yield Figure(0, f"{who}: {scale.epochs} epochs, {name}", Spread.of([seconds]), "s", "wall-clock")
