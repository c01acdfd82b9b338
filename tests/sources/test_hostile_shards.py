"""Tars and their indexes that others made: refused or read, at once, in memory of their size."""

import io
import os
import zipfile

import numpy as np
import pytest
from fuzz.run import memory_below, watched
from fuzz.seeds import HOSTILE

from infobatch_stream import ConfigError, DataError, IndexedWebDataset
from infobatch_stream.formats.tar_index import TarIndex
from infobatch_stream.sources.webdataset.index_cache import load_index


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_tar_is_refused_or_indexed_at_once_in_little_memory(tmp_path, case):
    path = tmp_path / "s.tar"
    path.write_bytes(HOSTILE[case])
    with memory_below(2**20 + 8 * len(HOSTILE[case])):
        try:
            index = load_index(path)
        except DataError as error:
            told = str(error)
        else:
            assert all(index.key(row) for row in range(len(index)))
            return
    assert str(path) in told
    assert "Copy or write it again" in told or "duplicate" in told
    assert len(told) < 1200


def test_names_in_a_tar_are_keys_and_never_paths(tmp_path):
    path = tmp_path / "s.tar"
    path.write_bytes(HOSTILE["names of NUL and dots"])
    samples = list(IndexedWebDataset(path))
    assert [sample["__key__"] for sample in samples] == ["../../a", "/etc/x"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["s.tar", "s.tar.index.npz"]


@pytest.mark.parametrize("name", ["s.tar", "s.tar.index.npz"])
def test_a_pipe_in_the_place_of_a_file_does_not_hang(tmp_path, name):
    (tmp_path / "s.tar").write_bytes(HOSTILE["names of NUL and dots"])
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with watched():
        if name == "s.tar":
            with pytest.raises(DataError, match=r"s\.tar cannot be read \(it is a pipe\)"):
                IndexedWebDataset(tmp_path)
        else:
            assert len(IndexedWebDataset(tmp_path)) == 2


def test_urls_that_no_file_can_have_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="NUL"):
        IndexedWebDataset("a\0.tar")
    with pytest.raises(ConfigError, match="NUL"):
        IndexedWebDataset([f"file:{tmp_path}/a\0.tar"])
    with pytest.raises(DataError, match="File name too long"):
        IndexedWebDataset("n" * 5000)


def test_a_pattern_may_be_longer_than_a_file_name(tmp_path):
    (tmp_path / "a0.tar").write_bytes(HOSTILE["names of NUL and dots"])
    assert len(IndexedWebDataset(f"{tmp_path}/a{{{','.join(['0'] * 200)}}}.tar")) == 400


# ---- the kept index


def npy(dtype="<i8", shape="(5,)", data=bytes(40)):
    header = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\1\0v\0" + header.encode() + data


def zipped(changes, method=zipfile.ZIP_STORED, path=None, more=0):
    made = io.BytesIO()
    with np.load(path, allow_pickle=False) as arrays, zipfile.ZipFile(made, "w", method) as archive:
        for name in arrays.files:
            data = io.BytesIO()
            np.save(data, arrays[name])
            archive.writestr(f"{name}.npy", changes.get(name, data.getvalue()))
        for number in range(more):
            archive.writestr(f"{number}", b"")
    return made.getvalue()


@pytest.mark.parametrize(
    "attack",
    [
        "untouched", "10^18 numbers", "10^10 numbers", "objects", "items of 2 GB", "deep nesting", "version 3",
        "deflated", "entries", "size in the zip", "many entries of the same bytes", "64 bits", "comment",
    ],
)  # fmt: skip
def test_an_index_that_claims_more_than_it_has_is_built_again_in_little_memory(tmp_path, attack):
    path, kept = tmp_path / "s.tar", tmp_path / "s.tar.index.npz"
    path.write_bytes(HOSTILE["names of NUL and dots"] + bytes(200_000))
    right = load_index(path)
    attacks = {
        "untouched": {},
        "10^18 numbers": {"offset": npy(shape="(1000000000000000000,)")},
        "10^10 numbers": {"offset": npy(shape="(10000000000,)")},
        "objects": {"offset": npy(dtype="|O")},
        "items of 2 GB": {"offset": npy(dtype="|V2000000000")},
        "deep nesting": {"offset": npy(shape="-" * 60 + "5")},
        "version 3": {"offset": npy().replace(b"NUMPY\1", b"NUMPY\3")},
        "deflated": {"offset": npy(data=bytes(10**8))},
    }
    data = zipped(
        attacks.get(attack, {}),
        zipfile.ZIP_DEFLATED if attack == "deflated" else zipfile.ZIP_STORED,
        path=kept,
        more=3000 if attack == "entries" else 0,
    )
    at = data.index(b"PK\1\2")
    if attack == "size in the zip":
        data = data[: at + 20] + b"\xff\xff\xff\x7f" * 2 + data[at + 28 :]
    elif attack == "many entries of the same bytes":
        end = bytearray(data[-22:])
        contents = data[at:-22].replace(b"key_text", b"key_texx") * 3
        end[12:16] = len(contents).to_bytes(4, "little")
        data = data[:at] + contents + bytes(end)
    elif attack == "64 bits":
        data = data[:-22] + b"PK\6\7" + bytes(16) + data[-22:]
    elif attack == "comment":
        data = data[:-2] + b"\5\0hello"
    kept.write_bytes(data)
    stat = path.stat()
    with memory_below(2**20 + 4 * len(data)):
        found = TarIndex.read(kept, stat.st_size, stat.st_mtime_ns)
    assert (found is not None) == (attack == "untouched")
    assert load_index(path).members(0) == right.members(0)
