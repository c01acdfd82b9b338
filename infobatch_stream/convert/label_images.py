"""Which columns hold label images (masks): pixels that are numbers of classes, of which no mean may be taken."""

import io
import re
from collections.abc import Mapping, Sequence

import numpy as np

from infobatch_stream.errors import ConfigError, DataError
from infobatch_stream.formats.extensions import is_image
from infobatch_stream.formats.schema import Column, Encoded, SampleSet

__all__ = ["AUTO", "HOW", "NEAREST", "find_label_columns", "is_image_column"]

AUTO, NEAREST, SMOOTH = "auto", "nearest", "smooth"
HOW = (AUTO, NEAREST, SMOOTH)
"""How a column is made smaller: as its images look, as label images, or as photographs."""

_LOOKED_AT = 32  # samples of a set, evenly spaced
_FEW = 32  # values in an image of labels; a photograph has more
_ONE_CHANNEL = ("1", "L", "P", "I", "I;16", "I;16L", "I;16B")
_COLOURS = ("RGB", "RGBA")
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
    label images where those that are looked at are in a format without loss, and have one channel and are called like
    labels, or one channel and few values beside other images, or several channels, few colours and are called like
    labels. Raises ConfigError for names that cannot be meant.
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
        most, single = _most_values(sets, name) if way == AUTO else (0, False)
        if not most:
            continue
        stored = [one.columns[name].wds for one in sets if name in one.columns]
        called = bool(_NAMES.intersection(re.split(r"[\W_]+", " ".join([name, *stored]).lower())))
        few, others = most <= _FEW, len(images) > 1
        if single:
            looks = f"one channel, {most:,} values at most"
        else:
            looks = f"several channels, {most:,} colours at most" if few else "several channels, many colours"
        rest = " (and --resize-column NAME for each other column)" if others else ""
        if (single and (called or (few and others))) or (called and few):
            found.add(name)
            notes.append(
                f"{where}: the images of {name!r} are taken for label images ({looks}) and made smaller by nearest "
                f"neighbour; if they are photographs, --resize-column {name}=smooth{rest}"
            )
        elif called or (single and few):
            notes.append(
                f"{where}: the images of {name!r} ({looks}) are made smaller as photographs are; if they are label "
                f"images, --resize-column {name}=nearest{rest}"
            )
    return frozenset(found), tuple(notes)


def _most_values(sets: Sequence[SampleSet], name: str) -> tuple[int, bool]:
    """The most different values (or colours) in one of the images that are looked at, and whether all have one channel.

    0 unless all could be label images.
    """
    most, single = 0, True
    for one in sets:
        for position in np.unique(np.linspace(0, len(one) - 1, _LOOKED_AT, dtype=np.int64)).tolist():
            try:
                value = one[position].get(name)
            except (DataError, OSError):  # raised where it is converted
                continue
            if isinstance(value, Encoded) and value.data and (values := _values(value.data)) is not None:
                if not values[0]:
                    return 0, False
                most, single = max(most, values[0]), single and values[1]
    return most, single


def _values(data: bytes) -> tuple[int, bool] | None:
    """How many values an image of one channel has, or colours (up to a few), and whether it has one channel.

    (0, False) for what is no label image, None for an image that is damaged.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format in ("JPEG", "MPO"):
                return 0, False
            if image.mode in _ONE_CHANNEL:
                return len(np.unique(np.asarray(image))), True
            if image.mode in _COLOURS:
                return len(image.getcolors(_FEW) or range(_FEW + 1)), False
            return 0, False
    except (Exception, MemoryError):  # decoders raise nearly anything
        return None
