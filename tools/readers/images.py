"""A tree of images in class folders."""

import hashlib
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from stat import S_ISREG

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.errors import ConfigError, DataError

from ..extensions import IMAGE_EXTENSIONS
from ..samples import Column, EncodedImage, Sample
from .columns import Options

__all__ = ["EXPECTED", "ImageTree", "has_images", "read_image"]

EXPECTED = (
    "expected either class folders with images, SRC/<class>/**/*.jpg "
    f"(or {', '.join(sorted(IMAGE_EXTENSIONS - {'jpg'}))}), or idx files, SRC/train-images-idx3-ubyte[.gz] "
    "with SRC/train-labels-idx1-ubyte[.gz], or CIFAR's Python files, SRC/data_batch_1 or SRC/train with the others, or "
    "MDS shards, SRC/index.json, or WebDataset tars, SRC/*.tar, or tables, SRC/*.parquet or SRC/*.csv[.gz], or what "
    "`save_to_disk` of Hugging Face's datasets wrote; tars and tables may be named by a pattern too, "
    "'data-{000..099}.tar' or 'data-*.parquet'"
)

_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})
_LARGEST = (1 << 32) - 1  # bytes of an image; the limit of an MDS shard


class ImageTree:
    """Image files in class folders: ``src/<class>/**/<image>``, sorted by class, then by path.

    A class is a first-level folder with at least one image below it; hidden files and folders are skipped,
    links are followed. Only names and sizes are read at first; the bytes of an image are read, unchanged, when it
    is asked for. Raises ConfigError where there are no classes.
    """

    name = ""
    in_files = True
    is_shards = False

    def __init__(self, src: Path, options: Options | None = None) -> None:
        """Scan ``src``; memory is the path of each image and 20 bytes, and the names in one class twice."""
        self._src = os.fspath(src)
        self.classes: list[str] | None = []
        self.skipped = 0
        paths, bounds, labels, sizes = bytearray(), array("q", [0]), array("i"), array("q")
        loose, deep, jpeg = 0, True, False
        for name in sorted(entry.name for entry in src.iterdir()):
            if name.startswith("."):
                self.skipped += 1
            elif not (src / name).is_dir():
                loose += _is_image(name)
                self.skipped += 1
            elif images := sorted(self._scan(name)):
                for path, size in images:
                    deep = deep and path.count("/") >= 2
                    jpeg = jpeg or path.lower().endswith((".jpg", ".jpeg"))
                    paths += os.fsencode(path)
                    bounds.append(len(paths))
                    sizes.append(size)
                labels.extend([len(self.classes)] * len(images))
                self.classes.append(_text(name))
        if not labels:
            held = f"{loose} images directly in it and none in class folders" if loose else "no images"
            raise ConfigError(f"{src} holds {held}; {EXPECTED}.")
        if deep and all(name.lower() in _SPLITS for name in self.classes):
            raise ConfigError(
                f"{src} holds the splits {', '.join(self.classes)} and not classes; convert each on its own, "
                f"e.g. infobatch-stream convert {src / self.classes[0]} DST/{self.classes[0]} --format ..."
            )
        self._paths = bytes(paths)
        self._bounds, self._sizes = np.frombuffer(bounds, np.int64), np.frombuffer(sizes, np.int64)
        self._labels = np.frombuffer(labels, np.int32)
        # MDS reads both encodings with PIL, which looks at the bytes: other kinds of image need no third one.
        found = {
            "image": Column("jpeg" if jpeg else "png", "jpg" if jpeg else "png"),
            "label": Column("int", "cls"),
            "name": Column("str", "txt"),
        }
        self._choice = (options or Options()).choose(found, src)
        self.columns = self._choice.columns
        digest = hashlib.sha256(self._paths)
        for part in (self._bounds, self._sizes):
            digest.update(part.tobytes())
        self.fingerprint = f"images:{digest.hexdigest()[:32]}"

    def __len__(self) -> int:
        """Number of images."""
        return len(self._labels)

    def __getitem__(self, position: int) -> Sample:
        """``image`` (EncodedImage, the bytes of the file), ``label`` (int), ``name`` (path below the source)."""
        path = os.fsdecode(self._paths[self._bounds[position] : self._bounds[position + 1]])
        image = EncodedImage(read_image(Path(self._src, path)), path.rpartition(".")[2].lower())
        sample = {"image": image, "label": int(self._labels[position]), "name": _text(path)}
        return self._choice.of(sample, lambda: f"{self._src}/{path}")

    def sizes(self) -> NDArray[np.int64]:
        """int64[len]: of the files as they were when the tree was scanned, with 8 for the label and the name."""
        sizes: NDArray[np.int64] = self._sizes + 8 + np.diff(self._bounds)
        return sizes

    def _scan(self, name: str) -> Iterator[tuple[str, int]]:
        """Path, relative to the tree and with forward slashes, and size of each image below the folder ``name``."""
        seen: set[tuple[int, int]] = set()
        below = [name]
        while below:
            folder = below.pop()
            status = Path(self._src, folder).stat()
            if (status.st_dev, status.st_ino) in seen:  # a link to a folder above would be walked for ever
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(f"{self._src}/{folder}") as entries:  # raises for a folder that cannot be read
                for entry in sorted(entries, key=lambda entry: entry.name, reverse=True):
                    if entry.is_dir():
                        if not entry.name.startswith("."):
                            below.append(f"{folder}/{entry.name}")
                    elif _is_image(entry.name):
                        yield f"{folder}/{entry.name}", _size(entry)
                    else:
                        self.skipped += 1


def has_images(src: Path) -> bool:
    """Whether there is an image below a folder in ``src``."""
    for folder in sorted(src.iterdir()):
        if not folder.name.startswith(".") and folder.is_dir():
            for _, folders, files in os.walk(folder):
                folders[:] = [name for name in folders if not name.startswith(".")]
                if any(map(_is_image, files)):
                    return True
    return False


def read_image(path: Path) -> bytes:
    """The bytes of an image file. Raises DataError for what is none, is empty, or has no room in a shard."""
    status = path.stat()
    if not S_ISREG(status.st_mode):  # a pipe, or a link to a device: reading it might never end
        raise DataError(f"{path} is no regular file; remove it.")
    if status.st_size > _LARGEST:
        raise DataError(f"{path} has {status.st_size:,} bytes, and a shard has room for {_LARGEST:,}; remove it.")
    data = path.read_bytes()
    if not data:
        raise DataError(f"{path} is empty (0 bytes); remove it, or put the image back.")
    return data


def _size(entry: "os.DirEntry[str]") -> int:
    try:
        return entry.stat().st_size
    except OSError:  # a link to nowhere: raised where it is read
        return 0


def _is_image(name: str) -> bool:
    """Whether a file of this name is an image; hidden ones (such as macOS's ``._x.jpg``) are not."""
    stem, _, extension = name.rpartition(".")
    return stem != "" and not name.startswith(".") and extension.lower() in IMAGE_EXTENSIONS


def _text(name: str) -> str:
    """A file name as valid UTF-8: what is none is replaced, since shards hold text."""
    return os.fsencode(name).decode("utf-8", "replace")
