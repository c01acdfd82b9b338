"""What the lossless study trains: a dataset and a model each, of a size for a CPU or for a GPU."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from benchmarks.lossless.data import MAILS, MIRRORED, MOVED, Data, sources
from benchmarks.lossless.models import GPT, TextCNN, ViT, resnet8, resnet18, small_cnn

__all__ = ["FAMILIES", "TASKS", "Task"]


@dataclass(frozen=True)
class Task:
    """A dataset and a model.

    model(): fresh, on the CPU. epochs, batch, peak: of the full run, peak being its highest learning rate. samples: of
    the dataset, or None for all. tiny: as many of a run that only shows that it works. adaptive: by AdamW, else SGD.
    decay: of weights. clip: the largest norm of a gradient. warmup: share of the run. bfloat16: on the CPU too; with
    CUDA always. by_loss: it is judged by its test loss, in percent of that of full data, and not by its accuracy.
    """

    name: str
    data: Data
    model: Callable[[], nn.Module]
    epochs: int
    batch: int
    peak: float
    tiny: int
    samples: int | None = None
    adaptive: bool = False
    decay: float = 5e-4
    clip: float | None = None
    warmup: float = 0.15
    bfloat16: bool = False
    by_loss: bool = False

    def optimizer(self, parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
        """Its learning rate is set before every step."""
        if self.adaptive:
            return torch.optim.AdamW(parameters, weight_decay=self.decay)
        return torch.optim.SGD(parameters, momentum=0.9, nesterov=True, weight_decay=self.decay)

    def rate(self, kept: float) -> float:
        """The highest learning rate by the square root rule, of an epoch that keeps this share.

        Its batches stand for 1/kept times as many samples, for which the rule has sqrt(1/kept) times as large a rate
        (SGD: Krizhevsky, 2014; Adam: Malladi et al., 2022). With SGD the weights alone make a step 1/kept times as
        large, with AdamW they change nothing.
        """
        return self.peak * kept ** (-0.5 if self.adaptive else 0.5)


FAMILIES = {  # five of them: what they are, and their tasks, for a CPU and for a GPU where there is one
    "ResNet-18, SGD": ("resnet18-cpu", "resnet18"),
    "ViT, AdamW": ("vit-cpu", "vit"),
    "GPT, AdamW": ("gpt-cpu", "gpt"),
    "text CNN, AdamW": ("spam",),
    "small CNN, SGD": ("cnn-cpu",),
}
TASKS = {
    task.name: task
    for task in (
        Task("fashion-mnist", MIRRORED, small_cnn, 20, 128, 0.1, 512, bfloat16=True),
        Task("fashion-mnist-resnet8", MOVED, resnet8, 12, 128, 0.3, 256, samples=20_000, warmup=0.1),
        Task("spam", MAILS, TextCNN, 20, 32, 3e-3, 512, adaptive=True, decay=0.01, bfloat16=True),
        Task("cnn-cpu", MIRRORED, small_cnn, 12, 64, 0.05, 512, samples=12_000),
        Task("resnet18-cpu", MOVED, partial(resnet18, 8, 2), 12, 64, 0.05, 256, samples=5_000),
        Task("resnet18", MOVED, partial(resnet18, 32), 12, 256, 0.2, 256, samples=30_000),
        Task(
            "vit-cpu", MOVED, partial(ViT, 64, 4, 7), 12, 64, 2e-3, 256,
            samples=4_000, adaptive=True, decay=0.05, clip=1.0,
        ),
        Task(
            "vit", MOVED, partial(ViT, 192, 6, 4), 12, 256, 1e-3, 256,
            samples=30_000, adaptive=True, decay=0.05, clip=1.0,
        ),
        Task(
            "gpt-cpu", sources(48), partial(GPT, 64, 2, 48), 12, 32, 8e-3, 256,
            samples=2_000, adaptive=True, decay=0.1, clip=1.0, by_loss=True,
        ),
        Task(
            "gpt", sources(255), partial(GPT, 256, 6, 255), 12, 64, 1e-3, 128,
            samples=6_000, adaptive=True, decay=0.1, clip=1.0, by_loss=True,
        ),
    )
}  # fmt: skip
