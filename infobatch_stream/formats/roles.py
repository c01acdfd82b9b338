"""The roles of a sample's fields: its label, its name, its content."""

from collections.abc import Iterable, Mapping
from typing import Final

from infobatch_stream.formats.extensions import IMAGE_EXTENSIONS
from infobatch_stream.formats.schema import KEY, MEMBERS

__all__ = ["LABELS", "NAMES", "content_of", "label_among"]

LABELS: Final = ("label", "labels", "cls", "class", "target", "category")  # the first that is there
NAMES: Final = (KEY, "key", "id", "name")
_NO_CONTENT: Final = (KEY, MEMBERS, "name")  # which differ between samples of the same content
_USUAL: Final = ("image", "img", "picture", "photo", *sorted(IMAGE_EXTENSIONS))


def label_among(names: Iterable[str]) -> str | None:
    """The field that is the label; None where there is none."""
    there = set(names)
    return next((name for name in LABELS if name in there), None)


def content_of(fields: Mapping[str, bool]) -> tuple[str, ...]:
    """The fields by which samples are compared: the main image; without images, all but label, key and name.

    fields: name -> whether it is an image.
    """
    images = [name for name, is_image in fields.items() if is_image]
    if images:
        return (next((name for name in images if name.lower() in _USUAL), images[0]),)
    label = label_among(fields)
    others = tuple(name for name in fields if name not in (*_NO_CONTENT, label))
    return others or tuple(name for name in fields if name not in _NO_CONTENT)
