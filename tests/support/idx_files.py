"""Files as of MNIST."""

import gzip
from pathlib import Path

import numpy as np


def write_idx(path: Path, array: np.ndarray) -> None:
    data = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def make_idx(src: Path, suffix: str = "", train: int = 50, test: int = 20) -> dict[str, tuple]:
    """idx files of a training and a test split; the test split lacks the last class."""
    rng, splits = np.random.default_rng(3), {}
    src.mkdir(exist_ok=True)
    for split, count, classes in (("train", train, 5), ("t10k", test, 4)):
        images = rng.integers(0, 256, (count, 6, 7), dtype=np.uint8)
        labels = (np.arange(count) % classes).astype(np.uint8)
        write_idx(src / f"{split}-images-idx3-ubyte{suffix}", images)
        write_idx(src / f"{split}-labels-idx1-ubyte{suffix}", labels)
        splits["test" if split == "t10k" else split] = (images, labels)
    return splits
