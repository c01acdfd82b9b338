"""Writers of shards, MDS and WebDataset tars, that take the same samples."""

import io
import json
import math
import tarfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.errors import ConfigError, MissingExtraError
from infobatch_stream.formats.mds_encodings import save_npy
from infobatch_stream.formats.schema import KEY, MEMBERS, Column, Encoded, EncodedImage, Sample
from infobatch_stream.formats.tar_names import check_names, why_twice

__all__ = [
    "MdsShardWriter",
    "ShardFormat",
    "ShardWriter",
    "TooLargeError",
    "TarShardWriter",
    "WrittenShard",
    "room_for_samples",
    "stored_sizes",
]

_TAR_BLOCK, _TAR_RECORD = 512, 10240
_MDS_HEAD = 1024  # of a shard with a few columns
_LONG_NAME = 4 * _TAR_BLOCK  # what a name takes that does not fit a header


class ShardFormat(StrEnum):
    """The two formats of shards."""

    MDS = "mds"
    WDS = "wds"


@dataclass(frozen=True)
class WrittenShard:
    """A complete shard. file: its name in the writer's folder. entry: what an MDS index.json says of it."""

    file: str
    samples: int
    bytes: int
    entry: dict[str, Any] | None = None


class TooLargeError(ConfigError):
    """The sample at ``place`` needs a shard of ``size`` bytes, and ``limit`` are allowed."""

    def __init__(self, size: int, limit: int, place: str = "the sample") -> None:
        super().__init__(size, limit, place)
        self.size, self.limit, self.place = size, limit, place

    def __str__(self) -> str:
        """For the user."""
        return (
            f"{self.place} needs a shard of {self.size:,} bytes, {self.limit:,} are allowed; allow more (--shard-size)."
        )


class ShardWriter(Protocol):
    """A writer of one format, into a folder that is there and empty; ``finished``: its shards that are complete.

    ``write`` raises TooLargeError for a sample larger than a shard, and ValueError, TypeError, AttributeError,
    KeyError or OverflowError for one that does not fit the columns: such a sample may be left out, and others follow.
    Both and ``close`` raise OSError.
    """

    finished: list[WrittenShard]

    def write(self, sample: Sample) -> None:
        """Add one sample, whose keys are those of the columns."""

    def close(self) -> None:
        """Complete the last shard."""

    def abort(self) -> None:
        """Let go of files and threads without completing anything; never raises."""


def stored_sizes(format: ShardFormat, payload: NDArray[np.int64], fields: int) -> NDArray[np.int64]:
    """int64[n]: the most bytes that samples of ``payload`` bytes in ``fields`` fields take in a shard."""
    if format is ShardFormat.MDS:
        return payload + 4 * (fields + 1)
    return payload + fields * (2 * _TAR_BLOCK - 1)


def room_for_samples(format: ShardFormat, shard_bytes: int) -> int:
    """Bytes of a shard that are there for samples."""
    if format is ShardFormat.MDS:
        return shard_bytes - _MDS_HEAD
    return shard_bytes // _TAR_RECORD * _TAR_RECORD - 2 * _TAR_BLOCK


class MdsShardWriter(ShardWriter):
    """MDS shards by mosaicml-streaming's own writer, which keeps a shard in memory until it is full."""

    def __init__(
        self,
        folder: Path,
        columns: Mapping[str, Column],
        shard_bytes: int,
        compression: str | None = None,
        hashes: Sequence[str] = ("xxh64",),
    ) -> None:
        """Raises MissingExtraError, and ConfigError for an encoding unknown to MDS or an import that fails."""
        encodings = {name: column.mds for name, column in columns.items()}
        try:
            # One thread: it only uploads, and here there is nowhere to upload to.
            self._writer = _mds_writer(shard_bytes)(
                columns=encodings, out=str(folder), size_limit=shard_bytes, max_workers=1,
                compression=compression, hashes=sorted(hashes),
            )  # fmt: skip
        except (TypeError, ValueError, KeyError, AssertionError) as error:
            chosen = f"compression {compression}, hashes {sorted(hashes)}, columns {encodings}"
            raise ConfigError(f"MDS shards cannot be written with {chosen}: {error}") from error
        self.finished: list[WrittenShard] = []

    def write(self, sample: Sample) -> None:
        """See `ShardWriter`."""
        self._writer.write(sample)
        self._collect()

    def close(self) -> None:
        """See `ShardWriter`."""
        self._writer.finish()
        self._collect()

    def abort(self) -> None:
        """See `ShardWriter`."""
        # Not finish(), which would write what it holds, and may wait for its thread.
        self._writer.cancel_future_jobs()

    def _collect(self) -> None:
        for entry in self._writer.shards[len(self.finished) :]:
            file = entry["zip_data"] or entry["raw_data"]
            self.finished.append(WrittenShard(file["basename"], entry["samples"], file["bytes"], entry))


def _mds_writer(shard_bytes: int) -> Any:
    """Streaming's writer, in a form that takes what is encoded already, too."""
    try:
        from streaming import MDSWriter
        from streaming.base.format.mds.encodings import mds_encode
    except ImportError as error:
        raise MissingExtraError.of("mosaicml-streaming", "mds") from error
    except RuntimeError as error:  # e.g. "operator torchvision::nms does not exist"
        raise ConfigError(
            f"mosaicml-streaming could not be imported ({error}). It imports torchvision, which fits one build "
            "of torch only: install the two together, from the same index."
        ) from error

    class Writer(MDSWriter):
        def encode_sample(self, sample: Sample) -> bytes:
            sizes, data = [], []
            for name, encoding, size in zip(self.column_names, self.column_encodings, self.column_sizes, strict=True):
                value = sample[name]
                datum = value.data if isinstance(value, Encoded) else mds_encode(encoding, _mds_value(value))
                if size is None:
                    sizes.append(len(datum))
                elif size != len(datum):
                    raise ValueError(f"{name} has {len(datum):,} bytes, and not {size:,} as {encoding} does")
                data.append(datum)
            encoded = np.array(sizes, np.uint32).tobytes() + b"".join(data)
            alone = self.extra_bytes_per_shard + self.extra_bytes_per_sample + len(encoded)
            if alone > shard_bytes:  # it would get a shard of its own, behind an empty one
                raise TooLargeError(alone, shard_bytes)
            return encoded

    return Writer


class TarShardWriter(ShardWriter):
    """Tars, cut by the size of the file. Members are in the order of the fields, with fixed times.

    Not by webdataset's ShardWriter, which sorts the members of a sample: so they could not come back as they were.
    """

    def __init__(self, folder: Path, columns: Mapping[str, Column], shard_bytes: int, first: int = 0) -> None:
        """``first``: the number of the first sample, for the names of those that have no key."""
        self._folder, self._columns, self._limit = folder, columns, shard_bytes
        self._tar: tarfile.TarFile | None = None
        self._file: IO[bytes] | None = None
        self._number, self._key = first, ""
        self._samples = self._size = 0
        self.finished: list[WrittenShard] = []

    def write(self, sample: Sample) -> None:
        """See `ShardWriter`."""
        members = self._members(sample)
        key = check_names(sample.get(KEY, f"{self._number:09d}"), members, foreign=KEY in sample)
        size = sum(_member_bytes(f"{key}.{extension}", len(data)) for extension, data in members.items())
        if _tar_bytes(size) > self._limit:
            raise TooLargeError(_tar_bytes(size), self._limit)
        # Two samples of one key, one behind the other, would be read as one.
        if self._tar is None or _tar_bytes(self._size + size) > self._limit or key == self._key:
            self.close()
            self._file = (self._folder / f"{len(self.finished):06d}.tar").open("wb")
            self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT)
        for extension, data in members.items():
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size, info.mode = len(data), 0o444
            self._tar.addfile(info, io.BytesIO(data))
        self._key = key
        self._number += 1
        self._samples += 1
        self._size = self._tar.offset

    def close(self) -> None:
        """See `ShardWriter`."""
        if self._tar is None or self._file is None:
            return
        self._tar.close()
        self._file.close()
        path = Path(self._file.name)
        self.finished.append(WrittenShard(path.name, self._samples, path.stat().st_size))
        self._tar = self._file = None
        self._samples = self._size = 0

    def abort(self) -> None:
        """See `ShardWriter`."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()

    def _members(self, sample: Sample) -> dict[str, bytes]:
        """Extension -> content, in the order of the members."""
        members: dict[str, bytes] = {}
        owners: dict[str, str] = {}
        for name, value in sample.items():
            if name in (KEY, MEMBERS):
                continue
            if isinstance(value, float | np.floating) and not self._columns[name].mds.startswith("float"):
                raise TypeError(f"{name} is {value}, and its column is one of {self._columns[name].mds}")
            extension = value.extension if isinstance(value, EncodedImage) else self._columns[name].wds
            if extension in members:
                if MEMBERS in sample and isinstance(value, Encoded) and not value.data:
                    continue
                raise ValueError(why_twice(owners[extension], name, extension, self._columns))
            members[extension], owners[extension] = _wds_bytes(value), name
        if MEMBERS in sample:
            members = {extension: members[extension] for extension in json.loads(sample[MEMBERS])}
        return members


def _member_bytes(name: str, size: int) -> int:
    """The most bytes that a member takes in a tar."""
    long = 0 if len(name) <= tarfile.LENGTH_NAME and name.isascii() else _LONG_NAME + len(name.encode(errors="replace"))
    return _TAR_BLOCK + math.ceil(long / _TAR_BLOCK) * _TAR_BLOCK + math.ceil(size / _TAR_BLOCK) * _TAR_BLOCK


def _tar_bytes(content: int) -> int:
    """Size of a tar with ``content`` bytes of members: two blocks of zeros end it, and it fills its records."""
    return math.ceil((content + 2 * _TAR_BLOCK) / _TAR_RECORD) * _TAR_RECORD


def _mds_value(value: Any) -> Any:
    """``value`` in the type that MDS encodes."""
    if isinstance(value, np.ndarray):  # its bytes are stored as they lie, in C order already
        return value.astype(value.dtype.newbyteorder("="), copy=False)
    return int(value) if isinstance(value, np.integer) else value


def _wds_bytes(value: Any) -> bytes:
    """``value`` as the content of a tar member."""
    match value:
        case Encoded():
            return value.data
        case bytes():
            return value
        case np.ndarray():
            return save_npy(value)
        case str():
            text = value
        case int() | np.integer():
            text = str(int(value))
        case float() | np.floating():
            text = repr(float(value))
        case dict() | list():
            text = json.dumps(value)
        case _:
            raise TypeError(f"a {type(value).__name__} has no form in a tar")
    return text.encode()
