"""Which images lie in class folders: their paths, sizes and classes, found without reading one."""

import os
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.errors import ConfigError
from infobatch_stream.formats.extensions import IMAGE_EXTENSIONS, encoding_of

__all__ = [
    "ClassFolders", "images_below", "is_image_file", "is_split", "metadata_of", "some", "some_kinds",
    "sounds_like_split", "subfolders",
]  # fmt: skip

_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Files that tell of the images beside them, as Hugging Face's imagefolder takes them."""

_SPLITS = frozenset(
    {"train", "trainval", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation"}
)
_SPLIT = re.compile(rf"({'|'.join(sorted(_SPLITS))})([ _.-]?([0-9]+|set|data|split|images|imgs|img))*")


class ClassFolders:
    """The images in ``src/<class>/**/``, sorted by class, then by path. Hidden files are skipped, links are followed.

    Memory is the path of each image and 20 bytes, and the names in one class twice.

    classes: the names of the folders, in the order of their numbers, which is that of torchvision's ImageFolder.
    empty: those without an image -> what they hold instead, as a text.
    labels: int32[n], of each image the place of its class in ``classes``. sizes: int64[n], bytes of the files.
    loose: images directly in ``src``. others: what else was passed over: ".txt" -> how many.
    has_jpeg: whether there is a JPEG by its name.
    """

    def __init__(self, src: Path) -> None:
        """Look at all names. Raises ConfigError for a `_METADATA` file in a class folder, OSError."""
        self.src = os.fspath(src)
        self.classes = subfolders(src)
        self.empty: dict[str, str] = {}
        self.others: Counter[str] = Counter()
        self.loose = 0
        self.has_jpeg = False
        for entry in src.iterdir():
            if entry.name.startswith(".") or not entry.is_dir():
                self._pass_over(entry.name, loose=True)
        paths, bounds, labels, sizes = bytearray(), array("q", [0]), array("i"), array("q")
        for label, name in enumerate(self.classes):
            before = self.others.copy()
            images = sorted(self._scan(name))
            if not images:
                self.empty[name] = some_kinds(self.others - before) or "nothing"
            for path, size in images:
                self.has_jpeg = self.has_jpeg or encoding_of(path.rpartition(".")[2].lower()) == "jpeg"
                paths += os.fsencode(path)
                bounds.append(len(paths))
                sizes.append(size)
            labels.extend([label] * len(images))
        self.paths = bytes(paths)
        self.bounds: NDArray[np.int64] = np.frombuffer(bounds, np.int64)
        self.sizes: NDArray[np.int64] = np.frombuffer(sizes, np.int64)
        self.labels: NDArray[np.int32] = np.frombuffer(labels, np.int32)

    def path(self, position: int) -> str:
        """The path of an image below ``src``, with forward slashes."""
        return os.fsdecode(self.paths[self.bounds[position] : self.bounds[position + 1]])

    def _scan(self, name: str) -> Iterator[tuple[str, int]]:
        """Path, relative to the tree and with forward slashes, and size of each image below the folder ``name``."""
        seen: set[tuple[int, int]] = set()
        below = [name]
        while below:
            folder = below.pop()
            status = Path(self.src, folder).stat()
            if (status.st_dev, status.st_ino) in seen:  # a link to a folder above would be walked for ever
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(f"{self.src}/{folder}") as entries:  # raises for a folder that cannot be read
                for entry in sorted(entries, key=lambda entry: entry.name, reverse=True):
                    if entry.is_dir():
                        if not entry.name.startswith("."):
                            below.append(f"{folder}/{entry.name}")
                    elif is_image_file(entry.name):
                        yield f"{folder}/{entry.name}", _size(entry)
                    elif entry.name in _METADATA:
                        raise ConfigError(
                            f"{self.src}/{folder}/{entry.name} tells of images, and lies in a class folder. Convert "
                            f"{self.src}/{folder} on its own, or put one {entry.name} into {self.src}, whose file_name "
                            f"begins with {folder}/; or move it away, if the classes are all that is wanted."
                        )
                    else:
                        self._pass_over(entry.name)

    def _pass_over(self, name: str, *, loose: bool = False) -> None:
        if loose and is_image_file(name):
            self.loose += 1
            return
        extension = os.path.splitext(name)[1].lower()  # noqa: PTH122  # of a name
        self.others["hidden" if name.startswith(".") else extension or "without an extension"] += 1


def metadata_of(src: Path) -> Path | None:
    """The table in ``src`` that tells of images there; None where there is none, or no image. Raises ConfigError."""
    found = [src / name for name in _METADATA if (src / name).is_file()]
    if not found or next(images_below(src), None) is None:
        return None
    if len(found) > 1:
        raise ConfigError(f"{src} holds {' and '.join(path.name for path in found)}; keep the one that is meant.")
    return found[0]


def images_below(src: Path) -> Iterator[str]:
    """The images below ``src``, relative to it."""
    for folder, folders, files in os.walk(src):
        folders[:] = [name for name in folders if not name.startswith(".")]
        prefix = os.path.relpath(folder, src)
        yield from (os.path.normpath(f"{prefix}/{name}") for name in files if is_image_file(name))


def subfolders(src: Path) -> list[str]:
    """The folders in ``src`` that are not hidden, sorted as torchvision's ImageFolder sorts them."""
    return sorted(entry.name for entry in src.iterdir() if not entry.name.startswith(".") and entry.is_dir())


def is_split(name: str) -> bool:
    """Whether a folder is called as a split is: train, training_set, val2017 ...; a "freight train" is none."""
    return _SPLIT.fullmatch(name.lower()) is not None


def sounds_like_split(name: str) -> bool:
    """Whether there is the name of a split in that of a folder."""
    return any(word in _SPLITS for word in re.split(r"[^a-z]+", name.lower()))


def is_image_file(name: str) -> bool:
    """Whether a file of this name is an image; hidden ones (such as macOS's ``._x.jpg``) are not."""
    stem, _, extension = name.rpartition(".")
    return stem != "" and not name.startswith(".") and extension.lower() in IMAGE_EXTENSIONS


def some(names: list[str]) -> str:
    """The first of ``names``."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def some_kinds(kinds: Counter[str]) -> str:
    """Kinds of files with their numbers, the most frequent first."""
    return some([f"{count:,} {kind}" for kind, count in sorted(kinds.items(), key=lambda pair: (-pair[1], pair[0]))])


def _size(entry: "os.DirEntry[str]") -> int:
    try:
        return entry.stat().st_size
    except OSError:  # a link to nowhere: raised where it is read
        return 0
