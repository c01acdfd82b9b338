"""Building the indexes of many tars, with several processes."""

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
    """What `index_shards` did.

    Attributes:
        built: Number of tars whose index was built.
        fresh: Number of tars whose index was up to date.
        samples: Number of samples in these tars.
        size: Bytes of these tars.
        failures: An error message for each tar that could not be indexed.
    """

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
    on_progress: Callable[[int, int], None] = lambda total, size: None,
) -> Indexing:
    """Build the index of each tar that has none, or a stale one.

    If one tar fails, the others are still indexed.

    Args:
        shards: Local tars, folders of tars, and names with braces or globs.
        checksums: Store the CRC-32 of each whole tar, which reads all of it. An index without one is then stale.
        workers: Number of processes. The result does not depend on it.
        on_progress: Called after each tar with the number of all tars, and the bytes of this one.

    Returns:
        How many indexes were built, and what failed.

    Raises:
        ConfigError: If a name cannot mean tars.
        DataError: If there are no such tars, or they are not on this machine.
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
            on_progress(len(paths), done.size)
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
