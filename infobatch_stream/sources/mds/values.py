"""The values of samples of MDS shards, as bytes, without a StreamingDataset.

A StreamingDataset makes shared memory and locks, and decodes what it reads.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Final, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.errors import DataError, MissingExtraError
from infobatch_stream.formats.mds_index import IndexedShard
from infobatch_stream.formats.mds_samples import BOUNDS, Frame, bounds_at
from infobatch_stream.sources.per_process import PerProcess
from infobatch_stream.sources.shard_file import MOST_OPEN, ShardFile

__all__ = ["AGAIN", "LocalShard", "MdsValues"]

AGAIN: Final = "fetch or write it again"
_UNPACKED: Final = 2  # compressed shards that a process keeps unpacked: they are read one after the other


@dataclass(frozen=True)
class LocalShard:
    """The file of a shard on this machine. compression: how it is compressed, or None; size: its bytes if it is not."""

    path: str
    stamp: tuple[int, int]
    compression: str | None
    size: int

    @classmethod
    def find(cls, shard: IndexedShard, folder: Path) -> Self:
        """The plain file in ``folder`` if it is there, else the compressed one. Raises DataError."""
        place = folder
        for file, compression in ((shard.raw, None), (shard.zip, shard.compression)):
            if file is None or not (place := folder / file.name).is_file():
                continue
            stat = place.stat()
            if stat.st_size != file.size:
                raise DataError(
                    f"Shard {place} has {stat.st_size:,} bytes, its index.json says {file.size!r}: it is truncated or "
                    "of another dataset. Fetch it again, or convert the data anew."
                )
            return cls(str(place), (stat.st_size, stat.st_mtime_ns), compression, shard.raw.size)
        raise DataError(f"Shard {place} is missing; fetch it, or convert the data anew.")


class LocalShards(Protocol):
    """Where each shard lies; a remote one is downloaded when it is asked for."""

    def __getitem__(self, number: int, /) -> LocalShard:
        """That of a shard. Raises DataError."""


class MdsValues(PerProcess):
    """The values of the samples of shards of equal columns, by position. It can be pickled.

    shards: as index.json lists them. here: where each lies. encodings: of the columns, by name. ends: int per shard,
    the samples up to its end.
    """

    _own = "_file", "_unpacked"

    def __init__(self, shards: Sequence[IndexedShard], here: LocalShards) -> None:
        self.encodings = shards[0].encodings
        self.ends: list[int] = np.cumsum([shard.samples for shard in shards]).tolist()
        self._here = here
        self._frame = Frame(shards[0].sizes)
        self._renew()

    def __len__(self) -> int:
        """Number of samples."""
        return self.ends[-1]

    def __getitem__(self, position: int) -> dict[str, bytes]:
        """The values of a sample by column. Raises DataError for a shard that is damaged, missing or changed."""
        number, row = self._find(position)
        shard = self._here[number]
        begin, end = BOUNDS.unpack(self._read(shard, bounds_at(row), BOUNDS.size))
        if not begin <= end <= shard.size:
            raise DataError(
                f"{self.name(position)} has the bytes {begin:,} to {end:,} of {shard.size:,}; the shard is damaged: "
                f"{AGAIN}."
            )
        data = self._read(shard, begin, end - begin)
        try:
            ends = self._frame.ends(data, 0, len(data))
        except ValueError as error:
            raise DataError(f"{self.name(position)}: {error}; it is damaged: {AGAIN}.") from error
        return {name: data[start:stop] for name, (start, stop) in zip(self.encodings, pairwise(ends), strict=True)}

    def name(self, position: int) -> str:
        """What to call a sample."""
        number, row = self._find(position)
        return f"{self._here[number].path}: sample {row}"

    def sizes(self) -> NDArray[np.int64]:
        """int64[len]: bytes of the values of each sample; from the offsets in the shards."""
        sizes = []
        for number, (first, end) in enumerate(pairwise([0, *self.ends])):
            bounds = np.frombuffer(self._read(self._here[number], 4, 4 * (end - first + 1)), np.uint32)
            found = np.diff(bounds.astype(np.int64)) - self._frame.head
            sizes.append(np.clip(found, 0, self._here[number].size))
        return np.concatenate(sizes)

    def _find(self, position: int) -> tuple[int, int]:
        number = bisect_right(self.ends, position)
        return number, position - (self.ends[number - 1] if number else 0)

    def _read(self, shard: LocalShard, begin: int, length: int) -> bytes:
        """Bytes of a shard, whether that is compressed or not."""
        if shard.compression is None:
            return self._file(shard.path, shard.stamp).read(begin, length)
        return self._unpacked(shard)[begin : begin + length]

    def _renew(self) -> None:
        self._file = lru_cache(MOST_OPEN)(ShardFile)
        self._unpacked = lru_cache(_UNPACKED)(_unpack)


def _unpack(shard: LocalShard) -> bytes:
    try:
        from streaming.base.compression import decompress
    except ImportError as error:
        raise MissingExtraError.of("mosaicml-streaming", "mds") from error
    packed = ShardFile(shard.path, shard.stamp).read(0, shard.stamp[0])
    try:
        data: bytes = decompress(shard.compression, packed)
    except Exception as error:  # each library has errors of its own
        raise DataError(f"Shard {shard.path} cannot be decompressed ({error}); {AGAIN}.") from error
    if len(data) != shard.size:
        raise DataError(f"Shard {shard.path} has {len(data):,} bytes unpacked, and not {shard.size:,}; {AGAIN}.")
    return data
