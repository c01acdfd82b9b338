"""Pairs of idx files, as of MNIST and Fashion-MNIST: the images of a split and their labels."""

import gzip
import math
import re
import struct
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.convert.readers.class_folders import some
from infobatch_stream.convert.readers.input_format import Found, InputFormat
from infobatch_stream.convert.readers.options import Options
from infobatch_stream.errors import ConfigError, DataError
from infobatch_stream.formats.fingerprint import fingerprint
from infobatch_stream.formats.schema import Column, Sample, SampleSet

__all__ = ["IDX", "IdxPair", "read_idx"]

# The name of a split becomes a folder: it may not start with a dot.
_IDX_NAME = re.compile(r"(?P<split>\w[\w.-]*)-(?P<part>images[-.]idx3|labels[-.]idx1)-ubyte(\.gz)?")
_DEFLATE_RATIO = 1032  # the most that a byte of deflate can stand for


class IdxPair(SampleSet):
    """Images and labels of one split in idx files, plain or gzip, read into memory and checked.

    Raises DataError where a file is damaged or the two do not belong together.
    """

    def __init__(self, name: str, images: Path, labels: Path, options: Options) -> None:
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
        found = {"image": Column(f"ndarray:uint8:{rows},{cols}", "npy"), "label": Column("int", "cls")}
        self._choice = options.choose(found, images)
        self.columns = self._choice.columns
        self.classes: list[str] | None = [str(label) for label in range(int(self._labels.max()) + 1)]
        self.fingerprint = fingerprint("idx", [images.name, labels.name, self._images.shape])
        self._where = str(images)

    def __len__(self) -> int:
        """Number of images."""
        return len(self._images)

    def __getitem__(self, position: int) -> Sample:
        """``image`` (uint8[rows, cols]) and ``label`` (int)."""
        sample = {"image": self._images[position], "label": int(self._labels[position])}
        return self._choice.of(sample, lambda: f"{self._where}: image {position}")

    def sizes(self) -> NDArray[np.int64]:
        """int64[len]: those of the images, and 8 bytes of the label."""
        return np.full(len(self), self._images[0].nbytes + 8, np.int64)


def _pairs(src: Path) -> dict[str, tuple[Path, Path]]:
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


def _find(src: Path, names: Sequence[str]) -> Found | None:
    pairs = _pairs(src)
    what = f"idx files ({some([split + '-images' for split in pairs])})"
    return Found(what, partial(_open, pairs)) if pairs else None


def _open(pairs: dict[str, tuple[Path, Path]], options: Options) -> list[IdxPair]:
    sets = [IdxPair(name, images, labels, options) for name, (images, labels) in sorted(pairs.items())]
    classes = max((one.classes or [] for one in sets), key=len)  # a small test split may lack the last class
    for one in sets:
        one.classes = classes
    return sets


IDX = InputFormat(
    "idx files, SRC/train-images-idx3-ubyte[.gz] with SRC/train-labels-idx1-ubyte[.gz]", _find, owns_folders=True
)
