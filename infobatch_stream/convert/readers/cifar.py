"""CIFAR-10 and CIFAR-100 as their authors publish them for Python: pickled batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.convert.readers.cifar_pickle import PickledArray, read_plain_pickle
from infobatch_stream.convert.readers.input_format import Found, InputFormat
from infobatch_stream.convert.readers.options import Options
from infobatch_stream.errors import ConfigError, DataError
from infobatch_stream.formats.fingerprint import fingerprint
from infobatch_stream.formats.schema import Column, Sample, SampleSet

__all__ = ["CIFAR", "CifarSplit"]

_SIDE = 32
_MOST = 1 << 29  # bytes of a file; CIFAR-100's largest has 155 MB


@dataclass(frozen=True)
class _Variant:
    """meta: the file with the names of classes. labels: column -> (key in a batch, key in meta). splits: -> files."""

    meta: str
    labels: dict[str, tuple[str, str]]
    splits: dict[str, tuple[str, ...]]

    @property
    def files(self) -> set[str]:
        """Of all splits, and the names."""
        return {self.meta}.union(*self.splits.values())


_VARIANTS = (
    _Variant(
        "batches.meta",
        {"label": ("labels", "label_names")},
        {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)},
    ),
    _Variant(
        "meta",
        {"label": ("fine_labels", "fine_label_names"), "coarse_label": ("coarse_labels", "coarse_label_names")},
        {"train": ("train",), "test": ("test",)},
    ),
)


class CifarSplit(SampleSet):
    """Images and labels of one split, read into memory and checked.

    Raises DataError where a file is damaged, or holds what such a file does not.
    """

    def __init__(
        self, name: str, paths: list[Path], variant: _Variant, classes: dict[str, list[str]], options: Options
    ):
        """``classes``: names by column; label i of a column is ``classes[column][i]``."""
        self.name = name
        batches = [_read(path) for path in paths]
        # A row is the red plane, the green and the blue one.
        planes = np.concatenate([_images_of(*pair) for pair in zip(paths, batches, strict=True)])
        self._images = np.ascontiguousarray(planes.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1))
        self._labels = {
            column: np.concatenate(
                [_labels_of(path, batch, key, len(classes[column])) for path, batch in zip(paths, batches, strict=True)]
            )
            for column, (key, _) in variant.labels.items()
        }
        found = {"image": Column(f"ndarray:uint8:{_SIDE},{_SIDE},3", "npy")}
        found |= {column: Column("int", "cls" if column == "label" else f"{column}.cls") for column in self._labels}
        self._where = str(paths[0])
        self._choice = options.choose(found, paths[0].parent)
        self.columns = self._choice.columns
        self.classes: list[str] | None = classes.get(self._choice.sources.get("label", ""))
        kept = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        self.fingerprint = fingerprint("cifar", kept)

    def __len__(self) -> int:
        """Number of images."""
        return len(self._images)

    def __getitem__(self, position: int) -> Sample:
        """``image`` (uint8[32, 32, 3]), ``label``, and of CIFAR-100 ``coarse_label`` (int)."""
        sample: dict[str, Any] = {"image": self._images[position]}
        sample |= {column: int(labels[position]) for column, labels in self._labels.items()}
        return self._choice.of(sample, lambda: f"{self._where}: image {position}")

    def sizes(self) -> NDArray[np.int64]:
        """int64[len]: those of the images, and 8 bytes of each label."""
        return np.full(len(self), self._images[0].nbytes + 8 * len(self._labels), np.int64)


def _find(src: Path, names: Sequence[str]) -> Found | None:
    """Which of the two lies in the folder ``src``. Raises ConfigError where files are missing."""
    for variant in _VARIANTS:
        found = variant.files.intersection(names)
        if variant.meta in found and len(found) >= 2:  # others may have files of these names too
            if missing := sorted(variant.files - found):
                raise ConfigError(
                    f"{src} holds {', '.join(sorted(found))} of CIFAR, but no {', '.join(missing)}; unpack it again."
                )
            return Found(f"CIFAR's Python files ({variant.meta})", partial(_open, src, variant))
    return None


def _open(src: Path, variant: _Variant, options: Options) -> list[CifarSplit]:
    """The test and the training split. Raises DataError."""
    meta = _read(src / variant.meta)
    classes = {column: _names_of(src / variant.meta, meta, key) for column, (_, key) in variant.labels.items()}
    return [
        CifarSplit(name, [src / file for file in files], variant, classes, options)
        for name, files in sorted(variant.splits.items())
    ]


def _read(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size > _MOST:
        raise _damaged(path, f"it has {size:,} bytes")
    try:
        return read_plain_pickle(path.read_bytes())
    except ValueError as error:
        raise _damaged(path, str(error)) from error


def _images_of(path: Path, batch: dict[str, Any]) -> NDArray[np.uint8]:
    images = batch.get("data")
    if not isinstance(images, PickledArray) or images.shape[1:] != (3 * _SIDE**2,) or not images.shape[0]:
        found = (
            f"an array of shape {images.shape}" if isinstance(images, PickledArray) else f"a {type(images).__name__}"
        )
        raise _damaged(path, f"'data' is {found} and not uint8[n, 3072]")
    try:
        return images.values()
    except ValueError as error:  # characters that are no bytes
        raise _damaged(path, f"'data' holds no bytes ({error})") from error


def _labels_of(path: Path, batch: dict[str, Any], key: str, classes: int) -> NDArray[np.int64]:
    labels, images = batch.get(key), batch["data"].shape[0]
    if not isinstance(labels, list) or len(labels) != images:
        raise _damaged(path, f"{key!r} is no list of {images:,} labels, one per image")
    if not all(type(label) is int and 0 <= label < classes for label in labels):
        raise _damaged(path, f"{key!r} holds what is no label from 0 to {classes - 1}")
    return np.array(labels, np.int64)


def _names_of(path: Path, meta: dict[str, Any], key: str) -> list[str]:
    names = meta.get(key)
    if not isinstance(names, list) or not names or not all(isinstance(name, str | bytes) for name in names):
        raise _damaged(path, f"{key!r} is no list of texts")
    return [name.decode("latin-1") if isinstance(name, bytes) else name for name in names]


def _damaged(path: Path, why: str) -> DataError:
    return DataError(f"{path} is no such file as CIFAR's authors publish: {why}. Download it again.")


CIFAR = InputFormat("CIFAR's Python files, SRC/data_batch_1 or SRC/train with the others", _find, owns_folders=True)
