"""What can be converted: a tree of images in class folders, or pairs of idx files (MNIST, Fashion-MNIST)."""

import gzip
import math
import os
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from stat import S_ISREG

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.errors import ConfigError, DataError

from ..samples import Column, EncodedImage, Sample, SampleSet

__all__ = ["IMAGE_EXTENSIONS", "IdxPair", "ImageTree", "read_idx", "read_source"]

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "bmp", "webp", "gif", "ppm", "tif", "tiff"})
_EXPECTED = (
    "expected either class folders with images, SRC/<class>/**/*.jpg "
    f"(or {', '.join(sorted(IMAGE_EXTENSIONS - {'jpg'}))}), or idx files, SRC/train-images-idx3-ubyte[.gz] "
    "with SRC/train-labels-idx1-ubyte[.gz]"
)
_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})
# The name of a split becomes a folder: it may not start with a dot.
_IDX_NAME = re.compile(r"(?P<split>\w[\w.-]*)-(?P<part>images[-.]idx3|labels[-.]idx1)-ubyte(\.gz)?")
_LARGEST = (1 << 32) - 1  # bytes of an image; the limit of an MDS shard
_DEFLATE_RATIO = 1032  # the most that a byte of deflate can stand for


class ImageTree:
    """Image files in class folders: ``src/<class>/**/<image>``, sorted by class, then by path.

    A class is a first-level folder with at least one image below it; hidden files and folders are skipped,
    links are followed. Only names are read at first; the bytes of an image are read, unchanged, when it is
    asked for. Raises ConfigError where there are no classes.
    """

    name = ""

    def __init__(self, src: Path) -> None:
        """Scan ``src``; memory is one path and one int per image."""
        self._src = src
        self._paths: list[str] = []
        self._labels: list[int] = []
        self.classes: list[str] = []
        self.skipped = 0
        loose, deep = 0, True
        for name in sorted(entry.name for entry in src.iterdir()):
            if name.startswith("."):
                self.skipped += 1
            elif not (src / name).is_dir():
                loose += _is_image(name)
                self.skipped += 1
            elif paths := sorted(self._scan(name)):
                deep = deep and all(path.count("/") >= 2 for path in paths)
                self._labels.extend([len(self.classes)] * len(paths))
                self._paths.extend(paths)
                self.classes.append(_text(name))
        if not self._paths:
            held = f"{loose} images directly in it and none in class folders" if loose else "no images"
            raise ConfigError(f"{src} holds {held}; {_EXPECTED}.")
        if deep and all(name.lower() in _SPLITS for name in self.classes):
            raise ConfigError(
                f"{src} holds the splits {', '.join(self.classes)} and not classes; convert each on its own, "
                f"e.g. infobatch-stream convert {src / self.classes[0]} DST/{self.classes[0]} --format ..."
            )
        # MDS reads both encodings with PIL, which looks at the bytes: other kinds of image need no third one.
        any_jpeg = any(path.lower().endswith((".jpg", ".jpeg")) for path in self._paths)
        self.columns = {
            "image": Column("jpeg" if any_jpeg else "png", "jpg" if any_jpeg else "png"),
            "label": Column("int", "cls"),
            "name": Column("str", "txt"),
        }

    def __len__(self) -> int:
        """Number of images."""
        return len(self._paths)

    def __getitem__(self, position: int) -> Sample:
        """``image`` (EncodedImage, the bytes of the file), ``label`` (int), ``name`` (path below ``src``)."""
        path = self._paths[position]
        status = (self._src / path).stat()
        if not S_ISREG(status.st_mode):  # a pipe, or a link to a device: reading it might never end
            raise DataError(f"{self._src / path} is no regular file; remove it.")
        if status.st_size > _LARGEST:
            raise DataError(
                f"{self._src / path} has {status.st_size:,} bytes, and a shard has room for {_LARGEST:,}; remove it."
            )
        data = (self._src / path).read_bytes()
        if not data:
            raise DataError(f"{self._src / path} is empty (0 bytes); remove it, or put the image back.")
        extension = path.rpartition(".")[2].lower()
        return {"image": EncodedImage(data, extension), "label": self._labels[position], "name": _text(path)}

    def _scan(self, name: str) -> Iterator[str]:
        """Paths of the images below the folder ``name``, relative to the tree, with forward slashes."""
        seen: set[tuple[int, int]] = set()
        for folder, folders, files in os.walk(self._src / name, onerror=_raise, followlinks=True):
            status = Path(folder).stat()
            if (status.st_dev, status.st_ino) in seen:  # a link to a folder above would be walked for ever
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            folders[:] = sorted(entry for entry in folders if not entry.startswith("."))
            below = Path(folder).relative_to(self._src).as_posix()
            for file in files:
                if _is_image(file):
                    yield f"{below}/{file}"
                else:
                    self.skipped += 1


class IdxPair:
    """Images and labels of one split in idx files, plain or gzip, read into memory and checked.

    Raises DataError where a file is damaged or the two do not belong together.
    """

    skipped = 0

    def __init__(self, name: str, images: Path, labels: Path) -> None:
        """``name``: of the split; ``images``: uint8[n, rows, cols]; ``labels``: uint8[n]."""
        self.name = name
        self._images = read_idx(images, ndim=3)
        self._labels = read_idx(labels, ndim=1)
        if len(self._images) != len(self._labels):
            raise DataError(
                f"{images} holds {len(self._images):,} images, but {labels} holds {len(self._labels):,} "
                "labels; a split needs one label per image: download both again."
            )
        rows, cols = self._images.shape[1:]
        self.columns = {"image": Column(f"ndarray:uint8:{rows},{cols}", "npy"), "label": Column("int", "cls")}
        self.classes = [str(label) for label in range(int(self._labels.max()) + 1)]

    def __len__(self) -> int:
        """Number of images."""
        return len(self._images)

    def __getitem__(self, position: int) -> Sample:
        """``image`` (uint8[rows, cols]) and ``label`` (int)."""
        return {"image": self._images[position], "label": int(self._labels[position])}


def read_source(src: Path) -> list[SampleSet]:
    """The sample sets of ``src``: one `IdxPair` per split where it holds idx files, else one `ImageTree`.

    All sets have the same classes. Raises ConfigError where ``src`` is neither, DataError for damaged idx
    files.
    """
    if not src.exists():
        raise ConfigError(f"{src} does not exist; {_EXPECTED}.")
    if not src.is_dir():
        raise ConfigError(f"{src} is a file; {_EXPECTED}.")
    pairs = _idx_pairs(src)
    if not pairs:
        return [ImageTree(src)]
    sets = [IdxPair(name, images, labels) for name, (images, labels) in sorted(pairs.items())]
    classes = max((one.classes for one in sets), key=len)  # a small test split may lack the last class
    for one in sets:
        one.classes = classes
    return list(sets)


def _idx_pairs(src: Path) -> dict[str, tuple[Path, Path]]:
    """Folder name -> (images, labels) of the idx files in ``src``; a plain file goes before its gzip."""
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(src.iterdir(), reverse=True):  # ".gz" sorts behind the plain name and is replaced by it
        if path.is_file() and (match := _IDX_NAME.fullmatch(path.name)):
            found.setdefault(match["split"], {})[match["part"][:6]] = path
    pairs: dict[str, tuple[Path, Path]] = {}
    for split, files in found.items():
        if len(files) < 2:
            part, missing = ("images-idx3", "labels-idx1") if "images" in files else ("labels-idx1", "images-idx3")
            raise ConfigError(
                f"{src} holds {split}-{part}-ubyte but no {split}-{missing}-ubyte[.gz]; a split needs both."
            )
        name = "test" if split == "t10k" else split
        if name in pairs:
            raise ConfigError(f"{src} holds both t10k- and test- files, which are both written to DST/test.")
        pairs[name] = (files["images"], files["labels"])
    return pairs


def read_idx(path: Path, ndim: int) -> NDArray[np.uint8]:
    """The array in the idx file ``path`` (gzip where it ends in .gz): uint8 with ``ndim`` dimensions.

    The header is believed only after it has been compared with the size of the file, so a damaged one
    allocates nothing. Raises DataError.
    """
    again = "download it again"
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            header = stream.read(4 + 4 * ndim)
            magic = bytes([0, 0, 8, ndim])
            if header[:4] != magic or len(header) < 4 + 4 * ndim:
                raise DataError(
                    f"{path} starts with {header[:4].hex() or 'nothing'}, and not with {magic.hex()} "
                    f"and {ndim} sizes as an idx file of unsigned bytes in {ndim} dimensions does; {again}."
                )
            dims = struct.unpack(f">{ndim}I", header[4:])
            size = math.prod(dims)
            if size == 0:
                raise DataError(f"{path} is empty by its header, which gives the sizes {dims}; {again}.")
            stored = path.stat().st_size
            most = stored * _DEFLATE_RATIO if path.suffix == ".gz" else stored - len(header)
            if size > most:
                raise DataError(
                    f"{path} is truncated or damaged: its header gives the sizes {dims}, {size:,} bytes, "
                    f"and {stored:,} bytes are stored; {again}."
                )
            data = stream.read(size + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is truncated or damaged ({error}); {again}.") from error
    if len(data) != size:
        held = "more" if len(data) > size else f"only {len(data):,}"
        raise DataError(
            f"{path} is damaged: its header gives the sizes {dims}, {size:,} bytes, but it holds {held}; {again}."
        )
    return np.frombuffer(data, np.uint8).reshape(dims)


def _is_image(name: str) -> bool:
    """Whether a file of this name is an image; hidden ones (such as macOS's ``._x.jpg``) are not."""
    stem, _, extension = name.rpartition(".")
    return stem != "" and not name.startswith(".") and extension.lower() in IMAGE_EXTENSIONS


def _raise(error: OSError) -> None:
    """For os.walk, which would else pass over a folder that it cannot read: its images would be missing."""
    raise error


def _text(name: str) -> str:
    """A file name as valid UTF-8: what is none is replaced, since shards hold text."""
    return os.fsencode(name).decode("utf-8", "replace")
