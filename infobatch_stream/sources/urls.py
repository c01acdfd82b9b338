"""Which tars a user means: paths and urls, braces, globs and folders."""

import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from infobatch_stream._urls import AnyPath, base_name, check_server, is_compressed, is_pipe, is_remote, local_path
from infobatch_stream.errors import ConfigError, DataError, MissingExtraError
from infobatch_stream.sources.patterns import expand_braces, expand_files, is_wild, merged
from infobatch_stream.sources.remote.download import ForbiddenError, list_files, list_folder

__all__ = ["expand_shards"]

_STREAMED = ("*.tar", "*.tgz", "*.tar.gz", "*.tar.bz2", "*.tar.xz", "*.tar.zst")  # of a folder


def expand_shards(urls: AnyPath | Iterable[AnyPath], *, streamed: bool = False) -> list[str]:
    """The tars meant by ``urls``, in order: paths or urls, braces (``{000..123}``), globs, folders of tars.

    ``**`` in a glob goes into folders of any depth. A name that exists is meant as it stands, even with a brace or
    bracket in it; hidden files only if they are named. What a glob finds is not taken twice of one of ``urls``; folders
    that it matches count if it matches no file. Folders and globs of a server need one that lists its files, as s3://
    does and http:// does not. streamed: compressed tars and ``pipe:`` commands are meant too.

    Raises ConfigError for braces that do not match and for what is no path, DataError for what names no tar, or none
    that can be read by index.
    """
    expanded: list[str] = []
    for item in [urls] if isinstance(urls, str | os.PathLike) else urls:
        if not isinstance(item, str | os.PathLike):
            raise ConfigError(f"urls must be a path or url, or an iterable of them, as str or Path; found {item!r}.")
        text = os.fspath(item)
        if "\0" in text:
            raise ConfigError(f"urls holds {text!r}; no path has a NUL in it.")
        _refuse(text, streamed)
        try:
            patterns = expand_braces(text)
        except ImportError as error:
            raise MissingExtraError.of("webdataset", "wds") from error
        except ValueError as error:
            if not is_pipe(text):  # whose braces may be awk's
                raise ConfigError(f"The braces in {text!r} do not match; write 'train-{{000..099}}.tar'.") from error
            patterns = [text]
        kinds = _STREAMED if streamed else _STREAMED[:1]
        expanded.extend(merged((pattern, _find(pattern, kinds)) for pattern in patterns))
    if not expanded:
        raise ConfigError("urls is empty; name at least one tar file.")
    for url in expanded:
        _refuse(url, streamed)  # what a glob found
    return expanded


def _find(pattern: str, kinds: tuple[str, ...]) -> list[str]:
    if is_pipe(pattern):
        return [pattern]
    if is_remote(pattern):
        found = _find_remote(pattern, kinds)
    else:
        path = local_path(pattern)
        names = [path] if _is_folder(path) else expand_files(path)
        if names == [path] and not _is_folder(path):
            return [pattern]
        found = [tar for name in names for tar in (_tars_in(name, kinds) if _is_folder(name) else [name])]
    if not found:
        raise DataError(
            f"There is no shard at {pattern}: a folder must hold {kinds[0]}, a glob must match files.{_inside(pattern)}"
        )
    return found


def _is_folder(path: str) -> bool:
    return os.path.isdir(path)  # noqa: PTH112  # Path.is_dir raises for a pattern that is too long (Python 3.11)


def _tars_in(folder: str, kinds: tuple[str, ...]) -> list[str]:
    """Hidden ones, such as macOS's ``._x.tar``, are left out, as a glob leaves them out."""
    return sorted(str(file) for kind in kinds for file in Path(folder).glob(kind) if not file.name.startswith("."))


def _inside(folder: str) -> str:
    """What to say of folders in ``folder`` that hold shards; nothing where it is none."""
    folder = local_path(folder)
    if not _is_folder(folder):
        return ""
    found = sorted(file.parent.name for kind in ("*/*.tar", "*/index.json") for file in Path(folder).glob(kind))
    if found:
        return f" Its folders {', '.join(dict.fromkeys(found))} hold shards: name one of them."
    return " (It holds MDS shards, which need this for nothing.)" if Path(folder, "index.json").exists() else ""


def _find_remote(pattern: str, kinds: tuple[str, ...]) -> list[str]:
    if pattern.lower().startswith("http"):
        if pattern.endswith("/") or is_wild(pattern.partition("?")[0]):
            raise ConfigError(
                f"{pattern}: a web server does not tell which files it has. Name them, as in 'train-{{000..099}}.tar'."
            )
        return [pattern]
    if is_wild(pattern):
        found = list_files(pattern)
        return [tar for url in found for tar in (_remote_tars(url, kinds) if url.endswith("/") else [url])]
    if pattern.lower().endswith(".tar") or is_compressed(pattern):
        return [pattern]
    # What is called as no tar is a folder if there are tars in it: "v1.0" may be.
    _, slash, last = pattern.partition("://")[2].rpartition("/")
    is_named = bool(slash) and "." in last  # as a file may be
    try:
        found = _remote_tars(pattern, kinds)
    except ForbiddenError:
        if not is_named:
            raise
        found = []
    return found or ([pattern] if is_named else [])


def _remote_tars(folder: str, kinds: tuple[str, ...]) -> list[str]:
    return [url for url in list_folder(folder) if any(fnmatchcase(base_name(url), kind) for kind in kinds)]


def _refuse(url: str, streamed: bool) -> None:
    """Raise DataError for what cannot be read by index."""
    check_server(url, DataError)
    if streamed:
        return
    if is_pipe(url):
        why, remedy = "is the output of a command", "write it to a tar file"
    elif is_compressed(url):
        why, remedy = "is compressed", "decompress it (gunzip, zstd -d)"
    else:
        return
    raise DataError(
        f"{url!r} {why}, so its samples cannot be read by index where they are. infobatch_stream.StreamedWebDataset"
        f"(urls) keeps the plain tar in its cache; or {remedy}."
    )
