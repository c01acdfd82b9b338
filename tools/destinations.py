"""Where a conversion goes: which destination the path or URL of a user is."""

import os
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from infobatch_stream.errors import ConfigError
from infobatch_stream.sources.urls import is_remote, local_path

from .bucket import is_url, url_destination
from .destination import Destination, local_destination

__all__ = ["check_apart", "open_destination", "place_of"]


def open_destination(
    dst: Path | str, *, overwrite: bool, recipe: Mapping[str, Any] | None = None, resume: bool = False
) -> AbstractContextManager[Destination]:
    """The destination in a bucket or a folder, as `url_destination` and `local_destination` have it."""
    if is_url(dst):
        if overwrite:
            raise ConfigError(f"{dst} is in a bucket, where shards are not replaced; remove them, or give another url.")
        return url_destination(str(dst), recipe=recipe, resume=resume)
    return local_destination(Path(dst), overwrite=overwrite, recipe=recipe, resume=resume)


def place_of(dst: Path | str) -> Path | str:
    """``dst`` as a path, where it is one; a url. Raises ConfigError for what was meant as a url, as ``s3:/bucket``."""
    if is_url(dst):
        return str(dst)
    if is_remote(text := os.fspath(dst)):
        raise ConfigError(f"{text!r} names no server; write a url as s3://bucket/name, a path with a colon as ./name.")
    return Path(local_path(text))


def check_apart(src: Path | str, dst: Path | str) -> None:
    """Raise ConfigError where the destination is the source, or holds it, or lies in a folder that is converted."""
    text = os.fspath(src)
    fixed = re.match(r"[^*?\[{]*", text)
    is_pattern = fixed is not None and fixed[0] != text and not Path(local_path(text)).exists()
    folder = fixed[0].rpartition("/")[0] or "." if is_pattern and fixed is not None else text
    if is_url(text) or is_url(dst):
        here, there = (f"{str(one).rstrip('/')}/" for one in (folder, dst))
        overlap = here.startswith(there) or (there.startswith(here) and not is_pattern)
    else:
        inner, outer = Path(local_path(folder)).resolve(), Path(dst).resolve()
        overlap = inner.is_relative_to(outer) or (outer.is_relative_to(inner) and not is_pattern)
    if overlap:
        raise ConfigError(f"{dst} and {src} lie one inside the other; choose a destination outside the source.")
