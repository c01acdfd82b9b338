"""Keys and extensions that can name the members of a tar, so that those who read or unpack it get them back."""

from collections.abc import Iterable, Mapping

import numpy as np

from infobatch_stream.errors import DataError
from infobatch_stream.formats.extensions import is_extension
from infobatch_stream.formats.schema import KEY, Column, Encoded, SampleSet
from infobatch_stream.formats.tar_grouping import is_meta, split_name

__all__ = ["check_keys", "check_names", "why_twice"]

_LOOKED_AT = 1000  # samples, evenly spaced
_LOOKED_INTO = 1 << 27  # bytes of them together, about


def check_names(key: object, extensions: Iterable[str], *, foreign: bool) -> str:
    """The ``key`` of a sample. Raises ValueError where its members would be read as another's, or lead elsewhere.

    foreign: the extensions come from another tar, where more is possible.
    """
    text = _checked(key)
    for extension in extensions:
        if "/" in extension or not (foreign or is_extension(extension)):
            raise ValueError(f"{extension!r} is no extension; letters, digits, and dots or dashes between them are")
        if is_meta(f"{text}.{extension}"):
            raise ValueError(f"no reader would see a member {text}.{extension}: names like this are skipped; {_REMEDY}")
    return text


def check_keys(src: str, source: SampleSet) -> None:
    """Raise DataError where keys of ``source``, found at ``src``, cannot name the members of a tar.

    Some are looked at, so that it is known before anything is written if all are like this.
    """
    if KEY not in source.columns:
        return
    read = 0
    for position in np.unique(np.linspace(0, len(source) - 1, _LOOKED_AT, dtype=np.int64)).tolist():
        try:
            sample = source[position]
        except (DataError, OSError):  # it is met again, and told of, where it is converted
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
    """Why two columns cannot have one extension, and which gets another: that whose own it is not."""
    if extension in columns[other].wds.split(";"):
        one, other = other, one
    return (
        f"two columns have the extension {extension!r}; give one of them another (--extension {other}=other.{extension}"
        f"), or, if its images only become so by --resize, let it be (--resize-column {one})"
    )
