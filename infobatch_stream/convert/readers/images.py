"""A tree of images in class folders."""

import hashlib
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from stat import S_ISREG

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.convert.readers.class_folders import (
    ClassFolders,
    images_below,
    is_split,
    some,
    some_kinds,
    sounds_like_split,
    subfolders,
)
from infobatch_stream.convert.readers.options import Options
from infobatch_stream.errors import ConfigError, DataError
from infobatch_stream.formats.extensions import IMAGE_EXTENSIONS
from infobatch_stream.formats.schema import Column, EncodedImage, Sample, SampleSet

__all__ = ["EXPECTED", "ImageTree", "NoImagesError", "has_images", "read_image", "read_images"]

EXPECTED = f"class folders with images, SRC/<class>/**/*.jpg (or {', '.join(sorted(IMAGE_EXTENSIONS - {'jpg'}))})"
"""What class folders look like, for error messages."""

_LARGEST = (1 << 32) - 1  # bytes of an image; the limit of an MDS shard


class NoImagesError(ConfigError):
    """There are no images in class folders."""


class ImageTree(SampleSet):
    """Image files in class folders. The bytes of an image are read, unchanged, when it is asked for."""

    in_files = True

    def __init__(
        self,
        folders: ClassFolders,
        options: Options,
        *,
        name: str = "",
        classes: Sequence[str] | None = None,
        jpeg: bool | None = None,
    ) -> None:
        """Of one split ``classes`` are the folders of all, in the order of the labels, and ``jpeg``: whether any has
        a JPEG.
        """
        self.name = name
        self._folders = folders
        names = folders.classes if classes is None else classes
        self.classes: list[str] | None = list(map(_text, names))
        places = {folder: label for label, folder in enumerate(names)}
        own = np.array([places[folder] for folder in folders.classes], np.int32)
        self._labels: NDArray[np.int32] = own[folders.labels]
        self.skipped = folders.loose + folders.others.total()
        # MDS reads both encodings with PIL, which looks at the bytes: other kinds of image need no third one.
        kind = ("jpeg", "jpg") if (folders.has_jpeg if jpeg is None else jpeg) else ("png", "png")
        found = {"image": Column(*kind), "label": Column("int", "cls"), "name": Column("str", "txt")}
        self._choice = options.choose(found, folders.src)
        self.columns = self._choice.columns
        digest = hashlib.sha256(folders.paths)
        for part in (folders.bounds, folders.sizes, self._labels):
            digest.update(part.tobytes())
        self.fingerprint = f"images:{digest.hexdigest()[:32]}"
        self.notes: Sequence[str] = _notes(folders, self.classes)

    def __len__(self) -> int:
        """Number of images."""
        return len(self._labels)

    def __getitem__(self, position: int) -> Sample:
        """``image`` (EncodedImage, the bytes of the file), ``label`` (int), ``name`` (path below the source)."""
        path = self._folders.path(position)
        image = EncodedImage(read_image(Path(self._folders.src, path)), path.rpartition(".")[2].lower())
        sample = {"image": image, "label": int(self._labels[position]), "name": _text(path)}
        return self._choice.of(sample, lambda: f"{self._folders.src}/{path}")

    def sizes(self) -> NDArray[np.int64]:
        """int64[len]: of the files as they were when the tree was scanned, with 8 for the label and the name."""
        sizes: NDArray[np.int64] = self._folders.sizes + 8 + np.diff(self._folders.bounds)
        return sizes

    def files(self) -> tuple[bytes, NDArray[np.int64]]:
        """See `FileSet`."""
        folders = self._folders
        bounds = folders.bounds.tolist()
        return b"\0".join(folders.paths[start:stop] for start, stop in pairwise(bounds)), folders.sizes

    def keep_columns(self, columns: dict[str, Column]) -> None:
        """See `KeepsColumns`: of which kind the images are is seen by their names."""
        self.columns = columns


def read_images(src: Path, options: Options | None = None, *, allow_empty: bool = False) -> list[ImageTree]:
    """The images in the class folders of ``src``: one set, or one per split, ``src/<split>/<class>/**/<image>``.

    A class is a folder, and they are numbered in the order of their names, over all splits together. Only names and
    sizes are read at first. Raises ConfigError where there are no classes, and for a class without images unless
    ``allow_empty``: it then keeps its number.
    """
    options = options or Options()
    splits = subfolders(src)
    if splits and all(map(is_split, splits)):
        divided = [split for split in splits if has_images(src / split)]
        if divided and len(divided) < len(splits):
            other = next(split for split in splits if split not in divided)
            raise ConfigError(
                f"{src} holds splits: {some(divided)} with class folders, and {other} without an image in any. Give "
                f"{src / other} class folders too, or convert those that have them on their own, e.g. "
                f"infobatch-stream convert {src / divided[0]} DST/{divided[0]} --format ..."
            )
        if divided:
            return _read_splits(src, splits, options, allow_empty=allow_empty)
    folders = ClassFolders(src)
    if not len(folders.labels):
        held = f"{folders.loose} images directly in it and none in class folders" if folders.loose else "no images"
        raise NoImagesError(f"{src} holds {held}.")
    _check_empty(src, folders.empty, allow_empty=allow_empty)
    return [ImageTree(folders, options)]


def _read_splits(src: Path, splits: list[str], options: Options, *, allow_empty: bool) -> list[ImageTree]:
    found = {split: ClassFolders(src / split) for split in splits}
    classes = sorted({name for folders in found.values() for name in folders.classes})
    filled = {name for folders in found.values() for name in folders.classes if name not in folders.empty}
    _check_empty(src, {name: "nothing in any split" for name in classes if name not in filled}, allow_empty=allow_empty)
    jpeg = any(folders.has_jpeg for folders in found.values())
    trees = [ImageTree(folders, options, name=split, classes=classes, jpeg=jpeg) for split, folders in found.items()]
    note = f"{src}: {some(splits)} are read as splits, and the folders in them as classes"
    trees[0].notes = [f"{note}. If they are classes themselves, give them names that no split has", *trees[0].notes]
    return trees


def _check_empty(src: Path, empty: dict[str, str], *, allow_empty: bool) -> None:
    if empty and not allow_empty:
        held = some([f"{name} ({what})" for name, what in empty.items()])
        raise ConfigError(
            f"{src} has class folders without an image: {held}. Remove them, or put their images back; or they keep "
            "their numbers, as classes without samples (--allow-empty). Images are "
            f".{', .'.join(sorted(IMAGE_EXTENSIONS))}."
        )


def _notes(folders: ClassFolders, classes: list[str]) -> list[str]:
    """What was passed over, and what the classes look like."""
    notes = []
    if folders.others:
        kinds, count = some_kinds(folders.others), folders.others.total()
        notes.append(f"{folders.src}: skipped {count:,} files that are no images in class folders: {kinds}")
    if folders.loose:
        notes.append(f"{folders.src}: skipped {folders.loose:,} images that lie in no class folder")
    called = [name for name in classes if sounds_like_split(name)]
    if called and (len(called) > 1 or called == classes):
        notes.append(
            f"{folders.src}: the classes {some(called)} are called like splits. If they are splits, call them train, "
            f"val, test and so on, give each class folders of its own, {folders.src}/train/<class>/, and convert again"
        )
    return notes


def has_images(src: Path) -> bool:
    """Whether there is an image below a folder in ``src``."""
    return any(next(images_below(src / folder), None) is not None for folder in subfolders(src))


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


def _text(name: str) -> str:
    """A file name as valid UTF-8: what is none is replaced, since shards hold text."""
    return os.fsencode(name).decode("utf-8", "replace")
