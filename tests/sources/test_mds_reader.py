"""MDS samples are read from shards that stay open, and are what StreamingDataset itself gives."""

import copy
import gc
import os
import pickle
from decimal import Decimal
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from streaming import MDSWriter, StreamingDataset
from streaming.base.array import Array
from streaming.base.format.mds.encodings import get_mds_encodings
from streaming.base.format.mds.reader import MDSReader
from support.ddp.data import write_mds
from support.ddp.mds import Augmented

from infobatch_stream import DataError, InfoBatchLoader
from infobatch_stream.sources import open_source, shard_file
from infobatch_stream.sources.mds import reader as mds_reading
from infobatch_stream.sources.shard_file import MOST_OPEN, ShardFile

pytestmark = [
    pytest.mark.usefixtures("no_stale_shared_memory", "few_open_files"),
    pytest.mark.filterwarnings(
        # Python's own warning that forking a process with threads is risky; workers are forked here as users fork them.
        "ignore:.*multi-threaded, use of fork:DeprecationWarning",
        # streaming leaves the compressed shard that it reads open
        "ignore::ResourceWarning",
        "ignore::pytest.PytestUnraisableExceptionWarning",
    ),
]
N = 48


@pytest.fixture
def opened(monkeypatch):
    """Names of the shards that are opened, by us or by streaming."""
    names = []

    class Watched(mds_reading.ShardFile):
        def __init__(self, path, stamp):
            names.append(Path(path).name)
            super().__init__(path, stamp)

    def read(self, index, original=MDSReader.get_sample_data):
        names.append(f"{self.raw_data.basename} by streaming")
        return original(self, index)

    monkeypatch.setattr(mds_reading, "ShardFile", Watched)
    monkeypatch.setattr(MDSReader, "get_sample_data", read)
    return names


def open_shards(folder):
    """How many files below ``folder`` this process has open; those that were removed too."""
    links = [str(file.readlink()) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
    return sum(link.startswith(str(folder)) and ".mds" in link for link in links)


# ---- the same samples


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8))


SCALARS = ["uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float32", "float64"]
VALUES = {
    "bytes": lambda i: bytes(i % 3),  # empty ones too
    "str": lambda i: "å" * i,
    "int": lambda i: -i,
    "ndarray": lambda i: np.arange(i + 1, dtype=np.float32).reshape(1, -1),
    "ndarray:int16": lambda i: np.full((2, i + 1), i, np.int16),
    "ndarray:uint8:2,3": lambda i: np.full((2, 3), i, np.uint8),
    **{name: lambda i, name=name: getattr(np, name)(i) for name in SCALARS},
    "str_int": lambda i: 10**20 + i,
    "str_float": lambda i: i / 7,
    "str_decimal": lambda i: Decimal(i) / 8,
    "pil": picture,
    "jpeg": picture,
    "png": picture,
    "jpeg_array": lambda i: [jpeg(i), jpeg(i + 1)],
    "jpegarray": lambda i: [jpeg(i)],
    "list[pil]": lambda i: [picture(i)] * 2,
    "list[jpeg]": lambda i: [picture(i)],
    "list[png]": lambda i: [picture(i)],
    "pkl": lambda i: {"i": (i, None)},
    "json": lambda i: {"i": [i, "x"]},
}


def jpeg(seed):
    picture(seed).save(out := BytesIO(), "JPEG")
    return out.getvalue()


def plain(value):
    """Something that compares: images by class, mode and pixels; arrays and numbers by type too."""
    if isinstance(value, Image.Image):
        return type(value), value.mode, value.size, value.tobytes()
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    if isinstance(value, list):
        return [plain(item) for item in value]
    return type(value), value


def test_there_is_a_value_for_every_encoding():
    assert {name.split(":")[0] for name in VALUES} == get_mds_encodings()


@pytest.mark.parametrize("encoding", VALUES)
def test_samples_of_every_encoding_are_streamings(tmp_path, opened, encoding):
    columns = {"before": "int", "x": encoding, "after": "bytes"}
    with MDSWriter(out=str(tmp_path), columns=columns, size_limit=1500) as out:
        for i in range(9):
            out.write({"before": i, "x": VALUES[encoding](i), "after": bytes(i)})
    dataset = StreamingDataset(local=str(tmp_path), allow_unsafe_types=True)
    samples = open_source(dataset).read_many(list(range(9)))
    assert not [name for name in opened if "streaming" in name]
    for ours, theirs in zip(samples, map(dataset.__getitem__, range(9)), strict=True):
        assert list(ours) == list(theirs)
        assert {name: plain(value) for name, value in ours.items()} == {
            name: plain(value) for name, value in theirs.items()
        }


def test_samples_come_in_the_order_that_they_were_asked_for(shards):
    asked = np.random.default_rng(0).integers(0, N, 100).tolist()
    assert [sample["i"] for sample in open_source(StreamingDataset(local=shards)).read_many(asked)] == asked


def test_no_samples_are_no_samples(shards):
    assert open_source(StreamingDataset(local=shards)).read_many([]) == []


# ---- opened once


@pytest.mark.parametrize("kind", [StreamingDataset, Augmented])
def test_a_shard_is_opened_once_and_not_once_per_sample(shards, opened, kind):
    source = open_source(kind(local=shards))
    for _ in range(3):
        source.read_many(list(range(N)))
        source.read(5)
    assert opened == [f"shard.{i:05}.mds" for i in range(4)]


def test_the_number_of_open_shards_has_a_bound(tmp_path):
    folder = write_mds(tmp_path / "many", samples=2 * MOST_OPEN + 20, per_shard=1)
    dataset = StreamingDataset(local=folder)
    assert dataset.num_shards > MOST_OPEN + 5
    samples = open_source(dataset).read_many(list(range(dataset.num_samples)))
    assert [sample["i"] for sample in samples] == list(range(dataset.num_samples))
    gc.collect()
    assert open_shards(folder) <= MOST_OPEN


def test_open_shards_close_with_the_source(own):
    source = open_source(StreamingDataset(local=str(own)))
    source.read_many([0, 20])
    assert open_shards(own) == 2
    del source
    assert open_shards(own) == 0


@pytest.mark.parametrize(
    "options", [{"multiprocessing_context": "fork"}, {"multiprocessing_context": "spawn"}], ids=str
)
def test_workers_read_after_this_process_has_opened_the_shards(shards, tmp_path, options):
    dataset = StreamingDataset(local=shards)
    loader = InfoBatchLoader(
        dataset, tmp_path / "scores.zarr", batch_size=8, epochs=1, num_workers=1, collate_fn=list, **options
    )
    loader.peek()
    for samples, picks in loader:
        assert [sample["i"] for sample in samples] == picks.index.tolist()


def test_a_source_travels_without_its_open_shards(shards):
    source = open_source(StreamingDataset(local=shards))
    source.read_many(list(range(N)))
    assert [sample["i"] for sample in pickle.loads(pickle.dumps(source)).read_many([30, 1])] == [30, 1]


# ---- what stays the user's


def test_the_users_dataset_is_as_it_was(shards):
    seen = []

    class Curious(StreamingDataset):
        def __getitem__(self, index):
            seen.append(copy.copy(vars(self)))
            return super().__getitem__(index)

    dataset = Curious(local=shards)
    before, readers = dict(vars(dataset)), [dict(vars(reader)) for reader in dataset.shards]
    open_source(dataset).read_many([1, 2])
    assert vars(dataset) == before
    assert [dict(vars(reader)) for reader in dataset.shards] == readers
    assert [state.keys() - before.keys() for state in seen] == [{"get_item"}] * 2  # while it is read


def test_the_users_dataset_is_as_it_was_after_an_error(shards):
    class Broken(StreamingDataset):
        def __getitem__(self, index):
            raise ValueError("mine")

    dataset = Broken(local=shards)
    with pytest.raises(ValueError, match="mine"):
        open_source(dataset).read(1)
    assert "get_item" not in vars(dataset)


def test_a_users_getitem_may_ask_for_other_samples(shards):
    class Mixed(StreamingDataset):
        def __getitem__(self, index):
            others = (index, (index + 20) % N, -1, index ^ 1)
            return [sample["i"] for sample in map(super().__getitem__, others)]

    assert open_source(Mixed(local=shards)).read_many([3, 40]) == [[3, 23, 47, 2], [40, 12, 47, 41]]


def test_an_index_beyond_the_end_is_streamings_error(shards):
    class Beyond(StreamingDataset):
        def __getitem__(self, index):
            return super().__getitem__(index + N)

    with pytest.raises(IndexError, match="Invalid sample index"):
        open_source(Beyond(local=shards)).read(1)


def test_a_get_item_of_the_users_is_used(shards, opened):
    class Other(StreamingDataset):
        def get_item(self, sample_id, retry=7):
            return super().get_item(sample_id, retry)["i"] * 2

    assert open_source(Other(local=shards)).read_many([3, 30]) == [6, 60]
    assert opened == ["shard.00000.mds by streaming", "shard.00002.mds by streaming"]


@pytest.mark.parametrize("method", ["get_sample_data", "get_item", "__getitem__"])
def test_a_reader_that_finds_samples_in_its_own_way_is_used(shards, opened, method):
    def mine(self, index):
        asked.append(index)
        return original(self, index)

    asked, original = [], getattr(MDSReader, method)
    reader = type("Mine", (MDSReader,), {method: mine})
    dataset = StreamingDataset(local=shards)
    for shard in dataset.shards[:2]:
        shard.__class__ = reader
    assert [sample["i"] for sample in open_source(dataset).read_many([3, 14, 30])] == [3, 14, 30]
    assert asked == [3, 2]
    assert opened[-1] == "shard.00002.mds"


def test_a_reader_that_decodes_in_its_own_way_is_used(shards, opened):
    class Mine(MDSReader):
        def decode_sample(self, data):
            return super().decode_sample(data)["i"] * 2

    dataset = StreamingDataset(local=shards)
    for shard in dataset.shards:
        shard.__class__ = Mine
    assert open_source(dataset).read_many([3, 30]) == [6, 60]
    assert opened == ["shard.00000.mds", "shard.00002.mds"]


def test_shards_of_another_format_are_read_by_streaming(tmp_path):
    from streaming import JSONWriter

    with JSONWriter(out=str(tmp_path), columns={"i": "int"}, size_limit=200) as out:
        for i in range(30):
            out.write({"i": i})
    source = open_source(StreamingDataset(local=str(tmp_path)))
    assert [sample["i"] for sample in source.read_many([29, 3, 3])] == [29, 3, 3]


# ---- random state


@pytest.mark.parametrize("reads", ["streaming", "getitem", "get_item", "pkl"])
def test_only_where_nothing_of_the_users_runs_are_draws_ruled_out(tmp_path, reads):
    with MDSWriter(out=str(tmp_path), columns={"x": "pkl" if reads == "pkl" else "int"}) as out:
        out.write({"x": 1})
    methods = {"__getitem__": Array.__getitem__, "get_item": lambda self, index, retry=7: index}
    changed = {"getitem": {"__getitem__": lambda self, index: index}, "get_item": {"get_item": methods["get_item"]}}
    kind = type("Dataset", (StreamingDataset,), changed.get(reads, {}))
    assert open_source(kind(local=str(tmp_path), allow_unsafe_types=True)).draws == (reads != "streaming")


# ---- shards that come and go


@pytest.fixture
def small_cache(tmp_path):
    """(dataset, local): 10 remote shards, of which the cache holds 4 at most."""
    many = Path(write_mds(tmp_path / "many", samples=120, per_shard=12))
    limit = (many / "index.json").stat().st_size + 4 * max(file.stat().st_size for file in many.glob("*.mds"))
    local = tmp_path / "local"
    return StreamingDataset(remote=str(many), local=str(local), cache_limit=limit, download_retry=1), local


def test_a_batch_of_more_shards_than_the_cache_holds_is_read(small_cache):
    dataset, _ = small_cache
    source = open_source(dataset)
    asked = np.random.default_rng(0).permutation(120).tolist()
    assert [sample["i"] for sample in source.read_many(asked)] == asked


def test_what_was_evicted_takes_no_room_on_the_disk(small_cache):
    dataset, local = small_cache
    source = open_source(dataset)
    for start in range(0, 120, 24):
        source.read_many(list(range(start, start + 24)))
        assert open_shards(local) == 0


def test_the_shards_that_were_not_read_lately_are_evicted_first(small_cache):
    dataset, local = small_cache
    source = open_source(dataset)
    for index in (0, 12, 24, 36, 0, 24, 48, 60):  # so 1 and 3 are the coldest when 4 and 5 come
        source.read_many([index])
    assert sorted(file.name for file in local.glob("*.mds")) == [f"shard.{i:05}.mds" for i in (0, 2, 4, 5)]


def test_a_shard_that_was_evicted_and_came_again_is_opened_again(shards, tmp_path, opened):
    dataset = StreamingDataset(remote=shards, local=str(tmp_path / "local"))
    source = open_source(dataset)
    for _ in range(2):
        assert source.read_many([5])[0]["i"] == 5
        dataset.evict_shard(0)
    assert opened == ["shard.00000.mds"] * 2


@pytest.mark.parametrize("keep_zip", [False, True])
def test_compressed_shards_are_read_from_their_raw_form(tmp_path, opened, keep_zip):
    remote = write_mds(tmp_path / "zipped", compression="zstd")
    local = tmp_path / "local"
    source = open_source(StreamingDataset(remote=remote, local=str(local), keep_zip=keep_zip))
    assert [sample["i"] for sample in source.read_many(list(range(N)))] == list(range(N))
    assert opened == [f"shard.{i:05}.mds" for i in range(4)]
    assert len(list(local.glob("*.zstd"))) == (4 if keep_zip else 0)


def test_a_shard_that_is_cut_short_while_it_is_open_is_named(own):
    source = open_source(StreamingDataset(local=str(own)))
    source.read_many([14])
    os.truncate(own / "shard.00001.mds", 300)
    with pytest.raises(DataError, match=r"shard\.00001\.mds has 300 bytes.*truncated"):
        source.read_many([14])


def test_a_shard_that_is_cut_short_in_the_middle_of_a_batch_is_named(own):
    class Cutting(StreamingDataset):
        def __getitem__(self, index):
            if index == 15:
                os.truncate(own / "shard.00001.mds", 100)
            return super().__getitem__(index)

    source = open_source(Cutting(local=str(own)))
    with pytest.raises(DataError, match=r"shard\.00001\.mds has 100 bytes.*truncated"):
        source.read_many([13, 14, 15])


def test_a_shard_that_is_removed_while_it_is_open_is_named(own):
    source = open_source(StreamingDataset(local=str(own), download_retry=1))
    source.read_many([14])
    (own / "shard.00001.mds").unlink()
    with pytest.raises(DataError, match=r"shard\.00001\.mds is missing"):
        source.read_many([14])


def test_a_shard_that_is_replaced_is_not_read_for_the_old_one(own, opened):
    source = open_source(StreamingDataset(local=str(own)))
    assert source.read_many([23])[0]["pad"] == bytes(64)
    file = own / "shard.00001.mds"
    new = file.with_suffix(".new")
    new.write_bytes(file.read_bytes()[:-64] + b"x" * 64)
    new.replace(file)
    with pytest.raises(DataError, match=r"shard\.00001\.mds changed"):
        source.read_many([23])
    assert opened == ["shard.00001.mds"]
    assert open_source(StreamingDataset(local=str(own))).read_many([23])[0]["pad"] == b"x" * 64


@pytest.mark.parametrize("bounds", [(0, 2**32 - 1), (500, 400), (300, 300)])
def test_a_damaged_table_is_named(own, bounds):
    file = own / "shard.00001.mds"
    data = bytearray(file.read_bytes())
    data[4 + 4 * 2 : 4 + 4 * 4] = b"".join(number.to_bytes(4, "little") for number in bounds)
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"shard\.00001\.mds is damaged.*sample 2 has"):
        open_source(StreamingDataset(local=str(own))).read_many([14])


@pytest.mark.parametrize("size", [0, 2**31, 63, 65])
def test_a_damaged_sample_is_named(own, size):
    file = own / "shard.00001.mds"
    data = bytearray(file.read_bytes())
    begin = int.from_bytes(data[4 + 4 * 2 : 8 + 4 * 2], "little")
    data[begin : begin + 4] = size.to_bytes(4, "little")
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"shard\.00001\.mds is damaged.* has values of"):
        open_source(StreamingDataset(local=str(own))).read_many([14])


def test_a_sample_that_is_too_short_for_its_sizes_is_named(own):
    file = own / "shard.00001.mds"
    data = bytearray(file.read_bytes())
    begin = int.from_bytes(data[4 + 4 * 2 : 8 + 4 * 2], "little")
    data[4 + 4 * 3 : 8 + 4 * 3] = (begin + 2).to_bytes(4, "little")
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"shard\.00001\.mds is damaged.* 1 columns has 2 bytes"):
        open_source(StreamingDataset(local=str(own))).read_many([14])


# ---- large samples, which are copied from a map


LARGE = 100_000


@pytest.fixture
def large(tmp_path):
    with MDSWriter(
        out=str(tmp_path / "large"), columns={"i": "int", "x": "bytes", "y": "str"}, size_limit=2**20
    ) as out:
        for i in range(20):
            out.write({"i": i, "x": bytes([i]) * (LARGE + i), "y": str(i)})
    return tmp_path / "large"


@pytest.mark.parametrize("cached", ["in memory", "not in memory", "not told", "no maps"])
def test_large_samples_are_streamings_however_they_are_read(large, monkeypatch, cached):
    if cached == "not in memory":
        monkeypatch.setattr(os, "preadv", raising(BlockingIOError()))
    elif cached == "not told":
        monkeypatch.setattr(shard_file, "_NOWAIT", 0)
    elif cached == "no maps":
        monkeypatch.setattr(shard_file, "mmap", raising(OSError(19, "no such device")))
    dataset = StreamingDataset(local=str(large))
    source = open_source(dataset)
    for _ in range(2):
        assert source.read_many(list(range(20))) == [dataset[i] for i in range(20)]
    maps = sum(".mds" in line for line in Path("/proc/self/maps").read_text().splitlines() if str(large) in line)
    assert maps == (dataset.num_shards if cached == "in memory" else 0)


def raising(error):
    def call(*_, **__):
        raise error

    return call


def test_a_large_shard_that_is_cut_short_in_the_middle_of_a_batch_is_named(large):
    class Cutting(StreamingDataset):
        def __getitem__(self, index):
            if index == 5:
                os.truncate(large / "shard.00000.mds", 5 * LARGE)
            return super().__getitem__(index)

    source = open_source(Cutting(local=str(large)))
    with pytest.raises(DataError, match=r"shard\.00000\.mds has 500,000 bytes.*truncated"):
        source.read_many([3, 4, 5])


def test_a_reader_that_decodes_large_samples_in_its_own_way_gets_their_bytes(large):
    class Mine(MDSReader):
        def decode_sample(self, data):
            assert type(data) is bytes
            return super().decode_sample(data)

    dataset = StreamingDataset(local=str(large))
    expected = dataset[7]
    for shard in dataset.shards:
        shard.__class__ = Mine
    assert open_source(dataset).read(7) == expected


def forget(file):
    """Have the system forget the pages of ``file``; whether it did (some file systems keep all in memory)."""
    handle = os.open(file, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)
    return not ShardFile(str(file), stamp_of(file))._is_in_memory(0, 1)  # which brings in the page that it looks at


def stamp_of(file):
    return file.stat().st_size, file.stat().st_mtime_ns


def test_samples_on_the_disk_are_asked_for_before_the_first_is_read_and_others_not_at_all(large, monkeypatch):
    forgotten = [forget(file) for file in large.glob("*.mds")]
    if not all(forgotten):
        pytest.skip("this file system has no other place than memory")
    asked, read = [], []
    advise, view = os.posix_fadvise, ShardFile.view
    willneed = os.POSIX_FADV_WILLNEED
    monkeypatch.setattr(os, "posix_fadvise", lambda *at: (at[3] == willneed and asked.append(at[1:3]), advise(*at)))
    monkeypatch.setattr(ShardFile, "view", lambda *at: (read.append((len(asked), at[1:])), view(*at))[1])
    dataset = StreamingDataset(local=str(large))
    source = open_source(dataset)
    wanted = [3, 17, 11, 4]
    samples = source.read_many(wanted)
    assert sorted(asked) == sorted(at for _, at in read)
    assert {count for count, _ in read} == {len(wanted)}
    assert samples == [dataset[i] for i in wanted]
    asked.clear()
    assert source.read_many(wanted) == samples
    assert not asked


def test_what_the_neighbours_of_a_sample_brought_to_memory_is_not_taken_for_it(large):
    """Pages at both ends are shared with them: a map would then fetch the rest page by page."""
    file = large / "shard.00000.mds"
    if not forget(file):
        pytest.skip("this file system has no other place than memory")
    opened = ShardFile(str(file), stamp_of(file))
    opened.read(LARGE - 4096, 8192)
    opened.read(2 * LARGE - 4096, 8192)
    assert opened.view(LARGE, LARGE)[1] == 0  # read, not mapped
    assert opened.view(LARGE, LARGE)[1] == LARGE


def test_a_users_own_getitem_may_stand_in_for_a_damaged_sample(own):
    class Tolerant(StreamingDataset):
        def __getitem__(self, index):
            try:
                return super().__getitem__(index)
            except DataError:
                return None

    file = own / "shard.00001.mds"
    data = bytearray(file.read_bytes())
    data[4 + 4 * 2 : 4 + 4 * 3] = (2**31).to_bytes(4, "little")
    file.write_bytes(data)
    source = open_source(Tolerant(local=str(own)))
    assert source.read_many([14, 15])[0] is None
    assert source.read_many([15])[0] is not None


def test_equal_indices_of_a_batch_are_read_in_their_order(own):
    read = []

    class Noting(StreamingDataset):
        def __getitem__(self, index):
            read.append(index)
            return len(read)

    samples = open_source(Noting(local=str(own))).read_many([3] * 40 + [1] * 40)
    assert samples == [*range(41, 81), *range(1, 41)]
