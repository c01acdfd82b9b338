"""The index of one tar shard: where the bytes of each sample are, found by reading headers only.

On disk it is an .npz, `<shard>.index.npz` (format version 2), of one-dimensional, little-endian, uncompressed
arrays. For n samples, m members and e different extensions:

    header           int64[6]    format version, shard size in bytes, shard mtime in ns, n, m, CRC-32 of the whole
                                 shard or -1 if only its headers were read; the mtime is ignored for a remote shard
    sample_bounds    int64[n+1]  sample r has the members sample_bounds[r]:sample_bounds[r+1]
    offset, length   int64[m]    where a member's payload lies in the shard, in bytes; ascending
    extension        int32[m]    the member's row in the table of extensions
    key_bounds       int64[n+1]  key r is key_text[key_bounds[r]:key_bounds[r+1]]
    key_text         uint8[]     UTF-8; other bytes are kept as they are in the tar (surrogateescape)
    extension_bounds, extension_text: likewise int64[e+1] and uint8[], for the table of extensions
    probe            uint32[1]   checksum of parts of some samples, since shards may only differ in content
"""

import errno
import os
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from io import BufferedReader, BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from infobatch_stream._files import replacing
from infobatch_stream._urls import AnyPath
from infobatch_stream.errors import DataError, MissingExtraError
from infobatch_stream.formats.npz import read_npz
from infobatch_stream.formats.tar_checksum import checksum_of, probe_of
from infobatch_stream.formats.tar_grouping import Payload, read_fields, split_name
from infobatch_stream.formats.tar_headers import HEADER

__all__ = ["TarIndex", "refuse_unreadable"]

_FORMAT_VERSION = 2
_DTYPES = {
    "header": "<i8",
    "sample_bounds": "<i8",
    "offset": "<i8",
    "length": "<i8",
    "extension": "<i4",
    "key_bounds": "<i8",
    "key_text": "|u1",
    "extension_bounds": "<i8",
    "extension_text": "|u1",
    "probe": "<u4",
}
_SHOWN = 400  # characters of an error of webdataset, which lists all members of the sample
_LARGEST = 2**30  # bytes of the index of a shard of unknown size
_UNKNOWN = -1  # instead of a checksum


@dataclass(frozen=True, eq=False)
class TarIndex:
    """The samples of one uncompressed tar, rows 0..n-1, grouped exactly as webdataset groups them.

    The arrays are those of the file format (see the module's docstring).
    """

    header: NDArray[np.int64]
    sample_bounds: NDArray[np.int64]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    extension: NDArray[np.int32]
    key_bounds: NDArray[np.int64]
    key_text: NDArray[np.uint8]
    extension_bounds: NDArray[np.int64]
    extension_text: NDArray[np.uint8]
    probe: NDArray[np.uint32]

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.sample_bounds) - 1

    @cached_property
    def stamp(self) -> tuple[int, int]:
        """Size in bytes and mtime in nanoseconds of the shard as it was indexed."""
        return int(self.header[1]), int(self.header[2])

    @property
    def checksum(self) -> int | None:
        """CRC-32 of the whole shard, if it was read."""
        found = int(self.header[5])
        return None if found == _UNKNOWN else found

    @cached_property
    def extensions(self) -> list[str]:
        """The table of extensions, in lower case."""
        text = self.extension_text.tobytes()
        return [text[a:b].decode("utf-8", "surrogateescape") for a, b in pairwise(self.extension_bounds.tolist())]

    @cached_property
    def _views(self) -> tuple[memoryview, ...]:
        """The arrays that samples are looked up in; a single number of a view takes a fraction of NumPy's time."""
        arrays = (self.key_bounds, self.key_text, self.sample_bounds, self.extension, self.offset, self.length)
        return tuple(array.data for array in arrays)

    def key(self, row: int) -> str:
        """The sample's `__key__`: the path of its members up to the first dot of the basename."""
        bounds, text, *_ = self._views
        return str(text[bounds[row] : bounds[row + 1]], "utf-8", "surrogateescape")

    def keys(self, rows: NDArray[np.int64]) -> list[str]:
        """`key` of each of ``rows``."""
        text = self._views[1]
        bounds = zip(self.key_bounds[rows].tolist(), self.key_bounds[rows + 1].tolist(), strict=True)
        return [str(text[start:end], "utf-8", "surrogateescape") for start, end in bounds]

    def members(self, row: int) -> list[tuple[str, int, int]]:
        """The sample's fields in tar order: extension, offset and length of the payload in bytes."""
        _, _, bounds, codes, offset, length = self._views
        names = self.extensions
        return [(names[codes[m]], offset[m], length[m]) for m in range(bounds[row], bounds[row + 1])]

    def spans(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64[k]: bytes from the first member of each of ``rows`` to the end of its last; 0 without members."""
        first, end = self.sample_bounds[rows], self.sample_bounds[rows + 1]
        sizes = np.zeros(len(rows), np.int64)
        some = first < end
        sizes[some] = self.offset[end[some] - 1] + self.length[end[some] - 1] - self.offset[first[some]]
        return sizes

    @cached_property
    def extremes(self) -> tuple[int, int]:
        """The least and the greatest of all `spans`."""
        spans = self.spans(np.arange(len(self)))
        return (int(spans.min()), int(spans.max())) if spans.size else (0, 0)

    @classmethod
    def build(cls, path: str, name: str | None = None, *, checksum: bool = False) -> "TarIndex":
        """Index the tar at ``path`` by reading its headers; with ``checksum``, the whole file.

        name: the name of the tar in errors, and the url that webdataset sees; default: ``path``.

        Raises DataError for a file that is missing, compressed, truncated, damaged or no tar, and for what
        webdataset refuses too: two members of one sample with the same extension.
        """
        try:
            from webdataset.tariterators import group_by_keys
        except ImportError as error:
            raise MissingExtraError.of("webdataset", "wds") from error
        name = name or path
        bounds, offset, length, codes = array("q", [0]), array("q"), array("q"), array("i")
        keys: list[str] = []
        table: dict[str, int] = {}
        try:
            with _open_regular(path) as file:
                before = os.fstat(file.fileno())
                for sample in group_by_keys(read_fields(file, name, before.st_size), keys=split_name):
                    for extension, payload in sample.items():
                        if isinstance(payload, Payload):
                            offset.append(payload.offset)
                            length.append(payload.length)
                            codes.append(table.setdefault(extension, len(table)))
                    bounds.append(len(offset))
                    keys.append(sample["__key__"])
                probe = probe_of(file, bounds, offset, length)
                whole = checksum_of(file) if checksum else _UNKNOWN
                after = os.fstat(file.fileno())
        except OSError as error:
            refuse_unreadable(name, error)
        except ValueError as error:
            raise DataError(
                f"{name}: {error.args[0][:_SHOWN]}. Within one sample each extension may occur once (webdataset "
                "refuses this shard too); rename the member, or write the shard again."
            ) from error
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise DataError(f"{name} changed while it was being indexed; try again when it is complete.")
        header = [_FORMAT_VERSION, before.st_size, before.st_mtime_ns, len(keys), len(offset), whole]
        parts = (header, bounds, offset, length, codes, *_pack(keys), *_pack(table), [probe])
        return cls(*(np.asarray(part, dtype) for part, dtype in zip(parts, _DTYPES.values(), strict=True)))

    def differs_from(self, path: Path) -> str:
        """How the file at ``path``, whose size is right, differs from this shard; "" if no difference is found."""
        with path.open("rb") as file:
            if self.checksum is not None:
                what, found, expected = "CRC-32", checksum_of(file), self.checksum
            else:
                what, expected = "probe", int(self.probe[0])
                found = probe_of(file, self.sample_bounds, self.offset, self.length)
        return "" if found == expected else f"its {what} is {found:08x}, that of its index {expected:08x}"

    def has_members_of(self, path: str) -> bool:
        """Whether the members of the tar at ``path`` are where this index says. Reads all its headers."""
        found = TarIndex.build(path)
        return np.array_equal(found.offset, self.offset) and np.array_equal(found.length, self.length)

    def save(self, place: Path) -> None:
        """Write the index to ``place`` atomically. Raises OSError."""
        stream = BytesIO()  # not to the file: on a full disk, zipfile would write again when it is garbage-collected
        np.savez(stream, **{name: getattr(self, name) for name in _DTYPES})
        with replacing(place) as new:  # not durable: `read` recognizes an index that is torn by a crash
            new.write_bytes(stream.getbuffer())

    @classmethod
    def read(cls, place: Path, size: int | None = None, mtime_ns: int | None = None) -> "TarIndex | None":
        """The index at ``place``; None if there is none, or it is stale, damaged or of another shard.

        size, mtime_ns: of the shard, bytes and nanoseconds; None if they are unknown, as for a remote shard.
        """
        try:
            with _open_regular(place) as file:
                # A member takes 512 bytes in the tar and less in the index, so a much larger file is no index of it.
                limit = _LARGEST if size is None else 2 * size + 2**16
                index = cls(**read_npz(file, _DTYPES, limit))
            size, mtime_ns = (int(index.header[n]) if v is None else v for n, v in ((1, size), (2, mtime_ns)))
            return index if index._is_sound(size, mtime_ns) else None
        except Exception:
            # zipfile raises nearly anything on damaged input; the index is then built again.
            return None

    def _is_sound(self, size: int, mtime_ns: int) -> bool:
        """Whether the index is of this shard, and all arrays have the right type and valid values."""
        members, offset, length, codes = self.offset.size, self.offset, self.length, self.extension
        return (
            all((a := getattr(self, name)).ndim == 1 and a.dtype == dtype for name, dtype in _DTYPES.items())
            and self.header.tolist()[:-1] == [_FORMAT_VERSION, size, mtime_ns, len(self), members]
            and _UNKNOWN <= self.header[-1] < 2**32
            and members == len(length) == len(codes)
            and len(self.probe) == 1
            and len(self.key_bounds) == len(self.sample_bounds)
            and _is_partition(self.sample_bounds, members)
            and _is_partition(self.key_bounds, len(self.key_text))
            and _is_partition(self.extension_bounds, len(self.extension_text))
            and len(self.extension_bounds) <= members + 1
            and bool(np.all((length >= 0) & (length <= size) & (offset >= 0) & (offset <= size - length)))
            and bool(np.all((offset >= HEADER) & (offset % HEADER == 0)))
            and bool(np.all(offset[1:] >= offset[:-1] + length[:-1] + HEADER))
            and bool(np.all((codes >= 0) & (codes < len(self.extension_bounds) - 1)))
        )


def _pack(texts: Iterable[str]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Bounds int64[n+1] and uint8 blob of ``texts``."""
    encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
    return np.cumsum([0, *map(len, encoded)]), np.frombuffer(b"".join(encoded), np.uint8)


def _is_partition(bounds: NDArray[Any], total: int) -> bool:
    return bool(len(bounds) and bounds[0] == 0 and bounds[-1] == total and np.all(bounds[1:] >= bounds[:-1]))


def _open_regular(path: AnyPath) -> BufferedReader:
    if Path(path).is_fifo():
        raise OSError(errno.EINVAL, "it is a pipe")  # opening one would wait for a writer
    return Path(path).open("rb")


def refuse_unreadable(path: str, error: OSError) -> NoReturn:
    """Raise DataError for a shard that cannot be opened."""
    raise DataError(f"Shard {path} cannot be read ({error.strerror}); check the path, or copy it there.") from error
