"""Checks that keys and extensions can be names of tar members, and are read back as they were."""

from collections.abc import Iterable, Mapping

import numpy as np

from infobatch_stream.errors import DataError
from infobatch_stream.formats.extensions import is_extension
from infobatch_stream.formats.schema import KEY, Column, Encoded, SampleSet
from infobatch_stream.formats.tar_grouping import is_meta, split_name

__all__ = ["check_keys", "check_names", "why_twice"]

_LOOKED_AT = 1000  # samples that are checked, evenly spaced
_LOOKED_INTO = 1 << 27  # bytes of these, about, after which checking ends


def check_names(key: object, extensions: Iterable[str], *, foreign: bool) -> str:
    """The ``key`` of a sample as text. Raises ValueError for names that would be read differently, or leave the folder.

    foreign: the extensions come from another tar, where more are possible than we write.
    """
    text = _checked(key)
    for extension in extensions:
        if "/" in extension or not (foreign or is_extension(extension)):
            raise ValueError(f"{extension!r} is no extension; letters, digits, and dots or dashes between them are")
        if is_meta(f"{text}.{extension}"):
            raise ValueError(f"no reader would see a member {text}.{extension}: names like this are skipped; {_REMEDY}")
    return text


def check_keys(src: str, source: SampleSet) -> None:
    """Raise DataError if keys of ``source``, found at ``src``, cannot be names of tar members.

    Only some samples are checked, to find out before anything is written if all keys are unsuitable.
    """
    if KEY not in source.columns:
        return
    read = 0
    for position in np.unique(np.linspace(0, len(source) - 1, _LOOKED_AT, dtype=np.int64)).tolist():
        try:
            sample = source[position]
        except (DataError, OSError):  # the conversion meets it again, and reports it
            continue
        try:
            _checked(sample[KEY])
        except ValueError as error:
            raise DataError(f"{src}: sample {position:,}: {error}.") from error
        read += sum(len(value.data) for value in sample.values() if isinstance(value, Encoded))
        if read > _LOOKED_INTO:
            return


_REMEDY = "number the samples instead (--no-keys), or rename it in the source"


def _checked(key: object) -> str:
    if not isinstance(key, str):
        kind = "bytes" if isinstance(key, Encoded) else type(key).__name__
        raise ValueError(f"its key is of the type {kind}, and a tar needs text; {_REMEDY}")  # noqa: TRY004
    if key.startswith("/") or ".." in key.split("/"):
        raise ValueError(f"the key {key!r} leads out of the folder that a tar is unpacked in; {_REMEDY}")
    if split_name(f"{key}.x") != (key, "x") or "\0" in key or is_meta(f"{key}.x"):
        raise ValueError(
            f"the key {key!r} would be read as another from a tar: its last part may not be empty, nor have a dot, "
            f"nor its first one be as __this__; {_REMEDY}"
        )
    return key


def why_twice(one: str, other: str, extension: str, columns: Mapping[str, Column]) -> str:
    """An error message: two columns have one extension, and how to give one of them another."""
    if extension in columns[other].wds.split(";"):
        one, other = other, one
    return (
        f"two columns have the extension {extension!r}; give one of them another (--extension {other}=other.{extension}"
        f"), or, if its images only become so by --resize, let it be (--resize-column {one})"
    )
