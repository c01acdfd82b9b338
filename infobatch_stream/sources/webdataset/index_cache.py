"""The indexes of local tars that are kept: beside the shard, or in a cache where that cannot be written."""

import os
from pathlib import Path

from infobatch_stream._urls import AnyPath
from infobatch_stream.errors import ConfigError
from infobatch_stream.formats.tar_index import TarIndex, refuse_unreadable
from infobatch_stream.sources.remote.shard_cache import ShardCache

__all__ = ["is_fresh", "load_index"]


def load_index(
    path: AnyPath, cache_dir: AnyPath | None = None, rebuild: bool = False, *, checksum: bool = False
) -> TarIndex:
    """The index of the local tar ``path``: the kept one if it is fresh, else built and kept.

    It is kept beside the shard or, where that cannot be written, in ``cache_dir`` (default: infobatch-stream
    in $XDG_CACHE_HOME or ~/.cache). ``rebuild`` builds it in any case. With ``checksum`` it has one, for those who
    will read the shard from elsewhere; that reads all of the tar. Many processes may call this at once.

    Raises DataError as `TarIndex.build` does, and ConfigError when the index can be kept in neither place.
    """
    path = os.fspath(path)
    places = _places(path, cache_dir)
    kept = None if rebuild else _kept(path, places)
    if kept is not None and (kept.checksum is not None or not checksum):
        return kept
    index = TarIndex.build(path, checksum=checksum)
    failures = []
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            index.save(place)
        except OSError as error:
            failures.append(f"{place} ({error.strerror})")
        else:
            return index
    raise ConfigError(
        f"The index of {path} could not be kept: tried {' and '.join(failures)}. "
        "Make one of these folders writable, or name a writable folder with cache_dir=."
    )


def is_fresh(path: AnyPath, cache_dir: AnyPath | None = None) -> bool:
    """Whether `load_index` would find a kept index that it can use. Raises DataError for a missing shard."""
    return _kept(os.fspath(path), _places(os.fspath(path), cache_dir)) is not None


def _kept(path: str, places: list[Path]) -> TarIndex | None:
    try:
        stat = Path(path).stat()
    except OSError as error:
        refuse_unreadable(path, error)
    found = (TarIndex.read(place, stat.st_size, stat.st_mtime_ns) for place in places)
    return next((index for index in found if index is not None), None)


def _places(path: str, cache_dir: AnyPath | None) -> list[Path]:
    """Where the index of ``path`` may lie, in the order of preference."""
    shard = Path(path).absolute()
    return [shard.with_name(f"{shard.name}.index.npz"), ShardCache(cache_dir).place(str(shard), ".index.npz")]
