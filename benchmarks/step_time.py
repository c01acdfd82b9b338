"""What constant steps save in time: how long a training step takes, by the size of its batch.

With constant steps a run that skips samples makes as many steps, each of a smaller batch. Its time falls only as far as
a step of a smaller batch is shorter. In the published mode batches keep their size and steps are fewer. On the CPU the
time is that of the processor, of one thread, so that other work on the machine does not count.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.lossless.models import TextCNN, resnet8, transformer
from benchmarks.measure import Spread, busy_seconds, in_turn, ratio
from benchmarks.report import Figure

__all__ = ["TITLE", "Subject", "run", "saved", "table"]

TITLE = "Step time against batch size"

_SHARES = {"7/8": 7 / 8, "3/4": 3 / 4, "1/2": 1 / 2, "1/4": 1 / 4, "1/8": 1 / 8}  # of the batch, below a whole one
_SKIPPED = (0.3, 0.5)
_WHOLE = "step"


@dataclass(frozen=True)
class Subject:
    """A model and its data. data(batch): inputs and labels on the CPU. steps: in one measurement."""

    name: str
    model: Callable[[], nn.Module]
    data: Callable[[int], tuple[Tensor, Tensor]]
    adaptive: bool
    batch: int
    steps: int


def _images(side: int, channels: int, classes: int, batch: int) -> tuple[Tensor, Tensor]:
    images = torch.randn(batch, channels, side, side).contiguous(memory_format=torch.channels_last)
    return images, torch.randint(0, classes, (batch,))


def _text(length: int, words: int, classes: int, batch: int) -> tuple[Tensor, Tensor]:
    return torch.randint(0, words, (batch, length)), torch.randint(0, classes, (batch,))


def _bytes(length: int, batch: int) -> tuple[Tensor, Tensor]:
    text = torch.randint(0, 256, (batch, length + 1))
    return text[:, :-1], text[:, 1:]


def _resnet50() -> nn.Module:
    from torchvision.models import resnet50

    return resnet50().to(memory_format=torch.channels_last)


def _subjects(device: str) -> Iterator[Subject]:
    yield Subject("ResNet of 8 layers, 28x28", resnet8, partial(_images, 28, 1, 10), False, 128, 8)
    yield Subject("text CNN of 128 words", TextCNN, partial(_text, 128, 1 << 13, 2), True, 32, 40)
    if device == "cpu":
        small = partial(transformer, width=128, layers=4)
        yield Subject("transformer of 0.9 M weights, 64 bytes", small, partial(_bytes, 64), True, 32, 4)
        return
    large = partial(transformer, width=768, layers=12)
    yield Subject("transformer of 85 M weights, 512 bytes", large, partial(_bytes, 512), True, 32, 10)
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return
    yield Subject("ResNet-50, 224x224", _resnet50, partial(_images, 224, 3, 1000), False, 256, 10)


def _seconds(subject: Subject, device: str) -> Callable[[int, int], float]:
    """A function of the batch and the number of steps: seconds per step, forward, backward and optimizer."""
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    model = subject.model().to(device)
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(model.parameters(), lr=1e-4)
        if subject.adaptive
        else torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    )

    def step(inputs: Tensor, labels: Tensor) -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            outputs = model(inputs)
        losses = F.cross_entropy(outputs.float().flatten(0, -2), labels.flatten(), reduction="none")
        optimizer.zero_grad()
        (losses.sum() / labels.numel()).backward()
        optimizer.step()

    def measure(batch: int, steps: int) -> float:
        inputs, labels = (part.to(device) for part in subject.data(batch))
        start = 0.0
        for number in range(steps + 2):  # the first two do not count
            if number == 2:
                start = busy_seconds(device)
            step(inputs, labels)
        return (busy_seconds(device) - start) / steps

    return measure


def saved(times: dict[float, float], skipped: float) -> float:
    """The share of a run's time that it saves with constant steps, when every epoch skips the share ``skipped``.

    times: of a step, by the share of the batch that it holds, 1.0 among them. Between two of them: on a line.
    """
    shares = sorted(times)
    return 1 - float(np.interp(1 - skipped, shares, [times[share] for share in shares])) / times[1.0]


def run(tiny: bool) -> list[Figure]:
    """Step times, of a device where there is one, and what a run saves by them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [figure for subject in _subjects(device) for figure in _figures(subject, device, tiny)]


def _figures(subject: Subject, device: str, tiny: bool) -> Iterator[Figure]:
    measure = _seconds(subject, device)
    batch, steps, rounds = (8, 1, 1) if tiny else (subject.batch, subject.steps, 9)
    sizes = {share: max(1, round(batch * share)) for share in (1.0, *_SHARES.values())}
    found = in_turn({str(share): partial(measure, size, steps) for share, size in sizes.items()}, rounds)
    who, whole = f"{subject.name}, batch {batch}", found["1.0"]
    yield Figure(0, f"{who}: {_WHOLE}", Spread.of(whole).scaled(1000), "ms", "forward, backward and optimizer")
    for name, share in _SHARES.items():
        yield Figure(0, f"{who}: {name}", ratio(found[str(share)], whole), "x", "the time of a step of the whole batch")
    for skipped in _SKIPPED:
        rounds_of = [{share: found[str(share)][number] for share in sizes} for number in range(rounds)]
        value = Spread.of([100 * saved(times, skipped) for times in rounds_of])
        limit = "time saved with constant steps, loading left out; as published it is as much as is skipped"
        yield Figure(0, f"{who}: {100 * skipped:g} % skipped", value, "%", limit)


def table(figures: list[Figure]) -> str:
    """A row for each model, ratios first, then what is saved, with lowest and highest: Markdown."""
    rows: dict[str, list[str]] = {}
    columns: list[str] = []
    for figure in figures:
        who, _, column = figure.what.rpartition(": ")
        columns += [column] if column not in columns else []
        value = figure.value
        shown = [f"{one:.1f}" if figure.unit == "ms" else f"{one:.2f}" for one in (value.median, value.low, value.high)]
        if figure.unit == "%":
            shown = [f"{one:.0f} %" for one in (value.median, value.low, value.high)]
        rows.setdefault(who, []).append(f"{shown[0]} ({shown[1]} to {shown[2]})")
    names = {_WHOLE: "a step, ms"} | {f"{100 * share:g} % skipped": f"saved at {100 * share:g} %" for share in _SKIPPED}
    head = ["model", *(names.get(column, column) for column in columns)]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * len(head))} |"]
    return "\n".join([*lines, *(f"| {' | '.join([who, *cells])} |" for who, cells in rows.items())])
