"""What the lossless study trains: Fashion-MNIST with a small CNN or a ResNet-18, spam e-mails with a small text model.

Data are read from MDS shards that the project's own tools wrote, through the loader, as in any other run.
"""

import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.lossless_models import WORDS, TextCNN, resnet8, resnet18, small_cnn
from infobatch_stream.convert import write_shards
from infobatch_stream.convert.readers import read_source

__all__ = ["TASKS", "Task"]

_LENGTH = 128  # words of a mail that are read


@dataclass(frozen=True)
class Task:
    """A dataset and a model.

    read(folder) -> (train, test): lists of {"data": array, "label": int}, without order. model(): fresh, on the CPU.
    collate: samples to (inputs, labels), augmented. plain: the same without augmentation. adaptive: by AdamW, else SGD.
    epochs, batch, peak: of the full run, peak being its highest learning rate. tiny: samples of a run that only shows
    that it works. warmup: share of the run. bfloat16: on the CPU too; with CUDA always.
    """

    name: str
    read: Callable[[Path], tuple[list[dict[str, Any]], list[dict[str, Any]]]]
    model: Callable[[], nn.Module]
    collate: Callable[[list[dict[str, Any]]], tuple[Tensor, Tensor]]
    plain: Callable[[list[dict[str, Any]]], tuple[Tensor, Tensor]]
    adaptive: bool
    epochs: int
    batch: int
    peak: float
    tiny: int
    warmup: float = 0.15
    bfloat16: bool = True

    def optimizer(self, parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
        """Its learning rate is set before every step."""
        if self.adaptive:
            return torch.optim.AdamW(parameters, weight_decay=0.01)
        return torch.optim.SGD(parameters, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def rate(self, kept: float) -> float:
        """The highest learning rate by the square root rule, of an epoch that keeps this share.

        Its batches stand for 1/kept times as many samples, for which the rule has sqrt(1/kept) times as large a rate
        (SGD: Krizhevsky, 2014; Adam: Malladi et al., 2022). With SGD the weights alone make a step 1/kept times as
        large, with AdamW they change nothing.
        """
        return self.peak * kept ** (-0.5 if self.adaptive else 0.5)

    def prepare(self, source: Path, folder: Path, *, tiny: bool) -> None:
        """Write ``folder``/train (MDS) and test.npz, unless they are there."""
        if (folder / "test.npz").exists():
            return
        train, test = self.read(source)
        if tiny:
            train, test = train[: self.tiny], test[: self.tiny // 2]
        write_shards(iter(train), folder / "train", "mds", shard_bytes=1 << 23)
        np.savez(
            folder / "test.npz",
            data=np.stack([sample["data"] for sample in test]),
            label=np.array([sample["label"] for sample in test]),
        )

    def test_set(self, folder: Path) -> tuple[Tensor, Tensor]:
        """(inputs, labels) of all test samples."""
        with np.load(folder / "test.npz", allow_pickle=False) as saved:
            pairs = zip(saved["data"], saved["label"], strict=True)
            return self.plain([{"data": data, "label": int(label)} for data, label in pairs])


# Fashion-MNIST ---------------------------------------------------------------------------------------------------


def _read_images(source: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    sets = {one.name: one for one in read_source(source)}
    both = [
        [{"data": sample["image"], "label": int(sample["label"])} for sample in _all(sets[name])]
        for name in ("train", "test")
    ]
    return both[0], both[1]


def _read_some_images(source: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    train, test = _read_images(source)
    return train[:20_000], test


def _all(source: Any) -> Iterator[dict[str, Any]]:
    return (source[at] for at in range(len(source)))


def _pictures(samples: list[dict[str, Any]]) -> tuple[NDArray[np.uint8], Tensor]:
    return np.stack([sample["data"] for sample in samples]), torch.tensor([sample["label"] for sample in samples])


def _plain_images(samples: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """float32[b, 1, 28, 28] of mean 0 and deviation 1, int64[b]."""
    images, labels = _pictures(samples)
    return (torch.from_numpy(images)[:, None].float() / 255 - 0.286) / 0.353, labels


def _mirrored_images(samples: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """The same, each mirrored with probability 1/2."""
    images, labels = _plain_images(samples)
    return torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images), labels


def _moved_images(samples: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """The same, cropped with a padding of 2 and mirrored at random, as drawn from torch's generator."""
    images, labels = _pictures(samples)
    count, side = len(images), images.shape[-1]
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    down, right = torch.randint(0, 5, (2, count)).numpy()
    mirrored = (torch.rand(count) < 0.5).numpy()
    places = np.arange(side)
    rows = down[:, None] + places
    columns = right[:, None] + np.where(mirrored[:, None], places[::-1], places)
    moved = padded[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return (torch.from_numpy(moved)[:, None].float() / 255 - 0.286) / 0.353, labels


# Spam Assassin's e-mails -----------------------------------------------------------------------------------------


def _read_mails(source: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Spam or ham, of the words of subject and body; a fifth of the mails, drawn once and for all, for testing."""
    samples = []
    for file in sorted(source.glob("*-*/*.json")):
        mail = json.loads(file.read_text())
        head, _, body = mail["text"].partition("\n\n")
        subject = " ".join(re.findall(r"^Subject:(.*)$", head, re.MULTILINE))
        words = re.findall(r"[a-z']+|[0-9$!]+", f"{subject} {body}".lower())[:_LENGTH]
        places = np.zeros(_LENGTH, dtype=np.int64)
        places[: len(words)] = [1 + zlib.crc32(word.encode()) % (WORDS - 1) for word in words]
        samples.append({"data": places, "label": int(mail["group"].startswith("spam"))})
    order = np.random.default_rng(0).permutation(len(samples))
    cut = len(samples) // 5
    return [samples[at] for at in order[cut:]], [samples[at] for at in order[:cut]]


def _mails(samples: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """int64[b, 128] words, int64[b] labels."""
    words = torch.from_numpy(np.stack([sample["data"] for sample in samples]))
    return words, torch.tensor([sample["label"] for sample in samples])


def _dropped_words(samples: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """The same with a tenth of the words left out at random."""
    words, labels = _mails(samples)
    return words * (torch.rand(words.shape) >= 0.1), labels


TASKS = {
    task.name: task
    for task in (
        Task("fashion-mnist", _read_images, small_cnn, _mirrored_images, _plain_images, False, 20, 128, 0.1, 512),
        Task("fashion-mnist-resnet18", _read_images, resnet18, _moved_images, _plain_images, False, 40, 128, 0.1, 128),
        Task(
            "fashion-mnist-resnet8",
            _read_some_images,
            resnet8,
            _moved_images,
            _plain_images,
            False,
            12,
            128,
            0.3,
            256,
            warmup=0.1,
            bfloat16=False,
        ),
        Task("spam", _read_mails, TextCNN, _dropped_words, _mails, True, 20, 32, 3e-3, 512),
    )
}
