"""Which columns hold label images (masks): pixels that are numbers of classes, of which no mean may be taken."""

import io
import re
from collections.abc import Mapping, Sequence

import numpy as np

from infobatch_stream.errors import ConfigError, DataError

from .extensions import is_image
from .samples import Column, Encoded, SampleSet

__all__ = ["AUTO", "HOW", "NEAREST", "find_label_columns", "is_image_column"]

AUTO, NEAREST, SMOOTH = "auto", "nearest", "smooth"
HOW = (AUTO, NEAREST, SMOOTH)
"""How a column is made smaller: as its images look, as label images, or as photographs."""

_LOOKED_AT = 32  # samples of a set, evenly spaced
_FEW = 32  # values in an image of labels; a photograph has more
_ONE_CHANNEL = ("1", "L", "P", "I", "I;16", "I;16L", "I;16B")
_NAMES = frozenset(
    {
        "seg", "segm", "segmentation", "mask", "masks", "label", "labels", "labelids", "gt", "annotation",
        "annotations", "semantic", "instance", "instances", "instanceids", "panoptic", "trimap", "classes",
    }
)  # fmt: skip


def is_image_column(column: Column) -> bool:
    """Whether images are stored in a column, by its encoding or its extensions."""
    return column.mds in ("jpeg", "png") or any(map(is_image, column.wds.split(";")))


def find_label_columns(
    sets: Sequence[SampleSet], how: Mapping[str, str], where: str
) -> tuple[frozenset[str], tuple[str, ...]]:
    """The columns that are made smaller by nearest neighbour, and notes on those of which that was guessed.

    how: column -> one of `HOW`, of those that are made smaller; empty for all, by their looks. A column is taken for
    label images where those that are looked at have one channel, in a format without loss, and either it is called
    like labels, or there are few values and other images beside it. Raises ConfigError for names that cannot be meant.
    """
    images = {name for one in sets for name, column in one.columns.items() if is_image_column(column)}
    for name, way in how.items():
        if name not in images:
            there = ", ".join(sorted(images)) or "none"
            raise ConfigError(f"{where} has no column of images {name!r} to make smaller; it has {there}.")
        if way not in HOW:
            raise ConfigError(f"{name} cannot be made smaller by {way!r}; {', '.join(HOW)} are possible.")
    found, notes = set(), []
    for name in sorted(how or images):
        way = how.get(name, AUTO)
        if way == NEAREST:
            found.add(name)
        if way != AUTO or not (most := _most_values(sets, name)):
            continue
        called = bool(_NAMES.intersection(re.split(r"[\W_]+", " ".join([name, *_extensions(sets, name)]).lower())))
        if called or (most <= _FEW and len(images) > 1):
            found.add(name)
            notes.append(
                f"{where}: the images of {name!r} are taken for label images (one channel, {most:,} values at most) "
                f"and made smaller by nearest neighbour; if they are photographs, --resize-column {name}=smooth (and "
                "--resize-column NAME for each other column)"
            )
        elif most <= _FEW:
            notes.append(
                f"{where}: the images of {name!r} have one channel and {most:,} values at most, and are made smaller "
                f"as photographs are; if they are label images, --resize-column {name}=nearest"
            )
    return frozenset(found), tuple(notes)


def _extensions(sets: Sequence[SampleSet], name: str) -> list[str]:
    return [one.columns[name].wds for one in sets if name in one.columns]


def _most_values(sets: Sequence[SampleSet], name: str) -> int:
    """The most different values in one of the images that are looked at; 0 unless all could be label images."""
    most = 0
    for one in sets:
        for position in np.unique(np.linspace(0, len(one) - 1, _LOOKED_AT, dtype=np.int64)).tolist():
            try:
                value = one[position].get(name)
            except (DataError, OSError):  # it is met again, and told of, where it is converted
                continue
            if isinstance(value, Encoded) and value.data and (values := _values(value.data)) is not None:
                if not values:
                    return 0
                most = max(most, values)
    return most


def _values(data: bytes) -> int | None:
    """How many different values an image has; 0 for one that is no label image, None for one that is damaged."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode not in _ONE_CHANNEL or image.format in ("JPEG", "MPO"):
                return 0
            return len(np.unique(np.asarray(image)))
    except (Exception, MemoryError):  # decoders raise nearly anything
        return None
