"""What `update` costs a step: alone, beside the step of a ResNet-50, and against a gather of losses on every step."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.measure import Spread, in_turn, ratio
from benchmarks.report import Figure
from infobatch_stream import InfoBatchLoader
from infobatch_stream.picks import Picks

__all__ = ["TITLE", "gather", "run"]

TITLE = "The cost of update"

_BATCH = 256
_SAMPLES = 1_281_167  # of ImageNet
# NVIDIA/DeepLearningExamples, PaddlePaddle/Classification/RN50v1.5, one A100 80GB, mixed precision: 2711 images/s.
_A100 = _BATCH / 2711


class Nothing(Dataset[int]):
    """``samples`` samples that take no time to read."""

    def __init__(self, samples: int) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return self._samples

    def __getitems__(self, index: list[int]) -> list[int]:
        return [0] * len(index)

    def __getitem__(self, index: int) -> int:
        return 0


def run(tiny: bool) -> list[Figure]:
    """Host time of update at batch 256, by parts; its share of a step; the gather of every step beside it."""
    torch.set_num_threads(1)
    steps, rounds = (20, 1) if tiny else (500, 41)
    samples = 20_000 if tiny else _SAMPLES
    with tempfile.TemporaryDirectory(prefix="infobatch-benchmark-") as folder:
        loader, picks = _begun(Path(folder, "scores.zarr"), samples, 16)
        losses = torch.rand(_BATCH, requires_grad=True)
        update = partial(loader.update, losses)
        operations = partial(_operations, losses)
        found = in_turn(
            {
                "update": _timed(update, picks, steps, time.thread_time),
                "operations": _timed(operations, picks, steps, time.thread_time),
            },
            rounds,
            warmup=10,
        )
    whole = Spread.of([1e6 * seconds for seconds in found["update"]])
    parts = [1e6 * (a - b) for a, b in zip(found["update"], found["operations"], strict=True)]
    figures = [
        Figure(6, "update on the CPU", whole, "us", "host time at batch 256", bound=30, at="most",
               note="time of the thread, so waiting for a busy machine does not count; called over and over, losses "
               "with a graph, picks of 16 steps in turn"),
        Figure(0, "of that, recording", Spread.of(parts), "us", "update without the next two"),
        Figure(0, "of that, weights and mean", Spread.of(found["operations"]).scaled(1e6), "us",
               "(losses * weight).mean() in a loop of its own, which every training loop has"),
        Figure(6, "update, of a ResNet-50 step at batch 256", whole.scaled(1e-4 / _A100), "%",
               "the step of an A100, 94.4 ms (NVIDIA/DeepLearningExamples, RN50v1.5: 2711 images/s in mixed precision)",
               bound=0.2, at="most", note="the step is published, not measured; update as above, on the CPU path"),
    ]  # fmt: skip
    if torch.cuda.is_available():
        figures += _on_cuda(tiny)
    else:
        figures.append(_of_step_here(whole, tiny))
    return [*figures, *_against_gather(tiny)]


def _begun(store: Path, samples: int, steps: int) -> tuple[InfoBatchLoader, list[Picks]]:
    """A loader in its first epoch, and the picks of its first steps."""
    loader = InfoBatchLoader(Nothing(samples), store, batch_size=_BATCH, epochs=1, collate_fn=len)
    return loader, [picks for _, picks in itertools.islice(loader, steps)]


def _operations(losses: Tensor, picks: Picks) -> Tensor:
    return (losses * picks.weight).mean()


def _timed(
    act: Callable[[Picks], Any], picks: list[Picks], steps: int, clock: Callable[[], float] = time.perf_counter
) -> Callable[[], float]:
    """-> seconds per call of ``act``, with each of the picks in turn."""

    def measure() -> float:
        turns = list(itertools.islice(itertools.cycle(picks), steps))
        start = clock()
        for turn in turns:
            act(turn)
        return (clock() - start) / steps

    return measure


# ---- beside a step


def _resnet_step(batch: int, device: str) -> Callable[[], Tensor]:
    """-> one step of ResNet-50 at 224x224 in bf16, channels_last, without the loader; it returns a loss per sample."""
    from torchvision.models import resnet50

    model = resnet50().to(device, memory_format=torch.channels_last)
    images = torch.rand(batch, 3, 224, 224, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (batch,), device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            losses = torch.nn.functional.cross_entropy(model(images), labels, reduction="none")
        losses.mean().backward()
        optimizer.step()
        return losses.detach()

    return step


def _of_step_here(update: Spread, tiny: bool) -> Figure:
    batch = 1 if tiny else 8
    step = _resnet_step(batch, "cpu")
    found = in_turn({"step": partial(_seconds, step)}, rounds=1 if tiny else 3)
    scaled = Spread.of(found["step"]).scaled(_BATCH / batch)
    return Figure(
        0, "update, of a ResNet-50 step on this CPU", update.scaled(1e-4 / scaled.median), "%",
        f"{scaled.median:.3g} s for 256, scaled from a batch of {batch}", note="no CUDA device at hand",
    )  # fmt: skip


def _seconds(act: Callable[[], Any]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def _on_cuda(tiny: bool) -> Iterator[Figure]:
    """The same with losses on the device and a real step, and with an error at any call that waits for the device."""
    device, rounds = torch.cuda.get_device_name(), 1 if tiny else 15
    with tempfile.TemporaryDirectory(prefix="infobatch-benchmark-") as folder:
        loader, picks = _begun(Path(folder, "scores.zarr"), _SAMPLES, 16)
        step = _resnet_step(_BATCH, "cuda")
        losses = torch.rand(_BATCH, device="cuda", requires_grad=True)

        # Few enough calls that they fit into the queue of the device: where it is full, each waits for room.
        alone = _timed(partial(loader.update, losses), picks, 32)
        count = 4 if tiny else 20
        training = _timed(lambda turn: loader.update(step(), turn), picks, count)

        def host() -> float:
            torch.cuda.synchronize()
            with _no_waiting():
                return alone()

        def whole() -> float:
            start = time.perf_counter()
            with _no_waiting():
                training()
            torch.cuda.synchronize()
            return (time.perf_counter() - start) / count

        found = in_turn({"host": host, "whole": whole}, rounds, warmup=3)
    hosts, steps = (Spread.of(found[name]) for name in ("host", "whole"))
    yield Figure(0, f"update on {device}", hosts.scaled(1e6), "us", "host time at batch 256",
                 note='no call waits for the device: torch.cuda.set_sync_debug_mode("error")')  # fmt: skip
    yield Figure(6, f"update, of a ResNet-50 step on {device}", hosts.scaled(100 / steps.median), "%",
                 f"{1e3 * steps.median:.3g} ms: bf16, channels_last, batch 256", bound=0.2, at="most")  # fmt: skip


@contextmanager
def _no_waiting() -> Iterator[None]:
    """In here, a call that waits for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- against a gather on every step


def gather(losses: Tensor, picks: Picks, scores: Tensor, parts: list[Tensor]) -> Tensor:
    """The published step, from its description: every rank gets all ranks' (index, loss) as floats and has all scores.

    scores: float32[N]. parts: float32[2, b] for each rank, to receive into.
    """
    dist.all_gather(parts, torch.stack([picks.index.float(), losses.detach()]))
    everyones = torch.cat(parts, dim=1)
    scores[everyones[0].long()] = everyones[1]
    return (losses * picks.weight).mean()


def _against_gather(tiny: bool) -> Iterator[Figure]:
    folder = tempfile.mkdtemp(prefix="infobatch-benchmark-")
    try:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "benchmarks.update"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *command, folder, str(int(tiny))], check=True, env=environment)
        found = json.loads(Path(folder, "found.json").read_text())
    finally:
        shutil.rmtree(folder)
    yield Figure(6, "the gather of every step, 2 processes", ratio(found["gather"], found["update"]), "x",
                 "update in the same processes; both with weights and mean", bound=10,
                 note="gloo's all_gather over loopback of (index, loss) as floats; both set all scores")  # fmt: skip
    for name in ("gather", "update"):
        yield Figure(0, f"{name}, 2 processes", Spread.of(found[name]).scaled(1e6), "us", "a step at batch 256 each")


def _rank(folder: Path, tiny: bool) -> None:
    """One of two processes of torchrun: what a step takes either way."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    samples = 20_000 if tiny else _SAMPLES
    loader, picks = _begun(folder / "scores.zarr", samples, 16)
    losses = torch.rand(_BATCH, requires_grad=True)
    parts = [torch.empty(2, _BATCH) for _ in range(dist.get_world_size())]
    published = partial(gather, losses, scores=torch.full((samples,), torch.nan), parts=parts)
    steps = 20 if tiny else 1000
    contenders = {
        name: _together(_timed(act, picks, steps))
        for name, act in (("update", partial(loader.update, losses)), ("gather", published))
    }
    found = in_turn(contenders, rounds=1 if tiny else 9)
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _together(measure: Callable[[], float]) -> Callable[[], float]:
    def measured() -> float:
        dist.barrier()
        return measure()

    return measured


if __name__ == "__main__":
    _rank(Path(sys.argv[1]), bool(int(sys.argv[2])))
