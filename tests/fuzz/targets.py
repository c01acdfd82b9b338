"""The parsers under test. A target takes any bytes; it returns where they are parsed, or refused as documented.

Anything else that is raised is a bug: an error of another kind, or an AssertionError of an invariant below.
"""

import contextlib
import json
import os
import shutil
import tarfile
import tempfile
import warnings
import zlib
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
from webdataset.tariterators import base_plus_ext

from infobatch_stream.errors import DataError, StoreError
from infobatch_stream.formats.npz import read_npz
from infobatch_stream.formats.tar_grouping import split_name
from infobatch_stream.formats.tar_headers import TarError, read_members
from infobatch_stream.formats.tar_index import _DTYPES, TarIndex
from infobatch_stream.store.header import checksum
from infobatch_stream.store.history import Epoch, History, carry, epochs, mend, training
from infobatch_stream.store.recorded_losses import replay
from infobatch_stream.store.score_store import ScoreStore

SHARD = (8192, 1_000_000_007)  # size and mtime of the shard whose index `npz` reads
STORE_FILES = ("zarr.json", "scores/zarr.json", "pending/zarr.json", "scores/c/0")
SAMPLES = 5


@cache
def folder() -> Path:
    """A folder of this process, in memory where that is possible."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    made = tempfile.TemporaryDirectory(prefix="infobatch-fuzz-", dir=place)
    folder.keep = made  # removed at exit
    return Path(made.name)


def headers(data: bytes) -> None:
    """Headers of a tar: what is accepted is what tarfile finds, in memory and time of the input's size."""
    found = []
    try:
        for member in read_members(BytesIO(data), len(data)):
            found.append(member)
            if len(member.name) < 1000:  # webdataset takes minutes for a long one
                assert base_plus_ext(member.name) == split_name(member.name)
    except TarError:
        found_all = False
    else:
        found_all = True
    end = 0
    for _, offset, length in found:
        assert end + 512 <= offset <= len(data) - length
        end = offset + length
    if not found_all or zlib.adler32(data) % 4:  # tarfile is the slower one, so it sees some only
        return
    expected = []
    try:
        with tarfile.open(fileobj=BytesIO(data), mode="r:") as tar:
            while (info := tar.next()) is not None:
                if info.isreg():
                    expected.append((info.name, info.offset_data, info.size))
    except (ValueError, RecursionError):  # of records that mean nothing to us, and of long chains of headers
        return
    assert found == expected


def tar(data: bytes) -> None:
    """Index of a tar, with its samples and extensions."""
    path = folder() / "shard.tar"
    path.write_bytes(data)
    with contextlib.suppress(DataError):
        check_index(TarIndex.build(str(path)), len(data))


def npz(data: bytes) -> None:
    """A kept index: sound, or refused."""
    try:
        index = TarIndex(**read_npz(BytesIO(data), _DTYPES, limit=2 * SHARD[0] + 2**16))
    except (MemoryError, RecursionError):
        raise
    except Exception:  # of any kind: `TarIndex.read` takes them all for "build it again"
        return
    if index._is_sound(*SHARD):
        assert index.stamp == SHARD
        check_index(index, SHARD[0])


def check_index(index: TarIndex, size: int) -> None:
    """Whether every row can be read, in its place within the shard."""
    end = 0
    for row in range(len(index)):
        assert isinstance(index.key(row), str)
        for extension, offset, length in index.members(row):
            assert isinstance(extension, str)
            assert end <= offset <= offset + length <= size
            end = offset + length


@cache
def good_store() -> tuple[Path, dict[str, bytes]]:
    """A whole store, and the files of it that are fuzzed."""
    path = folder() / "scores.zarr"
    ScoreStore.create(path, SAMPLES, "map:fuzz", scores=np.arange(SAMPLES, dtype=np.float32))
    return path, {name: (path / name).read_bytes() for name in STORE_FILES}


def store(data: bytes) -> None:
    """A score store, of which one file, named by the first byte, holds the rest of the bytes."""
    path, good = good_store()
    name = STORE_FILES[data[0] % len(STORE_FILES)] if data else STORE_FILES[0]
    (path / name).write_bytes(data[1:])
    try:
        opened = ScoreStore.open(path, mode="r")
    except StoreError:
        return
    else:
        assert opened.num_samples == len(opened.scores) == len(opened.pending) == SAMPLES
        assert opened.epoch >= 0
        header = json.loads((path / "zarr.json").read_bytes())["attributes"]["infobatch_stream"]
        assert header.get("checksum", checksum(header)) == checksum(header)
        assert header["format"] == 1 or "checksum" in header
    finally:
        (path / name).write_bytes(good[name])


HISTORY_FILES = (
    "zarr.json", "entries/zarr.json", "samples/0/zarr.json", "recorded/zarr.json", "histogram/zarr.json", "entries",
    "entries/c/0", "quantiles/c/0/0", "samples/0/c/0/0", "recorded/c/1/0",
)  # fmt: skip
INSTEAD = ("file", "file", "file", "file", "link", "pipe", "device", "hole", "folder", "beside")


@cache
def good_history() -> tuple[Path, dict[str, bytes]]:
    """A store of two epochs, and the files of its history."""
    path = folder() / "history" / "s.zarr"
    store = ScoreStore.create(path, SAMPLES, "map:fuzz")
    for epoch in range(2):
        store.put_pending(0, np.arange(SAMPLES, dtype=np.float32) + epoch)
        store.commit(epoch, history=History(path, Epoch(epoch, SAMPLES, SAMPLES, SAMPLES, np.nan, 1.0), recorded=True))
    files = [file for file in (path / "history").rglob("*") if file.is_file()]
    return path, {str(file.relative_to(path)): file.read_bytes() for file in files}


def history(data: bytes) -> None:
    """The history of a store, of which one file, named by the first byte, is made what the second one says.

    It is read, carried to another store and written to: each time as it should be, refused, or warned of.
    """
    path, files = good_history()
    name = HISTORY_FILES[data[0] % len(HISTORY_FILES)] if data else HISTORY_FILES[0]
    how = INSTEAD[data[1] % len(INSTEAD)] if len(data) > 1 else "file"
    outside = path.with_name("outside")
    for old in (path / "history", path.with_name("carried")):
        shutil.rmtree(old, ignore_errors=True)
    for file, whole in files.items():
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        (path / file).write_bytes(whole)
    place = path / "history" / name
    if how == "beside":
        place = place.with_name(data[2:34].hex() or "x")
    elif place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink()
    outside.write_bytes(data[2:])
    match how:
        case "link":
            place.symlink_to(outside)
        case "pipe":
            os.mkfifo(place)
        case "device":
            place.symlink_to("/dev/zero")
        case "folder":
            place.mkdir()
        case "hole":
            with place.open("wb") as file:
                file.write(data[2:])
                file.truncate(2**40)
        case _:
            place.write_bytes(data[2:])
    for look in (_rows, _counts, _losses):
        with contextlib.suppress(StoreError):
            look(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        path.with_name("carried").mkdir()
        carry(path, path.with_name("carried"), SAMPLES, 1)
        mend(path, 2, np.ones(SAMPLES, np.float32))
        writes = History(path, Epoch(2, SAMPLES, SAMPLES, SAMPLES, np.nan, 1.0), recorded=True)
        writes.before(np.ones(SAMPLES, np.float32), np.ones(SAMPLES, np.float32))
        writes.after(np.ones(SAMPLES, np.float32))
    assert outside.read_bytes() == data[2:]


def _rows(path: Path) -> None:
    numbers = [row.number for row in epochs(path)]
    assert numbers == sorted(set(numbers))
    assert set(numbers) <= {0, 1}


def _counts(path: Path) -> None:
    found = training(path, 2)
    assert found is None or (found.times.size, found.last.size) == (SAMPLES, SAMPLES)


def _losses(path: Path) -> None:
    for scores in replay(path, SAMPLES):
        assert scores.size == SAMPLES
        assert not np.isinf(scores).any()


TARGETS = {"headers": headers, "tar": tar, "npz": npz, "store": store, "history": history}
