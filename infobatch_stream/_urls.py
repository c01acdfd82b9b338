"""Tells paths, urls and commands apart."""

import os
import re
from pathlib import Path

from infobatch_stream.errors import ConfigError, InfoBatchError

__all__ = [
    "AnyPath", "base_name", "check_server", "folder_of", "has_scheme", "is_compressed", "is_pipe", "is_remote",
    "local_path",
]  # fmt: skip

AnyPath = str | os.PathLike[str]
"""A path, or a url."""

_COMPRESSED = re.compile(r"\.(tgz|tbz2?|txz|tzst|gz|bz2|xz|zst|lz4|lzma|z)$", re.IGNORECASE)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")


def has_scheme(text: str) -> bool:
    """Whether ``text`` begins as a url does (``s3:``, also ``file:`` and ``pipe:``)."""
    return _SCHEME.match(text) is not None


def check_server(url: str, error: type[InfoBatchError]) -> None:
    """Raise ``error`` for a url that names no server, as ``s3:/bucket``."""
    if is_remote(url) and "://" not in url:
        raise error(f"{url!r} names no server; write a url as s3://bucket/name, a path with a colon as ./name.")


def folder_of(url: str) -> str:
    """The folder of a file at a path or url."""
    return url.rpartition("/")[0] if is_remote(url) else str(Path(local_path(url)).parent)


def is_pipe(url: str) -> bool:
    """Whether ``url`` is a command whose output is meant, as webdataset takes it."""
    return url.startswith("pipe:")


def is_remote(url: str) -> bool:
    """Whether ``url`` is no file of this machine."""
    return has_scheme(url) and not url.startswith(("file:", "pipe:"))


def is_compressed(url: str) -> bool:
    """Whether ``url`` is called like a compressed file."""
    return _COMPRESSED.search(base_name(url)) is not None


def local_path(url: str) -> str:
    """The path that ``url``, which is not remote, names. Raises ConfigError for a file of another machine."""
    if not url.startswith("file:"):
        return url
    path = url.removeprefix("file:")  # all of it: a ? or # is a part of a file's name
    if not path.startswith("//"):
        return path
    host, slash, rest = path[2:].partition("/")
    if host not in ("", "localhost"):
        raise ConfigError(f"{url} names a file of the machine {host!r}; write file:///{host}{slash}{rest}, or a path.")
    return f"{slash}{rest}"


def base_name(url: str) -> str:
    """The last part of a path or url, without what a web server takes for a query."""
    return Path(url.partition("?")[0] if url.lower().startswith("http") else url).name
