"""The index.json of a StreamingDataset's streams: that here, and that at a remote that is a folder."""

from pathlib import Path
from shlex import join
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from infobatch_stream.errors import DataError

if TYPE_CHECKING:
    from streaming import Stream, StreamingDataset

__all__ = ["Indexes", "checksum_of", "local_dir", "is_same_index", "is_url", "shards_of", "stamp_of"]

_QUICK_HASHES = ("xxh3_64", "xxh3_128", "xxh64", "xxh128", "xxh32", "blake2b", "sha1", "md5")  # in this order


def local_dir(stream: "Stream") -> Path:
    """Where the shards of ``stream`` lie on this machine."""
    return Path(stream.local, stream.split)


def is_url(remote: str) -> bool:
    """Whether ``remote`` is no folder of this machine."""
    return bool(urlparse(remote).scheme)  # as streaming tells them apart


def shards_of(dataset: "StreamingDataset") -> list[list[Any]]:
    """The shards of each stream."""
    begins, counts = dataset.shard_offset_per_stream.tolist(), dataset.shards_per_stream.tolist()
    return [dataset.shards[begin : begin + count] for begin, count in zip(begins, counts, strict=True)]


def checksum_of(shards: list[Any]) -> str | None:
    """The quickest checksum that ``index.json`` has for all that is downloaded; None if there is none."""
    from streaming.base.hashing import is_hash

    downloaded = [packed or raw for shard in shards for raw, packed in shard.file_pairs]
    common = set.intersection(*(set(file.hashes) for file in downloaded))
    names = [*(name for name in _QUICK_HASHES if name in common), *sorted(common)]
    return next((name for name in names if is_hash(name)), None)


def is_same_index(stream: "Stream") -> bool:
    """Whether the remote of ``stream``, a folder, has the index.json that is here."""
    try:
        return _there(stream).read_bytes() == _here(stream).read_bytes()
    except OSError:
        return False


def stamp_of(path: Path) -> tuple[int, int] | None:
    """Size and modification time of a file; None if there is none (as of a URL)."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


class Indexes:
    """Whether the remotes that are folders still have the data of which the index is here.

    Shards that were written anew may have the names and sizes of those that are here. Where the index has no checksums
    it is the same too; then the time of the one there tells: it is not later than that of the copy, and stays.
    fetchable: per stream, whether what it has here is a copy.
    """

    def __init__(self, dataset: "StreamingDataset", fetchable: list[bool]) -> None:
        self._streams = dataset.streams
        self._are_folders = [
            fetches and not is_url(str(stream.remote))
            for fetches, stream in zip(fetchable, dataset.streams, strict=True)
        ]
        self._have_checksums = [
            is_folder and checksum_of(shards) is not None
            for is_folder, shards in zip(self._are_folders, shards_of(dataset), strict=True)
        ]
        self._seen: dict[int, tuple[int, int]] = {}  # stamps of those that were found to be right, by stream

    def check(self, number: int, came: bool = False) -> None:
        """Raise DataError if the remote of a stream is not what it was. One that is gone is so only if a shard came."""
        if not self._are_folders[number]:
            return
        stream, seen = self._streams[number], self._seen.get(number)
        found = stamp_of(_there(stream))
        if found == seen or (found is None and not came):
            return
        is_same = is_same_index(stream)
        if found and is_same and (self._have_checksums[number] or (not seen and not _is_later(stream))):
            self._seen[number] = found
            return
        remedy = f"End this run, remove the folder {local_dir(stream)}, and begin with a new score store."
        if is_same:
            touch = join(["touch", "-r", str(_there(stream)), str(_here(stream))])
            remedy += (
                f" Or, if its samples are the same as before (it was copied anew, or touched), end it, call: {touch}"
            )
        raise DataError(
            f"{_there(stream)} {'changed' if found else 'is gone'} after {_here(stream)} was copied from it: the "
            f"remote was written anew, and its shards do not belong to those that are here. {remedy}"
        )


def _here(stream: "Stream") -> Path:
    return local_dir(stream) / "index.json"


def _there(stream: "Stream") -> Path:
    return Path(stream.remote or "", stream.split, "index.json")


def _is_later(stream: "Stream") -> bool:
    """Whether the remote's index.json was written after it was copied."""
    there, here = stamp_of(_there(stream)), stamp_of(_here(stream))
    return there is not None and here is not None and there[1] > here[1]
