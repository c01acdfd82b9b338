"""Where a conversion goes: which destination the path or URL of a user is."""

import os
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from pathlib import Path

from infobatch_stream._urls import check_server, local_path
from infobatch_stream.convert.destinations.base import Destination, Request
from infobatch_stream.convert.destinations.local import local_destination
from infobatch_stream.convert.destinations.remote import is_url, url_destination
from infobatch_stream.errors import ConfigError
from infobatch_stream.sources.patterns import expand_braces, is_wild

__all__ = ["check_apart", "open_destination", "place_of"]


def open_destination(dst: Path | str, request: Request) -> AbstractContextManager[Destination]:
    """The destination in a bucket or a folder, as `url_destination` and `local_destination` have it."""
    if not is_url(dst):
        return local_destination(Path(dst), request)
    if request.overwrite:
        raise ConfigError(f"{dst} is in a bucket, where shards are not replaced; remove them, or give another url.")
    return url_destination(str(dst), request)


def place_of(dst: Path | str) -> Path | str:
    """``dst`` as a path, where it is one; a url. Raises ConfigError for what was meant as a url, as ``s3:/bucket``."""
    if is_url(dst):
        return str(dst)
    check_server(text := os.fspath(dst), ConfigError)
    return Path(local_path(text))


def check_apart(src: Path | str, dst: Path | str) -> None:
    """Raise ConfigError where the destination is the source, or holds it, or lies where the source is looked for."""
    text = os.fspath(src)
    try:
        patterns = expand_braces(text)
    except (ValueError, ImportError):  # raised where the source is read
        patterns = [text]
    whole = _parts(str(dst))
    for place in (whole, [*whole[:-1], f"{whole[-1]}.partial"]):  # where shards are made first
        for pattern in patterns:
            head, rest = _divided(pattern)
            folder = _parts(head)
            if folder[: len(place)] == place or (not rest and place[: len(folder)] == folder):
                raise ConfigError(f"{dst} and {src} lie one inside the other; choose a destination outside the source.")
            if place[: len(folder)] == folder and _reaches(rest, place[len(folder) :]):
                raise ConfigError(
                    f"{src} finds what is written to {dst}, too, so that the next conversion would take it for a part "
                    "of its source; choose a destination outside the source."
                )


def _divided(pattern: str) -> tuple[str, list[str]]:
    """What is fixed of a path or url, and the parts behind that, which are a pattern."""
    if is_url(pattern):
        head = re.split(r"[*?[]", pattern, maxsplit=1)[0].rpartition("/")[0] if is_wild(pattern) else pattern
    else:
        pattern = head = local_path(pattern)
        while is_wild(head) and not os.path.exists(head):  # noqa: PTH110  # Path's raises for a name that is too long
            head = head.rpartition("/")[0]
    rest = pattern[len(head) :].strip("/")
    return head or pattern[: pattern.startswith("/")], rest.split("/") if rest else []


def _parts(place: str) -> list[str]:
    return place.rstrip("/").split("/") if is_url(place) else list(Path(local_path(place)).resolve().parts)


def _reaches(pattern: Sequence[str], folder: Sequence[str]) -> bool:
    """Whether a pattern, part by part, can match a folder, or something in it."""
    if not folder or not pattern:
        return not folder
    if pattern[0] == "**" and _reaches(pattern, folder[1:]):
        return True
    rest = folder if pattern[0] == "**" else folder[1:]
    return (pattern[0] == "**" or fnmatchcase(folder[0], pattern[0])) and _reaches(pattern[1:], rest)
