"""Where the bytes of a score store lie: its two shard files, their metadata, and how both are checked.

    scores.zarr/zarr.json            group; its attribute "infobatch_stream" is the Header
    scores.zarr/{scores,pending}/zarr.json
    scores.zarr/{scores,pending}/c/0   K inner chunks of C float32 (little-endian), then the shard index:
                                       K times (offset, length) as uint64, then the CRC-32C of those 16 K bytes

C = min(N, 2^22), K = ceil(N / C); what the last chunk has beyond N is NaN. docs/format.md is the specification.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import google_crc32c
import numpy as np
import zarr
from numpy.typing import ArrayLike
from zarr.codecs import BytesCodec

from infobatch_stream._files import lock, sync, unlock
from infobatch_stream.errors import ConfigError, StoreError
from infobatch_stream.store.header import KEY, Header, not_a_store, out_of_range, read_header, read_json, restore, short
from infobatch_stream.store.safe_files import open_inside

__all__ = ["ARRAYS", "check_files", "checked_header", "exclusive", "file_size", "identity", "map_array", "write_new"]

ARRAYS = ("scores", "pending")

_CHUNK = 1 << 22


def _chunks(num_samples: int) -> tuple[int, int]:
    """(C, K): samples per inner chunk, number of inner chunks."""
    size = min(num_samples, _CHUNK)
    return size, -(-num_samples // size)


def _index(num_samples: int) -> bytes:
    size, count = _chunks(num_samples)
    table = np.empty((count, 2), dtype="<u8")
    table[:, 0] = np.arange(count, dtype=np.uint64) * (4 * size)
    table[:, 1] = 4 * size
    entries = table.tobytes()
    checksum: int = google_crc32c.value(entries)
    return entries + checksum.to_bytes(4, "little")


def file_size(num_samples: int) -> int:
    """Bytes of one shard file."""
    size, count = _chunks(num_samples)
    return count * (4 * size + 16) + 4


def _shard(array: str) -> str:
    return f"{array}/c/0"


def _shard_file(path: Path, array: str) -> Path:
    return path / _shard(array)


def write_new(path: Path, header: Header, arrays: Mapping[str, ArrayLike | None]) -> None:
    """Write a whole store at ``path``, which does not exist; ``arrays`` that are None are filled with NaN."""
    if wrong := out_of_range(header):
        raise ConfigError(f"a score store cannot have {wrong}.")
    size, count = _chunks(header.num_samples)
    # Whatever a user has set as Zarr's default: the format, and the codecs.
    group = zarr.create_group(path, zarr_format=3, attributes={KEY: header.to_json()})
    for name, values in arrays.items():
        group.create_array(
            name,
            shape=(header.num_samples,),
            chunks=(size,),
            shards=(size * count,),
            dtype="<f4",
            fill_value=np.nan,
            serializer=BytesCodec(endian="little"),
            compressors=None,
            filters=None,
        )
        _write_shard(_shard_file(path, name), header.num_samples, values)
    for entry in (*path.rglob("*"), path):
        sync(entry)


def _write_shard(file: Path, num_samples: int, values: ArrayLike | None) -> None:
    """Write every byte of a shard file: allocated for good, with a plain error where the disk is full.

    (A sparse file would end the process by SIGBUS when the disk fills up during a run.)
    """
    given = None if values is None else np.asarray(values)
    if given is not None and (given.shape != (num_samples,) or given.dtype != np.float32):
        raise ConfigError(
            f"{file.parent.parent.name} takes float32[{num_samples}], not {given.dtype}{list(given.shape)}."
        )
    size, count = _chunks(num_samples)
    file.parent.mkdir()
    with file.open("wb") as out:
        for chunk in range(count):
            block = np.full(size, np.nan, dtype="<f4")
            if given is not None:
                part = given[chunk * size : (chunk + 1) * size]
                block[: part.size] = np.where(np.isfinite(part), part, np.float32(np.nan))
            out.write(block.data)
        out.write(_index(num_samples))
        out.flush()
        os.fsync(out.fileno())


def _expected_array(num_samples: int) -> dict[str, Any]:
    """The parts of an array's metadata on which our reading of its bytes depends."""
    size, count = _chunks(num_samples)
    return {
        "shape": [num_samples],
        "data_type": "float32",
        "chunk_grid": ("regular", [size * count]),
        "chunk_key": ("default", "/"),
        "codec": ("sharding_indexed", [size], ["bytes"], ["bytes", "crc32c"], "end"),
        "endian": ["little", "little"],
    }


def _found_array(metadata: dict[str, Any]) -> dict[str, Any]:
    (codec,) = metadata["codecs"]
    sharding = codec["configuration"]
    inner, index = sharding["codecs"], sharding["index_codecs"]
    keys = metadata["chunk_key_encoding"]
    return {
        "shape": metadata["shape"],
        "data_type": metadata["data_type"],
        "chunk_grid": (
            metadata["chunk_grid"]["name"],
            metadata["chunk_grid"]["configuration"]["chunk_shape"],
        ),
        "chunk_key": (keys["name"], keys.get("configuration", {}).get("separator", "/")),
        "codec": (
            codec["name"],
            sharding["chunk_shape"],
            [c["name"] for c in inner],
            [c["name"] for c in index],
            sharding.get("index_location", "end"),
        ),
        "endian": [c[0]["configuration"]["endian"] for c in (inner, index)],
    }


def checked_header(path: Path) -> Header:
    """The header of the store at ``path``, whose files are such as it says. Raises StoreError."""
    header = read_header(path)
    check_files(path, header.num_samples)
    return header


def check_files(path: Path, num_samples: int) -> None:
    """Raise StoreError unless both arrays have the metadata, the size and the shard index of this layout."""
    expected = _expected_array(num_samples)
    for name in ARRAYS:
        metadata = read_json(path, f"{name}/zarr.json")
        try:
            found = _found_array(metadata)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise StoreError(f"{path / name}: its metadata lacks or garbles {error}; the store is damaged.") from error
        for field, value in expected.items():
            if repr(found[field]) != repr(value):  # not by ==, to which 1, 1.0 and true are the same
                raise StoreError(f"{path / name}: its {field} is {short(found[field])}, not {value}; not our layout.")
        _check_shard(path, name, num_samples)


def _check_shard(path: Path, array: str, num_samples: int) -> None:
    needed, file = file_size(num_samples), _shard_file(path, array)
    try:
        with os.fdopen(open_inside(path, _shard(array)), "rb") as handle:
            facts = os.fstat(handle.fileno())
            if facts.st_size != needed:  # before anything of that size is held in memory
                what = "truncated" if facts.st_size < needed else "extended"
                raise restore(
                    f"{file} was {what}: it has {facts.st_size:,} bytes, and {num_samples:,} samples take {needed:,}"
                )
            index = _index(num_samples)
            handle.seek(-len(index), os.SEEK_END)
            tail = handle.read(len(index))
    except OSError as error:
        raise StoreError(f"{file} cannot be read: {error.strerror}; the store is damaged.") from error
    if tail != index:
        raise restore(f"{file}: its shard index is not the one of this layout; another program rewrote the file")
    if facts.st_nlink > 1:
        raise StoreError(
            f"{file} has {facts.st_nlink} names (hard links), made by a copy or by a program that joins equal files: "
            f"what is written to one shows in all. Make it a file of its own: cp {file} new && mv new {file}."
        )


def map_array(
    path: Path, array: str, num_samples: int, mode: Literal["r", "r+"]
) -> "np.memmap[Any, np.dtype[np.float32]]":
    """Map an array of a checked store: float32[N]."""
    flags = os.O_RDONLY if mode == "r" else os.O_RDWR
    try:
        with open(
            _shard_file(path, array),
            "rb" if mode == "r" else "r+b",
            opener=lambda *_: open_inside(path, _shard(array), flags),
        ) as file:
            return np.memmap(file, dtype="<f4", mode=mode, shape=(num_samples,))
    except OSError as error:
        raise StoreError(
            f"{path / array} cannot be opened to write ({error.strerror}); a store that is only to be read is opened "
            "with mode='r'."
        ) from error


def identity(path: Path, array: str) -> tuple[int, ...]:
    """Which file an array is, and its size. Raises StoreError when it is gone. Costs some 3 us.

    A size that changed under a map means that bytes are lost, or that touching the map may end the process (SIGBUS).
    Tools that write through Zarr put a new file in the place of the old one: what is written to a map of that is lost.
    """
    try:
        facts = os.lstat(f"{path}/{array}/c/0")  # a Path would double the time
    except OSError as error:
        raise StoreError(f"{error.filename} is gone ({error.strerror}) while the store is in use.") from error
    return facts.st_ino, facts.st_size


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the store alone. The lock is on the folder itself: no file to leave behind, gone with its process."""
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise not_a_store(path, error.strerror or str(error)) from error
    try:
        with suppress(OSError):  # a file system without locks; RunLock says so
            lock(folder, wait=True)
        yield
    finally:
        with suppress(OSError):
            unlock(folder)
        os.close(folder)
