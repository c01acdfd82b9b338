"""The index of one tar shard: which bytes each of its samples is made of, found by reading headers only.

On disk it is an .npz, `<shard>.index.npz` (format version 1), of one-dimensional, little-endian, uncompressed
arrays. For n samples, m members and e different extensions:

    header           int64[5]    format version, shard size in bytes, shard mtime in ns, n, m
    sample_bounds    int64[n+1]  sample r has the members sample_bounds[r]:sample_bounds[r+1]
    offset, length   int64[m]    where a member's payload lies in the shard, in bytes; ascending
    extension        int32[m]    the member's row in the table of extensions
    key_bounds       int64[n+1]  key r is key_text[key_bounds[r]:key_bounds[r+1]]
    key_text         uint8[]     UTF-8; bytes that were no UTF-8 in the tar stay as they are (surrogateescape)
    extension_bounds, extension_text: likewise int64[e+1] and uint8[], for the table of extensions
    probe            uint32[1]   checksum of parts of some samples: tells apart shards that only differ in content
"""

import errno
import hashlib
import os
import re
import secrets
import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from io import BufferedReader
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.errors import ConfigError, DataError, MissingExtraError
from infobatch_stream.sources.npz import read_npz
from infobatch_stream.sources.tar_headers import TarError, read_members

__all__ = ["AnyPath", "TarIndex", "is_fresh", "load_index", "split_name"]

AnyPath = str | os.PathLike[str]

_FORMAT_VERSION = 1
# The default of skip_meta in webdataset.tariterators.tar_file_iterator: members that are in no sample. (Its other
# rule, on names as `__meta__`, skips nothing that could be in one.)
_SKIP_META = re.compile(r"__[^/]*__($|/)")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
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
_PROBED_ROWS, _PROBED_BYTES = 16, 4096  # of a shard; of a member's start


class _Payload(NamedTuple):
    """Stands for a member's bytes while webdataset groups them; like bytes it is false when empty."""

    offset: int
    length: int

    def __bool__(self) -> bool:
        return self.length > 0


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

    def members(self, row: int) -> list[tuple[str, int, int]]:
        """The sample's fields in tar order: extension, offset and length of the payload in bytes."""
        _, _, bounds, codes, offset, length = self._views
        names = self.extensions
        return [(names[codes[m]], offset[m], length[m]) for m in range(bounds[row], bounds[row + 1])]

    @classmethod
    def build(cls, path: str) -> "TarIndex":
        """Index the tar at ``path`` by reading its headers.

        Raises DataError for a file that is missing, compressed, truncated, damaged or no tar, and for what
        webdataset refuses too: two members of one sample with the same extension.
        """
        try:
            from webdataset.tariterators import group_by_keys
        except ImportError as error:
            raise MissingExtraError.of("webdataset", "wds") from error
        bounds, offset, length, codes = array("q", [0]), array("q"), array("q"), array("i")
        keys: list[str] = []
        table: dict[str, int] = {}
        try:
            with _open_regular(path) as file:
                before = os.fstat(file.fileno())
                for sample in group_by_keys(_fields(file, path, before.st_size), keys=split_name):
                    for extension, payload in sample.items():
                        if isinstance(payload, _Payload):
                            offset.append(payload.offset)
                            length.append(payload.length)
                            codes.append(table.setdefault(extension, len(table)))
                    bounds.append(len(offset))
                    keys.append(sample["__key__"])
                probe = _probe(file, bounds, offset, length)
                after = os.fstat(file.fileno())
        except OSError as error:
            _refuse_unreadable(path, error)
        except ValueError as error:
            raise DataError(
                f"{path}: {error.args[0][:_SHOWN]}. Within one sample each extension may occur once (webdataset "
                "refuses this shard too); rename the member, or write the shard again."
            ) from error
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise DataError(f"{path} changed while it was being indexed; try again when it is complete.")
        header = [_FORMAT_VERSION, before.st_size, before.st_mtime_ns, len(keys), len(offset)]
        parts = (header, bounds, offset, length, codes, *_pack(keys), *_pack(table), [probe])
        return cls(*(np.asarray(part, dtype) for part, dtype in zip(parts, _DTYPES.values(), strict=True)))

    def save(self, place: Path) -> None:
        """Write the index to ``place``, whole or not at all. Raises OSError where that cannot be written."""
        # A name of its own for every writer, since ranks build the same index at once. No fsync: a file torn
        # by a crash does not pass the checks of `read` and is built again.
        temporary = place.with_name(f".{secrets.token_hex(8)}.index.tmp")
        try:
            with temporary.open("xb") as file:
                np.savez(file, **{name: getattr(self, name) for name in _DTYPES})
            temporary.replace(place)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def read(cls, place: Path, size: int, mtime_ns: int) -> "TarIndex | None":
        """The index at ``place`` for a shard of ``size`` bytes; None if absent, stale, foreign, damaged."""
        try:
            with _open_regular(place) as file:
                # A member costs 512 bytes in the tar and less here: what is much larger is not its index.
                index = cls(**read_npz(file, _DTYPES, limit=2 * size + 2**16))
            return index if index._is_sound(size, mtime_ns) else None
        except Exception:
            # zipfile raises nearly anything on damaged input; whatever it was, it is built again.
            return None

    def _is_sound(self, size: int, mtime_ns: int) -> bool:
        """Whether the index is of this shard, and every array of its type and within its bounds."""
        members, offset, length, codes = self.offset.size, self.offset, self.length, self.extension
        return (
            all((a := getattr(self, name)).ndim == 1 and a.dtype == dtype for name, dtype in _DTYPES.items())
            and self.header.tolist() == [_FORMAT_VERSION, size, mtime_ns, len(self), members]
            and members == len(length) == len(codes)
            and len(self.probe) == 1
            and len(self.key_bounds) == len(self.sample_bounds)
            and _is_partition(self.sample_bounds, members)
            and _is_partition(self.key_bounds, len(self.key_text))
            and _is_partition(self.extension_bounds, len(self.extension_text))
            and len(self.extension_bounds) <= members + 1
            and bool(np.all((length >= 0) & (length <= size) & (offset >= 0) & (offset <= size - length)))
            and bool(np.all(offset[1:] >= offset[:-1] + length[:-1]))
            and bool(np.all((codes >= 0) & (codes < len(self.extension_bounds) - 1)))
        )


def _probe(file: BufferedReader, bounds: "array[int]", offset: "array[int]", length: "array[int]") -> int:
    """CRC-32 of the beginnings of the members of some rows, evenly spaced."""
    rows, checksum = len(bounds) - 1, 0
    for row in sorted({number * (rows - 1) // (_PROBED_ROWS - 1) for number in range(_PROBED_ROWS)} if rows else ()):
        for member in range(bounds[row], bounds[row + 1]):
            file.seek(offset[member])
            checksum = zlib.crc32(file.read(min(length[member], _PROBED_BYTES)), checksum)
    return checksum


def load_index(path: AnyPath, cache_dir: AnyPath | None = None, rebuild: bool = False) -> TarIndex:
    """The index of the local tar ``path``: the kept one if it is fresh, else built and kept.

    It is kept beside the shard or, where that cannot be written, in ``cache_dir`` (default: infobatch-stream
    in $XDG_CACHE_HOME or ~/.cache). ``rebuild`` builds it in any case. Many processes may call this at once.
    Raises DataError as `TarIndex.build` does, and ConfigError when the index can be kept in neither place.
    """
    path = os.fspath(path)
    places = _places(path, cache_dir)
    if not rebuild and (kept := _kept(path, places)) is not None:
        return kept
    index = TarIndex.build(path)
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
        _refuse_unreadable(path, error)
    found = (TarIndex.read(place, stat.st_size, stat.st_mtime_ns) for place in places)
    return next((index for index in found if index is not None), None)


def _places(path: str, cache_dir: AnyPath | None) -> list[Path]:
    """Where the index of ``path`` may lie, in the order of preference."""
    shard = Path(path).absolute()
    if cache_dir is None:
        cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "infobatch-stream")
    digest = hashlib.sha256(os.fsencode(shard)).hexdigest()[:32]
    return [
        shard.with_name(f"{shard.name}.index.npz"),
        Path(cache_dir, f"{shard.name[:32]}.{digest}.index.npz"),
    ]


def _pack(texts: Iterable[str]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Bounds int64[n+1] and uint8 blob of ``texts``."""
    encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
    return np.cumsum([0, *map(len, encoded)]), np.frombuffer(b"".join(encoded), np.uint8)


def _is_partition(bounds: NDArray[Any], total: int) -> bool:
    return bool(len(bounds) and bounds[0] == 0 and bounds[-1] == total and np.all(bounds[1:] >= bounds[:-1]))


def _fields(file: BufferedReader, path: str, size: int) -> Iterator[dict[str, Any]]:
    """What webdataset's tar_file_expander yields for this tar, with a `_Payload` in place of the bytes."""
    try:
        for name, offset, length in read_members(file, size):
            if not _SKIP_META.match(name):
                # __local_path__ as webdataset has it for a local file, since it takes part in the grouping.
                yield {"fname": name, "data": _Payload(offset, length), "__url__": path, "__local_path__": path}
    except TarError as error:
        file.seek(0)
        start = file.read(8)
        kind = next((kind for magic, kind in _COMPRESSED.items() if start.startswith(magic)), None)
        if kind is not None:
            raise DataError(
                f"{path} is compressed ({kind}), so its samples cannot be read by index. Decompress it "
                "(gunzip, zstd -d)."
            ) from None
        raise DataError(
            f"{path} ({size:,} bytes) is no tar that can be read by index: {error}. Copy or write it again."
        ) from error


def split_name(name: str) -> tuple[str, str] | tuple[None, None]:
    """Key and extension of a member, as webdataset's base_plus_ext; whose time is quadratic in the name's length."""
    dot = name.find(".", name.rfind("/") + 1)
    line = name.find("\n")
    slash = name.rfind("/", 0, max(0, dot - 1 if line < 0 else min(dot - 1, line + 1)))
    if dot < 1 or "." in name[slash + 1 : dot] or slash + 1 == dot:
        return None, None
    return name[:dot], name[dot + 1 :]


def _open_regular(path: AnyPath) -> BufferedReader:
    if Path(path).is_fifo():
        raise OSError(errno.EINVAL, "it is a pipe")  # and opening one waits for a writer
    return Path(path).open("rb")


def _refuse_unreadable(path: str, error: OSError) -> NoReturn:
    raise DataError(f"Shard {path} cannot be read ({error.strerror}); check the path, or copy it there.") from error
