"""The list of the shards of a set of tars: ``shards.json``, which convert writes, or an ``index.json`` of wids.

Both are ``{"__kind__": "wids-shard-index-v1", "shardlist": [{"url": name, "nsamples": n, "filesize": bytes}, ...]}``.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from infobatch_stream._urls import base_name
from infobatch_stream.errors import DataError

__all__ = ["SHARD_LIST", "Listed", "holds_mds", "lists_tars", "shard_list_of", "read_shard_list"]

SHARD_LIST: Final = "shards.json"
_NAMES: Final = (SHARD_LIST, "index.json")
_LARGEST: Final = 1 << 30  # bytes


@dataclass(frozen=True)
class Listed:
    """The entry of a shard in the list ``place``: its samples and bytes, None if they are not given."""

    place: str
    samples: int | None
    size: int | None


def shard_list_of(shards: Iterable[tuple[str, int, int]]) -> str:
    """The text of a list of shards: name, samples and bytes of each."""
    listed = [{"url": name, "nsamples": samples, "filesize": size} for name, samples, size in shards]
    return json.dumps({"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": listed})


def read_shard_list(folder: Path) -> dict[str, Listed]:
    """The entries of the lists in ``folder``, by name of the tar; empty if there is no list. Raises DataError."""
    found: dict[str, Listed] = {}
    for place in (folder / name for name in reversed(_NAMES)):
        if not place.is_file():
            continue
        try:
            for entry in _read(place)["shardlist"]:
                name, samples, size = entry["url"], entry.get("nsamples"), entry.get("filesize")
                if not isinstance(name, str) or not all(type(n) is int or n is None for n in (samples, size)):
                    raise TypeError(f"the shard {entry!r:.200}")
                found[base_name(name)] = Listed(place.name, samples, size)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(
                f"{place} is no list of tars ({type(error).__name__}: {error}); write it again, or remove it."
            ) from error
    return found


def holds_mds(folder: Path) -> bool:
    """Whether the shards in ``folder`` are MDS. Beside tars, an ``index.json`` may also be a list of them."""
    if any(folder.glob("*.mds*")):
        return True
    if not (folder / "index.json").exists():
        return False
    if not any(folder.glob("*.tar")):
        return True
    return _has(folder / "index.json", "shards")


def lists_tars(place: Path) -> bool:
    """Whether the ``index.json`` at ``place`` is a list of tars, by wids."""
    return _has(place, "shardlist")


def _read(place: Path) -> Any:
    if place.stat().st_size > _LARGEST:
        raise ValueError(f"it has {place.stat().st_size:,} bytes")
    return json.loads(place.read_bytes())


def _has(place: Path, key: str) -> bool:
    try:
        content = _read(place)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and key in content
