"""What the lossless study learns from: images of Fashion-MNIST, e-mails, and Python sources.

Data are read from MDS shards that the project's own tools wrote, through the loader, as in any other run.
"""

import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.lossless.models import WORDS
from infobatch_stream.convert import write_shards
from infobatch_stream.convert.readers import read_source

__all__ = ["MAILS", "MIRRORED", "MOVED", "Data", "sources"]

Samples = list[dict[str, Any]]
Collate = Callable[[Samples], tuple[Tensor, Tensor]]

_LENGTH = 128  # words of a mail that are read
_TESTS = 2_000  # texts for testing


@dataclass(frozen=True)
class Data:
    """A dataset, and how its samples become tensors.

    name: of a folder of samples for several tasks. read(folder) -> (train, test): lists of {"data": array, "label":
    int}, without order; the first so many are taken. collate: samples to (inputs, labels), augmented. plain: the same
    without augmentation.
    """

    name: str
    read: Callable[[Path], tuple[Samples, Samples]]
    collate: Collate
    plain: Collate

    def prepare(self, source: Path, folder: Path, samples: int | None, tests: int | None = None) -> None:
        """Write ``folder``/train (MDS) and test.npz of so many ``samples`` and ``tests``, unless they are there."""
        if (folder / "test.npz").exists():
            return
        train, test = self.read(source)
        write_shards(iter(train[:samples]), folder / "train", "mds", shard_bytes=1 << 23)
        _save(folder / "test.npz", test[:tests])

    def pack(self, source: Path, folder: Path, samples: int | None) -> None:
        """The same as two files, for where StreamingDataset is not installed."""
        train, test = self.read(source)
        _save(folder / "train.npz", train[:samples])
        _save(folder / "test.npz", test)

    @staticmethod
    def open(folder: Path, batch: int) -> Any:
        """The samples for training, as a dataset for the loader."""
        if (folder / "train.npz").exists():
            return _load(folder / "train.npz")
        from streaming import StreamingDataset

        return StreamingDataset(local=str(folder / "train"), batch_size=batch)

    def test_set(self, folder: Path) -> tuple[Tensor, Tensor]:
        """(inputs, labels) of all test samples."""
        return self.plain(_load(folder / "test.npz"))


def _save(file: Path, samples: Samples) -> None:
    np.savez_compressed(
        file,
        data=np.stack([sample["data"] for sample in samples]),
        label=np.array([sample["label"] for sample in samples]),
    )


def _load(file: Path) -> Samples:
    with np.load(file, allow_pickle=False) as saved:
        pairs = zip(saved["data"], saved["label"].tolist(), strict=True)
        return [{"data": data, "label": label} for data, label in pairs]


# Fashion-MNIST ---------------------------------------------------------------------------------------------------


def _read_images(source: Path) -> tuple[Samples, Samples]:
    sets = {one.name: one for one in read_source(source)}
    both = [
        [{"data": sample["image"], "label": int(sample["label"])} for sample in _all(sets[name])]
        for name in ("train", "test")
    ]
    return both[0], both[1]


def _all(source: Any) -> Iterator[dict[str, Any]]:
    return (source[at] for at in range(len(source)))


def _pictures(samples: Samples) -> tuple[NDArray[np.uint8], Tensor]:
    return np.stack([sample["data"] for sample in samples]), torch.tensor([sample["label"] for sample in samples])


def _plain_images(samples: Samples) -> tuple[Tensor, Tensor]:
    """float32[b, 1, 28, 28] of mean 0 and deviation 1, int64[b]."""
    images, labels = _pictures(samples)
    return (torch.from_numpy(images)[:, None].float() / 255 - 0.286) / 0.353, labels


def _mirrored_images(samples: Samples) -> tuple[Tensor, Tensor]:
    """The same, each mirrored with probability 1/2."""
    images, labels = _plain_images(samples)
    return torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images), labels


def _moved_images(samples: Samples) -> tuple[Tensor, Tensor]:
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


MIRRORED = Data("images", _read_images, _mirrored_images, _plain_images)
MOVED = Data("images", _read_images, _moved_images, _plain_images)

# Spam Assassin's e-mails -----------------------------------------------------------------------------------------


def _read_mails(source: Path) -> tuple[Samples, Samples]:
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


def _mails(samples: Samples) -> tuple[Tensor, Tensor]:
    """int64[b, 128] words, int64[b] labels."""
    words = torch.from_numpy(np.stack([sample["data"] for sample in samples]))
    return words, torch.tensor([sample["label"] for sample in samples])


def _dropped_words(samples: Samples) -> tuple[Tensor, Tensor]:
    """The same with a tenth of the words left out at random."""
    words, labels = _mails(samples)
    return words * (torch.rand(words.shape) >= 0.1), labels


MAILS = Data("mails", _read_mails, _dropped_words, _mails)

# Python sources --------------------------------------------------------------------------------------------------


def _read_sources(length: int, source: Path) -> tuple[Samples, Samples]:
    """Texts of ``length`` + 1 bytes from the packages in the folder ``source``, such as site-packages.

    A package is either for training or, one of four by its name, for testing. Its own tests are left out. In an order
    drawn once and for all.
    """
    kinds: tuple[list[bytes], list[bytes]] = [], []
    for package in sorted(folder for folder in source.iterdir() if (folder / "__init__.py").exists()):
        test = zlib.crc32(package.name.encode()) % 4 == 0
        files = (file for file in sorted(package.rglob("*.py")) if "test" not in str(file.relative_to(package)))
        kinds[test].extend(_texts(files, length + 1))
    both = []
    for texts in kinds:
        order = np.random.default_rng(0).permutation(len(texts))
        both.append([{"data": np.frombuffer(texts[at], dtype=np.uint8), "label": 0} for at in order])
    return both[0], both[1][:_TESTS]


def _texts(files: Iterable[Path], length: int) -> Iterator[bytes]:
    """One after another from each of ``files``; what is left of a file is left out."""
    for file in files:
        text = file.read_bytes()
        yield from (text[start : start + length] for start in range(0, len(text) - length + 1, length))


def _next_bytes(samples: Samples) -> tuple[Tensor, Tensor]:
    """int64[b, length] bytes, int64[b, length] those that follow each."""
    text = torch.from_numpy(np.stack([sample["data"] for sample in samples])).long()
    return text[:, :-1], text[:, 1:]


def sources(length: int) -> Data:
    """Texts of ``length`` bytes, of each of which the next is to be told."""
    return Data(f"texts-{length}", partial(_read_sources, length), _next_bytes, _next_bytes)
