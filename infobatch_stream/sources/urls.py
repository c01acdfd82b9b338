"""Which tars a user means: paths, braces, globs and folders."""

import os
import re
from collections.abc import Iterable
from glob import glob
from pathlib import Path
from urllib.parse import urlparse

from infobatch_stream.errors import ConfigError, DataError, MissingExtraError
from infobatch_stream.sources.tar_index import AnyPath

__all__ = ["expand_shards", "local_path"]

_COMPRESSED = re.compile(r"\.(tgz|tbz2?|txz|tzst|gz|bz2|xz|zst|lz4|lzma|z)$", re.IGNORECASE)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")


def expand_shards(urls: AnyPath | Iterable[AnyPath]) -> list[str]:
    """The tars meant by ``urls``, in order: paths or `file:` urls, braces (``{000..123}``), globs, folders of tars.

    A name that exists is meant as it stands, even with a brace in it. Raises ConfigError for braces that do not match
    and for what is no path, DataError for what names no tar, or none that can be read by index.
    """
    try:
        from braceexpand import braceexpand
    except ImportError as error:
        raise MissingExtraError.of("webdataset", "wds") from error

    expanded: list[str] = []
    for item in [urls] if isinstance(urls, str | os.PathLike) else urls:
        if not isinstance(item, str | os.PathLike):
            raise ConfigError(f"urls must be a path or url, or an iterable of them, as str or Path; found {item!r}.")
        text = os.fspath(item)
        if "\0" in text:
            raise ConfigError(f"urls holds {text!r}; no path has a NUL in it.")
        local_path(text)  # the braces in a pipe's command are not ours to expand
        try:
            patterns = [text] if os.path.exists(text) else list(braceexpand(text))  # noqa: PTH110  # see _find
        except ValueError as error:
            raise ConfigError(f"The braces in {text!r} do not match; write 'train-{{000..099}}.tar'.") from error
        for pattern in patterns:
            expanded.extend(_find(pattern))
    if not expanded:
        raise ConfigError("urls is empty; name at least one tar file.")
    return expanded


def _find(pattern: str) -> list[str]:
    path = local_path(pattern)
    # Not Path.exists, which raises for a pattern that is too long for a file's name (Python 3.11).
    if os.path.isdir(path):  # noqa: PTH112
        found = [str(file) for file in Path(path).glob("*.tar")]
    elif re.search(r"[*?[]", path) and not os.path.exists(path):  # noqa: PTH110
        found = glob(path)  # noqa: PTH207  # Path.glob takes no absolute pattern
    else:
        return [pattern]
    if not found:
        raise DataError(f"There is no shard at {pattern}: a folder must hold *.tar, a glob must match files.")
    return sorted(found)


def local_path(url: str) -> str:
    """The path that ``url`` names; raises DataError for what cannot be read by index."""
    if url.startswith("pipe:"):
        why, remedy = "is the output of a command", "Write it to a local tar file"
    elif _SCHEME.match(url) and not url.startswith("file:"):
        why, remedy = "is not local", "Copy it to a local disk"
    elif _COMPRESSED.search(url):
        why, remedy = "is compressed", "Decompress it (gunzip, zstd -d)"
    else:
        return urlparse(url).path if url.startswith("file:") else url
    raise DataError(f"{url!r} {why}; only local, uncompressed tar files can be read by index. {remedy}.")
