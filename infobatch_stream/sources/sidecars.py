"""The files beside shards that describe their columns and classes: columns.json and classes.json."""

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from infobatch_stream._urls import AnyPath, is_remote
from infobatch_stream.errors import DataError
from infobatch_stream.formats.extensions import is_extension
from infobatch_stream.formats.schema import KEY, MEMBERS, Column
from infobatch_stream.sources.remote.download import NotThereError, download

__all__ = ["read_beside", "read_classes", "read_columns"]

_MOST: Final = 1 << 26  # bytes of columns.json or classes.json
_RESERVED: Final = (KEY, MEMBERS)


def read_beside(folders: Iterable[AnyPath], name: str) -> tuple[str, Any] | None:
    """Path and content of the JSON file ``name`` in the folders (or urls) of shards; None where it is in none.

    Raises DataError where it is damaged, or not the same in all folders.
    """
    found: dict[bytes | None, str] = {}
    for folder in folders:
        path = f"{os.fspath(folder)}/{name}"
        found.setdefault(_fetched(path) if is_remote(path) else _content(Path(path)), path)
    if len(found) > 1:
        raise DataError(
            f"{' and '.join(map(str, found.values()))} differ; convert the folders one by one, or remove both."
        )
    data, path = found.popitem() if found else (None, name)
    if data is None:
        return None
    try:
        return path, json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}); remove it, or write the shards again.") from error


def _content(path: Path) -> bytes | None:
    if not path.is_file():
        return None
    if path.stat().st_size > _MOST:
        raise DataError(f"{path} has {path.stat().st_size:,} bytes; it is damaged: remove it.")
    return path.read_bytes()


def _fetched(url: str) -> bytes | None:
    with tempfile.TemporaryDirectory(prefix="infobatch-convert-") as folder:
        place = Path(folder, "fetched")
        try:
            download(url, place)
        except NotThereError:  # or nobody may list what is there: then a web server says that it is forbidden
            return None
        data = _content(place)
    # There are servers that answer with a page, and as if all was well, for what they do not have.
    return None if url.lower().startswith("http") and not _is_json(data) else data


def _is_json(data: bytes | None) -> bool:
    try:
        json.loads((data or b"").decode())
    except (ValueError, RecursionError):
        return False
    return True


def read_classes(folders: Iterable[AnyPath]) -> list[str] | None:
    """The names of classes in ``classes.json`` beside shards; None where there is none. Raises DataError."""
    beside = read_beside(folders, "classes.json")
    if beside is None:
        return None
    path, classes = beside
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise DataError(f"{path} is no JSON list of texts; remove it, or write the shards again.")
    return classes


def read_columns(folders: Iterable[AnyPath]) -> dict[str, Column] | None:
    """The columns in ``columns.json`` beside shards, in their order; None where there is none. Raises DataError.

    It is ``{"<column>": {"mds": "<encoding>", "wds": "<extension>"}, ...}``; extensions may be several, ``jpg;png``.
    """
    beside = read_beside(folders, "columns.json")
    if beside is None:
        return None
    path, entries = beside
    columns: dict[str, Column] = {}
    taken: set[str] = set()
    for name, column in entries.items() if isinstance(entries, dict) else [("", None)]:
        if not (name and isinstance(column, dict) and column.keys() == {"mds", "wds"}) or not all(
            isinstance(text, str) for text in column.values()
        ):
            raise _damaged(path, f"of the column {name!r} it says {column!r:.100}")
        if name not in _RESERVED:
            extensions = column["wds"].split(";")
            for extension in extensions:
                if not is_extension(extension) or extension != extension.lower() or extension in taken:
                    raise _damaged(path, f"the column {name!r} has the extension {extension!r:.100}")
                taken.add(extension)
        columns[name] = Column(column["mds"], column["wds"])
    return columns


def _damaged(path: str, what: str) -> DataError:
    return DataError(
        f"{path} is damaged: {what}; it should be {{column: {{'mds': encoding, 'wds': extension}}}}, with one column "
        "per extension. Remove it, or write the shards again."
    )
