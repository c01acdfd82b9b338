"""Checks of the members of tars against the columns.json beside them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from infobatch_stream.formats.extensions import MAGIC_BYTES, image_extension, is_image, split_prefix
from infobatch_stream.formats.mds_encodings import ValueKind, fit, is_known, value_kind
from infobatch_stream.formats.roles import content_of, label_among
from infobatch_stream.formats.tar_columns import IMAGES, TarColumns
from infobatch_stream.formats.tar_index import TarIndex
from infobatch_stream.verify.diagnostics import Diagnostics, Severity
from infobatch_stream.verify.validators import Check

__all__ = ["CheckedColumns"]

_TEXTS = {"str": "txt", "json": "json"}  # encoding -> extension by which it is checked
_TEXT = 64  # first bytes of a member, by which text is recognized
_LONGEST = 1 << 26  # bytes of a value that is looked at


@dataclass(frozen=True)
class CheckedColumns(TarColumns):
    """`TarColumns` that check members."""

    def compare(self, there: Iterable[str], diagnostics: Diagnostics) -> None:
        """Report where columns.json does not fit the members of a set. there: the extensions that they have."""
        if not self.declared:
            return
        owners = {extension: self.owner(extension) for extension in sorted(there)}
        if lost := [extension for extension, owner in owners.items() if owner is None]:
            diagnostics.error(
                f"columns.json has no column for the members {', '.join(map(repr, lost[:5]))}: it is of other shards; "
                "remove it, or mend it"
            )
        missing = [name for name in self.extensions if name not in owners.values()]
        if missing and not self.differ:
            named = ", ".join(f"{name!r} ({self.declared[name].wds})" for name in missing[:5])
            diagnostics.error(f"columns.json has the columns {named}, which no sample has; remove it, or mend it")
        for name, column in self.declared.items():
            if not is_known(column.mds):
                what = f"columns.json stores {name!r} as {column.mds!r}, which is no encoding of streaming's"
                diagnostics.add(Severity.WARNING, what)

    def check_first(self, index: TarIndex, read: Callable[[int, int], bytes], diagnostics: Diagnostics) -> None:
        """Compare the first sample with what columns.json says of its members."""
        for extension, offset, length in index.members(0) if len(index) and self.declared else ():
            for check in self.checks(extension, lambda name: None) if 0 < length <= _LONGEST else ():
                try:
                    check(read(offset, length))
                except ValueError as error:
                    name = self.owner(extension)
                    what = f"its {extension!r} is no {self.declared[name or ''].mds}, as columns.json says ({error})"
                    diagnostics.error(what, 0, index.key(0))

    def checks(self, extension: str, usual: Callable[[str], Check | None]) -> list[Check]:
        """The checks of members with an extension, by the encoding of its column.

        usual: gives the check by the extension alone, for members without a column.
        """
        name = self.owner(extension)
        if name is None or not is_known(self.declared[name].mds):
            found = [usual(extension)]
        elif (encoding := self.declared[name].mds) in IMAGES:
            found = [usual(extension), _check_image]
        elif value_kind(encoding) is not ValueKind.RAW:
            found = [lambda data: fit(data, encoding)]
        else:
            found = [usual(_TEXTS[encoding])] if encoding in _TEXTS else []
        return [check for check in found if check is not None]

    def may_be_empty(self, extension: str) -> bool:
        """Whether an empty member is a valid value: an empty text, or no bytes."""
        name = self.owner(extension)
        return name is not None and self.declared[name].mds in ("str", "bytes")

    def compared(self, there: Sequence[str], wanted: Sequence[str]) -> tuple[set[str], set[str]]:
        """The extensions by which samples are compared, and those of labels.

        there: all extensions. wanted: columns to compare by; if one of them is missing, there is nothing to compare.
        """
        parts: dict[str, list[str]] = {}
        for extension in sorted(there, key=lambda extension: (split_prefix(extension)[0], extension)):
            name = self.owner(extension)
            if name is None:
                name = split_prefix(extension)[0] + "image" if is_image(extension) else extension
            parts.setdefault(name, []).append(extension)
        order = {name: is_image(parts[name][0]) for name in [*self.extensions, *parts] if name in parts}
        label = label_among(order)
        labels = set(parts[label]) if label is not None else set[str]()
        if not wanted:
            return {extension for name in content_of(order) for extension in parts[name]}, labels
        meant = [set(self.meant(name, there)) for name in wanted]
        return (set().union(*meant) if all(meant) else set()), labels


def _check_image(data: bytes) -> None:
    """Raise ValueError for text. Other unknown data may be an image, since not all kinds can be recognized."""
    start = data[:_TEXT]
    if image_extension(start[:MAGIC_BYTES]) is None and not start.startswith(b"P") and _is_text(start):
        raise ValueError(f"it begins with {start[:MAGIC_BYTES]!r}")


def _is_text(data: bytes) -> bool:
    return data.isascii() and data.decode().replace("\n", " ").replace("\t", " ").isprintable()
