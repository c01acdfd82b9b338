"""Writers of shards, MDS and WebDataset tars, that take the same samples."""

import io
import math
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from infobatch_stream.errors import ConfigError, MissingExtraError

from .samples import Column, EncodedImage, Sample

__all__ = ["MdsShards", "ShardFormat", "Shards", "WdsShards"]

_TAR_BLOCK, _TAR_RECORD = 512, 10240
_EXTENSION = re.compile(r"\w+([.-]\w+)*")


class ShardFormat(StrEnum):
    """The two formats of shards."""

    MDS = "mds"
    WDS = "wds"


class Shards(Protocol):
    """A writer of one format, into a folder that is there and empty.

    ``write`` raises ConfigError for a sample larger than a shard, and ValueError, TypeError, AttributeError,
    KeyError or OverflowError for one that does not fit the columns; both and ``close`` raise OSError.
    """

    def write(self, sample: Sample) -> None:
        """Add one sample, whose keys are those of the columns."""

    def close(self) -> None:
        """Complete the last shard."""

    def abort(self) -> None:
        """Let go of files and threads without completing anything; never raises."""


def _too_large(size: int, limit: int) -> ConfigError:
    return ConfigError(f"needs a shard of {size:,} bytes, {limit:,} are allowed; allow more (--shard-size).")


class MdsShards:
    """MDS shards by mosaicml-streaming's own writer, which keeps a shard in memory until it is full."""

    def __init__(self, folder: Path, columns: Mapping[str, Column], shard_bytes: int) -> None:
        """Raises MissingExtraError, and ConfigError for an encoding unknown to MDS or an import that fails."""
        try:
            from streaming import MDSWriter
        except ImportError as error:
            raise MissingExtraError.of("mosaicml-streaming", "mds") from error
        except RuntimeError as error:  # e.g. "operator torchvision::nms does not exist"
            raise ConfigError(
                f"mosaicml-streaming could not be imported ({error}). It imports torchvision, which fits one build "
                "of torch only: install the two together, from the same index."
            ) from error
        encodings = {name: column.mds for name, column in columns.items()}
        try:
            # One thread: it only uploads, and here there is nowhere to upload to.
            self._writer = MDSWriter(
                columns=encodings, out=str(folder), size_limit=shard_bytes, max_workers=1, hashes=["xxh64"]
            )
        except (TypeError, ValueError, KeyError, AssertionError) as error:
            raise ConfigError(f"MDS cannot store the columns {encodings}: {error}") from error
        self._limit = shard_bytes

    def write(self, sample: Sample) -> None:
        """See `Shards`."""
        self._writer.write({name: _mds_value(value) for name, value in sample.items()})
        # The writer gives such a sample a shard of its own, behind an empty one.
        if self._writer.new_shard_size > self._limit:
            raise _too_large(self._writer.new_shard_size, self._limit)

    def close(self) -> None:
        """See `Shards`."""
        self._writer.finish()

    def abort(self) -> None:
        """See `Shards`."""
        # Not finish(), which would write what it holds, and may wait for its thread.
        self._writer.cancel_future_jobs()


class WdsShards:
    """Tars by webdataset's own ShardWriter, with fixed times, cut by the size of the file."""

    def __init__(self, folder: Path, columns: Mapping[str, Column], shard_bytes: int) -> None:
        """Raises MissingExtraError."""
        try:
            from webdataset.writer import ShardWriter
        except ImportError as error:
            raise MissingExtraError.of("webdataset", "wds") from error
        self._folder, self._columns, self._limit = folder, columns, shard_bytes
        self._file: IO[bytes] | None = None
        self._count = self._size = 0
        # The opener keeps paths from webdataset's own, which formats them and looks for schemes and pipes.
        self._writer = ShardWriter(
            "shard-%06d.tar", maxcount=sys.maxsize, maxsize=math.inf, verbose=0,
            opener=self._open, post=self._shut, encoder=False, compress=False, mtime=0,
        )  # fmt: skip

    def write(self, sample: Sample) -> None:
        """See `Shards`."""
        members: dict[str, bytes] = {}
        for name, value in sample.items():
            extension = value.extension if isinstance(value, EncodedImage) else self._columns[name].wds
            if not _EXTENSION.fullmatch(extension):  # part of a file's name, for those who unpack the tar
                raise ValueError(f"{extension!r} is no extension; letters, digits, and dots or dashes between them are")
            if extension in members:
                raise ValueError(f"two columns have the extension {extension!r}; give columns= with different ones")
            members[extension] = _wds_bytes(value)
        size = sum(_TAR_BLOCK + math.ceil(len(data) / _TAR_BLOCK) * _TAR_BLOCK for data in members.values())
        if _tar_bytes(size) > self._limit:
            raise _too_large(_tar_bytes(size), self._limit)
        if _tar_bytes(self._size + size) > self._limit:
            self._writer.next_stream()
            self._size = 0
        self._writer.write({"__key__": f"{self._count:09d}", **members})
        self._count += 1
        self._size += size

    def close(self) -> None:
        """See `Shards`."""
        self._writer.close()

    def abort(self) -> None:
        """See `Shards`."""
        with suppress(Exception):  # the file may be what failed
            self._writer.close()
        if self._file is not None:
            with suppress(OSError):
                self._file.close()

    def _open(self, name: str) -> IO[bytes]:
        self._file = (self._folder / name).open("wb")
        return self._file

    def _shut(self, name: str) -> None:
        assert self._file is not None, name
        self._file.close()


def _tar_bytes(content: int) -> int:
    """Size of a tar with ``content`` bytes of members: two blocks of zeros end it, and it fills its records."""
    return math.ceil((content + 2 * _TAR_BLOCK) / _TAR_RECORD) * _TAR_RECORD


def _mds_value(value: Any) -> Any:
    """``value`` in the type that MDS encodes."""
    match value:
        case EncodedImage():
            return value.data
        case np.ndarray():  # its bytes are stored as they lie, in C order already
            return value.astype(value.dtype.newbyteorder("="), copy=False)
        case np.integer():
            return int(value)
    return value


def _wds_bytes(value: Any) -> bytes:
    """``value`` as the content of a tar member."""
    match value:
        case EncodedImage():
            return value.data
        case bytes():
            return value
        case np.ndarray():
            stream = io.BytesIO()
            np.save(stream, value, allow_pickle=False)
            return stream.getvalue()
        case str():
            return value.encode()
        case int() | np.integer():
            return str(int(value)).encode()
    raise TypeError(f"a {type(value).__name__} has no form in a tar")
