"""The indexes of many tars, made by several processes."""

import os
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import partial

from infobatch_stream._pool import ordered_map
from infobatch_stream._urls import is_remote, local_path
from infobatch_stream.errors import ConfigError, DataError
from infobatch_stream.sources.urls import expand_shards
from infobatch_stream.sources.webdataset.index_cache import is_fresh, load_index

__all__ = ["Indexing", "index_shards"]


@dataclass(frozen=True)
class Indexing:
    """What came of indexing: tars whose index was built, or was fresh already; their samples and bytes; failures."""

    built: int
    fresh: int
    samples: int
    size: int
    failures: tuple[str, ...]


@dataclass(frozen=True)
class _Done:
    fresh: bool = False
    samples: int = 0
    size: int = 0
    failure: str = ""


def index_shards(
    shards: Iterable[str | os.PathLike[str]],
    *,
    checksums: bool = False,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda total, size: None,
) -> Indexing:
    """Make the index of each of ``shards`` (tars, folders of tars, braces, globs), where there is none or it is stale.

    checksums: with the CRC-32 of the whole tar, which reads all of it; one without is then not fresh.
    workers: processes; the result is the same for any number.
    progress: called after each tar with the number of all and its bytes.

    One that fails does not keep the others from being indexed. Raises ConfigError and DataError for names that mean no
    tars.
    """
    paths = list(dict.fromkeys(local_path(url) for url in expand_shards(shards)))
    if far := [path for path in paths if is_remote(path)]:
        raise DataError(
            f"{far[0]} is not on this machine; index the tars where they lie, and copy the indexes with them."
        )
    found: list[_Done] = []
    with closing(
        ordered_map(partial(_index, checksums), paths, workers, preload=["webdataset.tariterators"])
    ) as results:
        for done in results:
            found.append(done)
            progress(len(paths), done.size)
    failures = tuple(done.failure for done in found if done.failure)
    fresh = sum(done.fresh for done in found)
    samples, size = sum(done.samples for done in found), sum(done.size for done in found)
    return Indexing(len(paths) - fresh - len(failures), fresh, samples, size, failures)


def _index(checksums: bool, path: str) -> _Done:
    """Run in a worker."""
    try:
        fresh = is_fresh(path)
        before = load_index(path) if fresh else None
        index = load_index(path, checksum=checksums)
        return _Done(before is not None and (before.checksum is not None or not checksums), len(index), index.stamp[0])
    except (ConfigError, DataError, OSError) as error:
        return _Done(failure=str(error))
