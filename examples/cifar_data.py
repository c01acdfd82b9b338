"""The pictures of CIFAR and Fashion-MNIST: their files, their shards, and batches of them."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from process import Process

from infobatch_stream import IndexedWebDataset
from infobatch_stream.convert import convert, write_shards
from infobatch_stream.convert.readers import read_source

NEEDS = "{}. What this example needs: pip install 'infobatch-stream[examples,mds,wds]'"


@dataclass(frozen=True)
class Pictures:
    """folder: what the authors' archive unpacks to. mean, std: of each channel."""

    folder: str
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


DATASETS = {
    "cifar10": Pictures("cifar-10-batches-py", 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Pictures("cifar-100-python", 100, (0.5074, 0.4867, 0.4411), (0.2011, 0.1987, 0.2025)),
    "fashion-mnist": Pictures("FashionMNIST/raw", 10, (0.2860,), (0.3530,)),
}


class Batch:
    """Makes a batch of samples: float32[b, channels, side, side], normalised, and labels int64[b].

    For training, each picture is moved by up to 4 pixels (what comes in is mirrored at the edge) and flipped with
    probability 1/2, all of a batch at once. It draws from torch's default generator, which the loader seeds for each
    batch, so that a resumed run sees the same pictures.
    """

    def __init__(self, pictures: Pictures, augment: bool) -> None:
        self._mean, self._std = (torch.tensor(part).view(-1, 1, 1) for part in (pictures.mean, pictures.std))
        self._augment = augment

    def __call__(self, samples):
        pairs = [(sample["image"], sample["label"]) if isinstance(sample, dict) else sample for sample in samples]
        pixels = torch.from_numpy(np.stack([image for image, _ in pairs]))  # uint8[b, side, side] or [..., 3]
        images = pixels.view(*pixels.shape[:3], -1).permute(0, 3, 1, 2) / 255
        images = (images - self._mean) / self._std
        return self._moved(images) if self._augment else images, torch.tensor([int(label) for _, label in pairs])

    @staticmethod
    def _moved(images, most=4):
        count, _, height, width = images.shape
        padded = F.pad(images, (most,) * 4, mode="reflect")
        rows = torch.randint(2 * most + 1, (count, 1)) + torch.arange(height)
        columns = torch.randint(2 * most + 1, (count, 1)) + torch.arange(width)
        columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
        picture = torch.arange(count).view(-1, 1, 1)
        moved = padded.permute(0, 2, 3, 1)[picture, rows[:, :, None], columns[:, None, :]]
        return moved.permute(0, 3, 1, 2).contiguous()


def open_data(args: argparse.Namespace, process: Process, pictures: Pictures):
    """The training and the test set; rank 0 writes their shards if there are none yet."""
    if args.format == "map":
        if args.tiny:
            return generated(pictures, 128), generated(pictures, 41)
        test, train = read_source(source_of(args, pictures))
        return train, test
    shards = args.shards or Path(f"{'tiny-' if args.tiny else ''}{args.dataset}-{args.format}")

    def write() -> None:
        if (shards / "test").exists():
            return
        if args.tiny:
            for split, count in (("train", 128), ("test", 41)):
                write_shards(generated(pictures, count), shards / split, args.format, overwrite=True)
        else:
            convert(source_of(args, pictures), shards, args.format)

    process.first(write)
    return open_shards(shards / "train", args.format), open_shards(shards / "test", args.format)


def open_shards(folder: Path, format: str):
    if format == "wds":
        return IndexedWebDataset(folder).decode().to_tuple("npy", "cls")
    try:
        from streaming import StreamingDataset
    except ModuleNotFoundError as error:
        raise SystemExit(NEEDS.format(error)) from error

    return StreamingDataset(local=str(folder))


def source_of(args: argparse.Namespace, pictures: Pictures) -> Path:
    """The folder with the files of the dataset, which are fetched if --download says so."""
    folder = args.data / pictures.folder
    if args.download and not folder.exists():
        try:
            from torchvision import datasets
            from torchvision.datasets.utils import download_and_extract_archive
        except ModuleNotFoundError as error:
            raise SystemExit(NEEDS.format(error)) from error

        if args.dataset == "fashion-mnist":
            datasets.FashionMNIST(args.data, download=True)
        else:  # without making the dataset: torchvision would unpickle its files
            kind = datasets.CIFAR10 if args.dataset == "cifar10" else datasets.CIFAR100
            download_and_extract_archive(kind.url, args.data, filename=kind.filename, md5=kind.tgz_md5)
    return folder if folder.exists() else args.data


def generated(pictures: Pictures, count: int):
    """Noise, 8 pixels wide; of ten classes, each brighter than the one before."""
    noise = np.random.default_rng(count).integers(0, 60, (count, 8, 8, len(pictures.mean)), dtype=np.uint8)
    return [{"image": noise[n] + np.uint8(20 * (n % 10)), "label": n % 10} for n in range(count)]
