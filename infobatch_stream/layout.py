"""Where the bytes of a score store lie: its metadata, its two shard files, and how both are checked.

    scores.zarr/zarr.json            group; its attribute "infobatch_stream" is the Header
    scores.zarr/{scores,pending}/zarr.json
    scores.zarr/{scores,pending}/c/0   K inner chunks of C float32 (little-endian), then the shard index:
                                       K times (offset, length) as uint64, then the CRC-32C of those 16 K bytes

C = min(N, 2^22), K = ceil(N / C); what the last chunk has beyond N is NaN.
"""

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Self

import google_crc32c
import numpy as np
import zarr
from numpy.typing import ArrayLike

from infobatch_stream.errors import ConfigError, StoreError

__all__ = [
    "FORMAT",
    "Header",
    "check_files",
    "file_size",
    "inodes",
    "map_array",
    "not_a_store",
    "read_header",
    "remove_leftovers",
    "sync_folder",
    "write_header",
    "write_new",
]

FORMAT = 1
State = Literal["ready", "apply", "reset"]

_KEY = "infobatch_stream"
_CHUNK = 1 << 22
_METADATA_LIMIT = 1 << 20  # bytes of a zarr.json we are ready to parse


@dataclasses.dataclass(frozen=True)
class Header:
    """What the group's attributes say. num_samples: N. epoch: commits so far. state: of the commit protocol."""

    num_samples: int
    fingerprint: str
    epoch: int
    state: State

    def replace(self, **changes: Any) -> Self:
        """A copy with ``changes``."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """The value of the group's attribute."""
        return {"format": FORMAT, **dataclasses.asdict(self)}


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


def _shard_file(path: Path, array: str) -> Path:
    return path / array / "c" / "0"


def not_a_store(path: Path, found: str) -> StoreError:
    """The error for a path at which there is no store of ours."""
    return StoreError(
        f"{path} is not a score store: {found}. Give the path of a store that ScoreStore.create made, "
        "or one that does not exist yet, to have it made."
    )


def _read_json(file: Path, path: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as handle:
            text = handle.read(_METADATA_LIMIT + 1)
        if len(text) > _METADATA_LIMIT:
            raise not_a_store(path, f"{file} is larger than {_METADATA_LIMIT:,} bytes")
        found = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise not_a_store(path, f"{file} cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise not_a_store(path, f"{file} holds no JSON object")
    return found


def read_header(path: Path) -> Header:
    """The header of the store at ``path``. Raises StoreError for anything that is not one of this format."""
    found = _read_json(path / "zarr.json", path).get("attributes")
    fields = found.get(_KEY) if isinstance(found, dict) else None
    if not isinstance(fields, dict):
        raise not_a_store(path, f"its attributes have no {_KEY!r}")
    if fields.get("format") != FORMAT:
        raise StoreError(
            f"{path} has format {fields.get('format')!r}; this version of infobatch-stream reads format {FORMAT}. "
            "Install the version that wrote it, or a newer one."
        )
    kinds = {"num_samples": int, "fingerprint": str, "epoch": int, "state": str}
    values = {name: fields.get(name) for name in kinds}
    for name, kind in kinds.items():
        if type(values[name]) is not kind:
            raise StoreError(f"{path}: its attribute {name!r} is {values[name]!r}, not a {kind.__name__}; damaged.")
    header = Header(**values)  # type: ignore[arg-type]
    if header.num_samples < 1 or header.epoch < 0 or header.state not in ("ready", "apply", "reset"):
        raise StoreError(f"{path}: its attributes {fields} are out of range; the store is damaged.")
    return header


def write_header(path: Path, header: Header) -> None:
    """Replace the header by way of a temporary file; on return the new one is on the disk."""
    metadata = _read_json(path / "zarr.json", path)
    metadata["attributes"] = {**metadata.get("attributes", {}), _KEY: header.to_json()}
    descriptor, temporary = tempfile.mkstemp(prefix=".zarr.json.", dir=path)
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump(metadata, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path / "zarr.json")
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path)


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of processes that were killed. The caller holds the store alone."""
    for file in path.glob(".zarr.json.*"):
        with suppress(OSError):
            file.unlink()


def sync_folder(path: Path) -> None:
    """Bring the folder's entries (or a file's bytes) to the disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_new(path: Path, header: Header, arrays: Mapping[str, ArrayLike | None]) -> None:
    """Write a whole store at ``path``, which does not exist; ``arrays`` that are None are filled with NaN."""
    size, count = _chunks(header.num_samples)
    group = zarr.create_group(path, attributes={_KEY: header.to_json()})
    for name, values in arrays.items():
        group.create_array(
            name,
            shape=(header.num_samples,),
            chunks=(size,),
            shards=(size * count,),
            dtype="<f4",
            fill_value=np.nan,
            compressors=None,
            filters=None,
        )
        _write_shard(_shard_file(path, name), header.num_samples, values)
    for entry in (*path.rglob("*"), path):
        sync_folder(entry)


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


def check_files(path: Path, num_samples: int) -> None:
    """Raise StoreError unless both arrays have the metadata, the size and the shard index of this layout."""
    expected = _expected_array(num_samples)
    for name in ("scores", "pending"):
        metadata = _read_json(path / name / "zarr.json", path)
        try:
            found = _found_array(metadata)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise StoreError(f"{path / name}: its metadata lacks or garbles {error}; the store is damaged.") from error
        for field, value in expected.items():
            if found[field] != value:
                raise StoreError(f"{path / name}: its {field} is {found[field]}, not {value}; not our layout.")
        _check_shard(_shard_file(path, name), num_samples)


def _check_shard(file: Path, num_samples: int) -> None:
    needed = file_size(num_samples)
    index = _index(num_samples)
    try:
        with file.open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            handle.seek(max(0, size - len(index)))
            tail = handle.read(len(index))
    except OSError as error:
        raise StoreError(f"{file} cannot be read: {error.strerror}; the store is damaged.") from error
    if size != needed:
        what = "truncated" if size < needed else "extended"
        raise StoreError(
            f"{file} was {what}: it has {size:,} bytes, and {num_samples:,} samples take {needed:,}. "
            "Restore the store from a checkpoint (load_state_dict), or begin anew with existing='overwrite'."
        )
    if tail != index:
        raise StoreError(
            f"{file}: its shard index is not the one of this layout; another program rewrote the file. "
            "Restore the store from a checkpoint (load_state_dict), or begin anew with existing='overwrite'."
        )


def map_array(
    path: Path, array: str, num_samples: int, mode: Literal["r", "r+"]
) -> "np.memmap[Any, np.dtype[np.float32]]":
    """Map an array of a checked store: float32[N]."""
    try:
        return np.memmap(_shard_file(path, array), dtype="<f4", mode=mode, shape=(num_samples,))
    except OSError as error:
        raise StoreError(
            f"{path / array} cannot be opened to write ({error.strerror}); a store that is only to be read is opened "
            "with mode='r'."
        ) from error


def inodes(path: Path) -> tuple[int, ...]:
    """Which files the arrays are. Raises StoreError when one is gone.

    Tools that write through Zarr put a new file in the place of the old one; a map of the old one then shows a
    file that no path leads to, and what is written there is lost.
    """
    try:
        return tuple(_shard_file(path, name).stat().st_ino for name in ("scores", "pending"))
    except OSError as error:
        raise StoreError(f"{error.filename} is gone ({error.strerror}) while the store is in use.") from error
