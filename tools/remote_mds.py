"""MDS shards of elsewhere, without a StreamingDataset: each is brought to the cache when a sample of it is read."""

import json
import shutil
import tempfile
import weakref
from bisect import bisect_right
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Final

from infobatch_stream.errors import DataError
from infobatch_stream.sources.download import NotThereError, download
from infobatch_stream.sources.shard_cache import ShardCache

from .readers.columns import read_beside, read_classes
from .readers.mds import MdsSet
from .samples import Column, Sample

__all__ = ["RemoteMds", "fetch_index"]

_LARGEST: Final = 1 << 30  # bytes of an index.json
_OPEN: Final = 64  # shards that are kept open


def fetch_index(url: str) -> Any:
    """The index.json of the folder ``url``; None where there is none, or none of MDS. Raises DataError."""

    def need(size: int) -> None:
        if size > _LARGEST:
            raise DataError(f"{url}/index.json has over {_LARGEST:,} bytes; fetch or write it again.")

    with tempfile.TemporaryDirectory(prefix="infobatch-index-") as folder:
        place = Path(folder, "index.json")
        try:
            download(f"{url}/index.json", place, need=need)
            told = json.loads(place.read_bytes())
        except (NotThereError, ValueError, RecursionError):  # some web servers have a page for what is not there
            return None
    return told if isinstance(told, dict) and isinstance(told.get("shards"), list) else None


class RemoteMds:
    """The samples of the MDS shards at ``url``, which has the index.json ``told``, by position. Raises DataError.

    columns: how each is stored; of the names in tars nothing is known. classes: their names, or None.
    """

    def __init__(self, url: str, told: dict[str, Any], cache: ShardCache) -> None:
        self._url, self._cache, self._entries = url, cache, told["shards"]
        self.classes = read_classes([url])
        self._beside = read_beside([url], "columns.json")
        try:
            found = [dict(zip(one["column_names"], one["column_encodings"], strict=True)) for one in self._entries]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{url}/index.json is no index of MDS shards ({error!r}); write it again.") from error
        if any(one != found[0] for one in found):
            raise DataError(f"{url}/index.json has shards of different columns; name the shards of one kind.")
        self.columns = {name: Column(encoding, "") for name, encoding in (found[0] if found else {}).items()}
        self._folder = tempfile.mkdtemp(prefix="infobatch-mds-")
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._ends: list[int] = []
        self._set = lru_cache(_OPEN)(self._open)

    def use(self, ends: list[int]) -> None:
        """``ends``: where each shard ends in the order of the samples."""
        self._ends = ends

    def __getitem__(self, position: int) -> Sample:
        """The sample."""
        shard = bisect_right(self._ends, position)
        return self._set(shard)[position - (self._ends[shard - 1] if shard else 0)]

    def _open(self, shard: int) -> MdsSet:
        """The samples of one shard, from a folder of its own, with an index.json that names nothing else."""
        entry, folder = self._entries[shard], Path(self._folder, str(shard))
        kind = "zip_data" if entry["zip_data"] else "raw_data"
        name, size = entry[kind]["basename"], entry[kind]["bytes"]
        if not isinstance(name, str) or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DataError(f"{self._url}/index.json names the shard {name!r:.200}, which is not in its folder.")
        place = self._cache.bring(f"{self._url}/{name}", size)
        folder.mkdir(exist_ok=True)
        (folder / kind).unlink(missing_ok=True)
        (folder / kind).symlink_to(place)
        own = {**entry, "raw_data": {**entry["raw_data"], "basename": "raw_data"}}
        if entry["zip_data"]:
            own["zip_data"] = {**entry["zip_data"], "basename": "zip_data"}
        (folder / "index.json").write_text(json.dumps({"shards": [own], "version": 2}))
        if self._beside is not None:
            (folder / "columns.json").write_text(json.dumps(self._beside[1]))
        return MdsSet(folder)
