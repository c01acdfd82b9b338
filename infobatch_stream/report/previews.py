"""The samples that a report shows: where each lies, its label, a picture, a text."""

import re
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.errors import DataError
from infobatch_stream.formats.roles import LABELS, NAMES
from infobatch_stream.report.dataset import ShardReader
from infobatch_stream.report.thumbnails import Field, Thumbnail, picture_of, text_of

__all__ = ["Preview", "previews"]

_LONGEST: Final = 60  # characters of a label or key
_LONGEST_NAME: Final = 4096


@dataclass(frozen=True)
class Preview:
    """One sample. label, key, name, text: "" without one; problem: why it, or a part of it, is not shown."""

    shard: str
    row: int
    key: str = ""
    label: str = ""
    name: str = ""
    picture: Thumbnail | None = None
    text: str = ""
    problem: str = ""


def previews(shards: ShardReader, index: NDArray[np.int64], *, pictures: bool = True) -> dict[int, Preview]:
    """What is to be seen of the samples ``index``, int64[k], or why it is not; in the order of the shards."""
    return {number: _preview(shards, number, pictures) for number in np.unique(index).tolist()}


def _preview(shards: ShardReader, index: int, pictures: bool) -> Preview:
    shard = bisect_right(shards.ends, index)
    row = index - (shards.ends[shard - 1] if shard else 0)
    empty = Preview(shards.names[shard], row)
    try:
        fields = shards.fields(index)
    except (DataError, OSError) as error:
        return replace(empty, problem=str(error))
    by_name = {field.name: field for field in reversed(fields)}
    label = next((by_name[name] for name in LABELS if name in by_name), None)
    key, name = (next((by_name[name] for name in names if name in by_name), None) for names in (NAMES, NAMES[::-1]))
    others = [field for field in fields if field is not label and field is not key]
    picture, problems = _first_picture(others) if pictures else (None, [])
    return replace(
        empty,
        key="" if key is None else _shortened(text_of(key)),
        name="" if name is None else _shortened(text_of(name), _LONGEST_NAME),
        label="" if label is None else _label(text_of(label), shards.classes),
        picture=picture,
        text=_text(others, shown=picture is not None or bool(problems)),
        problem=" ".join(problems),
    )


def _first_picture(fields: Iterable[Field]) -> tuple[Thumbnail | None, list[str]]:
    """The first picture there is, and why those before it cannot be shown."""
    problems = []
    for field in fields:
        try:
            picture = picture_of(field)
        except ValueError as error:
            problems.append(f"{field.name} cannot be decoded: {error}.")
            continue
        if picture is not None:
            return picture, problems
    return None, problems


def _text(fields: list[Field], *, shown: bool) -> str:
    """The first field of text; if there is none, and nothing else is ``shown``, a word on each."""
    text = next((field for field in fields if field.encoding in ("str", "json")), None)
    if text is not None:
        return text_of(text)
    return "" if shown else _shortened("; ".join(f"{field.name}: {text_of(field)}" for field in fields), 4 * _LONGEST)


def _label(text: str, classes: list[str] | None) -> str:
    number = int(text) if re.fullmatch(r"\d{1,9}", text, re.ASCII) else -1
    return _shortened(classes[number] if classes and 0 <= number < len(classes) else text)


def _shortened(text: str, length: int = _LONGEST) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
