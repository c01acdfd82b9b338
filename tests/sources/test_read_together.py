"""Samples that are read together are what reading each alone gives, and so are the errors."""

import io
import tarfile

import numpy as np
import pytest
from streaming import MDSWriter, StreamingDataset

from infobatch_stream import DataError, IndexedWebDataset
from infobatch_stream.sources import open_source

N = 3_000
LONG = {5: 20_000, 2_000: 50_000}  # bytes of rows that are too long to be read like the others; the second by a map
COLUMNS = {
    "one": {"data": "bytes"},
    "several": {"data": "bytes", "i": "int", "text": "str", "array": "ndarray:float32", "fixed": "ndarray:int16:3"},
    "fixed alone": {"i": "int"},
}
PICKS = [[0], [N - 1, 0], [7, 7, 8, 7], list(range(40)), [2_000, *range(100, 130), 5]]


def value(kind, row, long):
    size = long.get(row, row % 50)
    values = {"bytes": bytes([row % 256]) * size, "int": row, "str": "ä" * size}
    if kind in values:
        return values[kind]
    return np.full(3, row % 100, np.int16) if "int16" in kind else np.arange(row % 5 + 1, dtype=np.float32)


def same(one, other):
    assert one.keys() == other.keys()
    for name, found in one.items():
        assert type(found) is type(other[name])
        assert np.array_equal(found, other[name])


@pytest.fixture(scope="module", params=[(columns, long) for columns in COLUMNS for long in ({}, LONG)], ids=str)
def mds(request, tmp_path_factory):
    """One shard, of several kinds of columns, perhaps with samples that are long."""
    columns, long = request.param
    folder = tmp_path_factory.mktemp("mds")
    with MDSWriter(out=str(folder), columns=COLUMNS[columns]) as out:
        for row in range(N):
            out.write({name: value(kind, row, long) for name, kind in COLUMNS[columns].items()})
    return folder


@pytest.mark.parametrize("picks", PICKS, ids=str)
def test_mds(mds, picks):
    dataset = StreamingDataset(local=str(mds))
    found = open_source(dataset).read_many(picks)
    for sample, index in zip(found, picks, strict=True):
        same(sample, dataset[index])


MEMBERS = {"one": ["txt"], "several": ["jpg", "cls", "long.name.json"], "unlike": None}


@pytest.fixture(scope="module", params=[(kind, long) for kind in MEMBERS for long in ({}, LONG)], ids=str)
def tars(request, tmp_path_factory):
    """Two shards, whose samples have one member, several, or sometimes one and sometimes two."""
    kind, long = request.param
    folder = tmp_path_factory.mktemp("tars")
    for shard, rows in enumerate((range(1_000), range(1_000, N))):
        with tarfile.open(folder / f"s{shard}.tar", "w") as tar:
            for row in rows:
                for name in MEMBERS[kind] or ["a", "b"][: 1 + row % 2]:
                    data = value("bytes", row, long)
                    info = tarfile.TarInfo(f"dir/schlüssel{row:06}.{name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


@pytest.mark.parametrize("picks", PICKS, ids=str)
def test_tars(tars, picks):
    dataset = IndexedWebDataset(tars)
    found = open_source(dataset).read_many(picks)
    for sample, index in zip(found, picks, strict=True):
        assert list(sample.items()) == list(dataset[index].items())


@pytest.mark.parametrize("picks", PICKS, ids=str)
def test_stages_of_tars(tars, picks):
    """They get a sample each of their own, also where one comes twice."""
    dataset = IndexedWebDataset(tars).map(lambda sample: sample | {"n": sample.pop("__key__")})
    found = open_source(dataset).read_many(picks)
    assert [sample["n"] for sample in found] == [f"dir/schlüssel{index:06}" for index in picks]


def test_an_override_of_getitem_is_asked_for_every_sample(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for row in range(5):
            tar.addfile(tarfile.TarInfo(f"{row}.txt"), io.BytesIO())

    class Mine(IndexedWebDataset):
        def __getitem__(self, index):
            return index, super().__getitem__(index)["__key__"]

    assert open_source(Mine(tmp_path)).read_many([3, 1]) == [(3, "3"), (1, "1")]


def test_a_stage_that_fails_names_its_sample(tars):
    def fails(sample):
        if sample["__key__"].endswith("000100"):
            raise ValueError("mine")
        return sample

    with pytest.raises(ValueError, match="mine") as error:
        open_source(IndexedWebDataset(tars).map(fails)).read_many([99, 101, 100])
    assert "sample 100 of the IndexedWebDataset" in error.value.__notes__[0]


def test_a_tar_that_is_cut_short_is_named(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for row in range(50):
            info = tarfile.TarInfo(f"{row:02}.txt")
            info.size = 100
            tar.addfile(info, io.BytesIO(bytes(100)))
    source = open_source(IndexedWebDataset(tmp_path))
    source.read_many([1, 2])
    with (tmp_path / "s.tar").open("r+b") as file:
        file.truncate(20_000)
    with pytest.raises(DataError, match=r"s\.tar was cut short") as error:
        source.read_many([1, 2, 40])
    assert "sample 40 of the IndexedWebDataset" in error.value.__notes__[0]


def test_a_shard_of_mds_that_is_cut_short_is_named(tmp_path):
    with MDSWriter(out=str(tmp_path), columns={"data": "bytes"}) as out:
        for _ in range(50):
            out.write({"data": bytes(100)})
    source = open_source(StreamingDataset(local=str(tmp_path)))
    source.read_many([1, 2])
    with (tmp_path / "shard.00000.mds").open("r+b") as file:
        file.truncate(3_000)
    with pytest.raises(DataError, match=r"shard\.00000\.mds"):
        source.read_many([1, 2, 40])


def test_a_value_that_cannot_be_decoded_names_its_sample(tmp_path):
    with MDSWriter(out=str(tmp_path), columns={"data": "json"}) as out:
        for _ in range(10):
            out.write({"data": {"a": 1}})
    shard = tmp_path / "shard.00000.mds"
    data = shard.read_bytes()
    shard.write_bytes(data[:-3] + b"!!!")  # of the last
    with pytest.raises(ValueError, match="Expecting value") as error:
        open_source(StreamingDataset(local=str(tmp_path))).read_many([2, 9, 3])
    assert "sample 9 of the StreamingDataset" in error.value.__notes__[0]


def test_a_sample_that_is_shorter_than_its_head_is_damaged(tmp_path):
    with MDSWriter(out=str(tmp_path), columns={"data": "bytes"}) as out:
        for _ in range(10):
            out.write({"data": b"abc"})
    shard = tmp_path / "shard.00000.mds"
    data = bytearray(shard.read_bytes())
    begin = int.from_bytes(data[4 + 4 * 9 : 8 + 4 * 9], "little")
    data[8 + 4 * 9 : 12 + 4 * 9] = (begin + 2).to_bytes(4, "little")
    shard.write_bytes(data)
    with pytest.raises(DataError, match="is damaged"):
        open_source(StreamingDataset(local=str(tmp_path))).read_many([9])
