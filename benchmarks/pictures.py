"""JPEG files as ImageNet has them, 500x375, made of real pictures; and what a training run does to one."""

import io
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

__all__ = ["Crop", "jpegs", "source"]

_SIZE = (500, 375)
_SUFFIXES = {".jpg", ".jpeg", ".png"}


def source() -> str:
    """Where the pictures come from, in words."""
    folder = os.environ.get("PICTURES")
    return f"{len(_pictures())} pictures of {Path(folder).name}" if folder else "the 2 photographs of scikit-learn"


@cache
def _pictures() -> list[Image.Image]:
    """Those in the folder that PICTURES names and below it; else the two that come with scikit-learn."""
    folder = os.environ.get("PICTURES")
    if folder is None:
        from sklearn.datasets import load_sample_images

        return [Image.fromarray(picture) for picture in load_sample_images().images]
    files = sorted(file for file in Path(folder).rglob("*") if file.suffix.lower() in _SUFFIXES)
    found = [Image.open(file).convert("RGB") for file in files]
    large = [picture for picture in found if min(picture.size) >= 64]
    if not large:
        raise FileNotFoundError(f"PICTURES={folder}: no picture of 64 pixels or more is in it")
    return large


def jpegs(count: int, seed: int = 0) -> Iterator[bytes]:
    """``count`` JPEG files of 500x375 at quality 90: random parts of the pictures, enlarged or reduced."""
    rng = np.random.default_rng(seed)
    pictures = _pictures()
    for _ in range(count):
        picture = pictures[rng.integers(len(pictures))]
        width, height = picture.size
        share = rng.uniform(0.5, 1)
        wide = share * min(width, height * _SIZE[0] / _SIZE[1])
        high = wide * _SIZE[1] / _SIZE[0]
        left, top = rng.uniform(0, width - wide), rng.uniform(0, height - high)
        part = picture.resize(_SIZE, Image.Resampling.BICUBIC, box=(left, top, left + wide, top + high))
        file = io.BytesIO()
        part.save(file, "JPEG", quality=90)
        yield file.getvalue()


class Crop:
    """A JPEG file decoded, a random part of it at ``size`` x ``size``, perhaps mirrored: uint8[3, size, size]."""

    def __init__(self, size: int = 224) -> None:
        from torchvision.transforms import Compose, PILToTensor, RandomHorizontalFlip, RandomResizedCrop

        self._change = Compose([RandomResizedCrop(size), RandomHorizontalFlip(), PILToTensor()])

    def __call__(self, file: bytes) -> Any:
        """The picture of ``file``."""
        with Image.open(io.BytesIO(file)) as picture:
            return self._change(picture.convert("RGB"))
