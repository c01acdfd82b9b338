"""The first batches of a cold start: samples that are downloaded by themselves, and whole shards behind them."""

import threading
from collections import Counter
from contextlib import suppress

import pytest
from streaming import MDSWriter, StreamingDataset
from support.ddp.children import until
from support.ddp.data import loss_of, write_mds
from support.ddp.mds import Augmented
from support.ddp.remote_tars import number_of, write_tars
from support.servers import FaultyServer, s3_server, use_s3

from infobatch_stream import DataError, IndexedWebDataset, InfoBatchLoader, StreamedWebDataset
from infobatch_stream.sources import open_source
from infobatch_stream.sources.remote import download, ranges, retry
from infobatch_stream.sources.webdataset.index_cache import load_index
from infobatch_stream.workers import fetch

pytestmark = [
    pytest.mark.usefixtures("no_stale_shared_memory", "few_open_files"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]
SHARDS, ROWS = 20, 12
N = SHARDS * ROWS
KINDS = ["mds", "tars"]
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Shards are small here, and so are pauses."""
    monkeypatch.setattr(ranges, "_LEAST", 0)
    monkeypatch.setattr(retry, "PAUSE", 0.01)
    monkeypatch.setattr(download, "TIMEOUT", 5.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a server has: MDS, compressed MDS, and tars with their indexes."""
    folder = tmp_path_factory.mktemp("server")
    write_mds(folder / "b" / "mds", samples=N, per_shard=ROWS)
    with MDSWriter(
        out=str(folder / "b" / "packed"), columns={"i": "int", "pad": "bytes"}, compression="zstd", size_limit=1_000
    ) as out:
        for i in range(N):
            out.write({"i": i, "pad": bytes(64)})
    for path in write_tars(folder / "b" / "tars", SHARDS, ROWS, size=600):
        load_index(path)
    return folder


@pytest.fixture
def server(folder, monkeypatch):
    with FaultyServer(folder) as server:
        use_s3(monkeypatch, server.url)
        yield server


@pytest.fixture
def make(tmp_path, server):
    """A loader over shards at the server, and the folder into which they come."""

    def make(kind, name="run", **options):
        local = tmp_path / name / "local"
        if kind == "tars":
            dataset = IndexedWebDataset(f"{server.url}/b/tars/s{{0..{SHARDS - 1}}}.tar", cache_dir=local)
            dataset = dataset.map(lambda sample: (number_of(sample), len(sample["bin"])))
        else:
            dataset = Augmented(remote=f"s3://b/{kind}", local=str(local), download_retry=1)
        options = {"batch_size": 8, "epochs": 2, "delta": 1, "shuffle_window": 60, **options}
        return InfoBatchLoader(dataset, tmp_path / name / "scores.zarr", **options), local

    return make


def whole(local):
    """The shards that are here."""
    return [file for file in local.rglob("*") if file.suffix in (".mds", ".shard")]


def train(loader):
    """To the end: what each step held."""
    steps = []
    for epoch in range(loader.epoch, loader.epochs):
        for (numbers, others), picks in loader:
            assert numbers.tolist() == picks.index.tolist()
            loader.update(loss_of(picks.index, epoch), picks)
            steps.append((epoch, numbers.tolist(), picks.weight.tolist(), others.tolist()))
    return steps


# ---- the first batches


WAYS = [{}, {"num_workers": 2, "multiprocessing_context": "fork"}, {"num_threads": 3}, {"predownload": 0}]


@kinds
@pytest.mark.parametrize("way", WAYS[:2], ids=str)
def test_the_first_batch_waits_for_no_shard_and_all_shards_come_behind(make, monkeypatch, tmp_path, kind, way):
    loader, local = make(kind, **way)
    source, gate = loader._run.source, tmp_path / "open"
    download_it = source.ensure_local

    def download(shard):
        until(gate.exists)
        download_it(shard)

    monkeypatch.setattr(source, "ensure_local", download)
    batches = iter(loader)
    (numbers, _), picks = next(batches)
    assert numbers.tolist() == picks.index.tolist()
    assert whole(local) == []
    gate.touch()
    loader.update(loss_of(picks.index), picks)
    for _, picks in batches:
        loader.update(loss_of(picks.index), picks)
    assert len(whole(local)) == SHARDS


@kinds
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_run_is_the_same_with_and_without(make, monkeypatch, kind, way):
    found = train(make(kind, "with", **way)[0])
    monkeypatch.setattr(fetch, "_EARLY", 0.5)
    half = train(make(kind, "half", **way)[0])
    monkeypatch.setattr(ranges, "_LEAST", 2**40)
    without = train(make(kind, "without", **way)[0])
    if way.get("num_threads"):  # numbers of the global generators differ
        found, half, without = ([step[:3] for step in run] for run in (found, half, without))
    assert found == half == without


@kinds
def test_only_a_twentieth_of_an_epoch_comes_twice(make, server, kind):
    train(make(kind, "once")[0])
    sent = sum(count for path, count in server.sent.items() if path.endswith((".mds", ".tar")))
    size = sum(
        file.stat().st_size for file in (server.source / "b" / kind).rglob("*") if file.suffix in (".mds", ".tar")
    )
    assert size < sent < 1.1 * size


def test_a_real_s3(folder, tmp_path, monkeypatch):
    """Which is asked for parts."""
    with s3_server() as s3, FaultyServer(s3.url) as proxy:
        use_s3(monkeypatch, proxy.url)
        for name in ("mds", "tars"):
            s3.put_folder(folder / "b" / name, name)
        dataset = Augmented(remote="s3://shards/mds", local=str(tmp_path / "mds"))
        tars = IndexedWebDataset(f"s3://shards/tars/s{{0..{SHARDS - 1}}}.tar", cache_dir=tmp_path / "tars")
        tars = tars.map(lambda sample: (number_of(sample), 0))
        for name, data in (("mds", dataset), ("tars", tars)):
            proxy.gets.clear()
            train(InfoBatchLoader(data, tmp_path / f"{name}.zarr", batch_size=8, epochs=1, shuffle_window=60))
            gets = [count for path, count in proxy.gets.items() if path.endswith((".mds", ".tar"))]
            assert len(gets) == SHARDS
            assert sum(gets) > SHARDS


# ---- where it cannot be


@kinds
@pytest.mark.parametrize("trouble", ["no ranges", "refused", "cut", "hangs"])
def test_whole_shards_come_where_parts_do_not(make, server, monkeypatch, kind, trouble):
    """Those that are asked for next have no trouble."""
    monkeypatch.setattr(download, "TIMEOUT", 1.0)
    server.ranges = trouble != "no ranges"
    faults = {"refused": {"status": 403}, "cut": {"after": 5}, "hangs": {}}
    loader, _ = make(kind, epochs=1)
    fetcher = loader._batches._fetcher
    if trouble in faults:
        fault = server.fail(r"\.(mds|tar)$", methods=("GET",), **faults[trouble])
        by_ranges = fetcher._source.by_ranges

        def then_mended(indices):
            try:
                return by_ranges(indices)
            finally:
                server.mend(fault)

        monkeypatch.setattr(fetcher._source, "by_ranges", then_mended)
    assert len(train(loader)) == N // 8
    assert not fetcher._tries_ranges


def test_compressed_shards_come_whole(make, server):
    assert len(train(make("packed", epochs=1)[0])) == N // 8
    assert {count for path, count in server.gets.items() if path.endswith(".zstd")} == {1}


def test_under_a_cache_limit_shards_come_whole(tmp_path, server):
    urls = f"{server.url}/b/tars/s{{0..{SHARDS - 1}}}.tar"
    dataset = IndexedWebDataset(urls, cache_dir=tmp_path / "local", cache_limit="1mb").map(lambda s: (number_of(s), 0))
    train(InfoBatchLoader(dataset, tmp_path / "scores.zarr", batch_size=8, epochs=1))
    assert Counter(count for path, count in server.gets.items() if path.endswith(".tar")) == {1: SHARDS}


def test_a_shard_that_nobody_has_is_an_error_all_the_same(make, server):
    loader, _ = make("mds", epochs=1)
    server.fail(r"shard\.0000\d\.mds$", status=404)
    with pytest.raises(DataError, match=r"could not be fetched from s3://b/mds/shard"):
        train(loader)


def test_nothing_is_read_of_a_tar_with_a_checksum_before_it_was_compared(tmp_path):
    write_tars(tmp_path / "site", 2, ROWS, size=600)
    for path in (tmp_path / "site").glob("*.tar"):
        load_index(path, checksum=True)
    data = bytearray((tmp_path / "site" / "s1.tar").read_bytes())
    data[700] ^= 1  # of a payload
    (tmp_path / "site" / "s1.tar").write_bytes(data)
    read = []

    def seen(sample):
        read.append(number_of(sample))
        return number_of(sample), 0

    with FaultyServer(tmp_path / "site") as server:
        dataset = IndexedWebDataset(f"{server.url}/s{{0..1}}.tar", cache_dir=tmp_path / "local").map(seen)
        with pytest.raises(DataError, match=r"s1\.tar"):
            train(InfoBatchLoader(dataset, tmp_path / "scores.zarr", batch_size=1, epochs=1))
    assert all(number < ROWS for number in read)


def test_nothing_is_read_of_mds_with_checksums_before_they_were_compared(tmp_path, monkeypatch):
    columns = {"i": "int", "pad": "bytes"}
    with MDSWriter(out=str(tmp_path / "b" / "hashed"), columns=columns, hashes=["sha1"], size_limit=1_000) as out:
        for i in range(48):
            out.write({"i": i, "pad": bytes(64)})
    with FaultyServer(tmp_path) as server:
        use_s3(monkeypatch, server.url)
        dataset = Augmented(remote="s3://b/hashed", local=str(tmp_path / "local"))
        train(InfoBatchLoader(dataset, tmp_path / "scores.zarr", batch_size=8, epochs=1))
        gets = [count for path, count in server.gets.items() if path.endswith(".mds")]
    assert set(gets) == {1}


def test_streamed_tars_come_whole_and_are_not_indexed_before(tmp_path, server):
    urls = f"{server.url}/b/tars/s{{0..{SHARDS - 1}}}.tar"
    dataset = StreamedWebDataset(urls, ROWS, cache_dir=tmp_path / "local").map(lambda s: (number_of(s), 0))
    loader = InfoBatchLoader(dataset, tmp_path / "scores.zarr", batch_size=8, epochs=1, shuffle_window=60)
    assert loader._run.source.by_ranges(list(range(N))) is None
    assert not [path for path in server.gets if path.endswith(".tar")]
    train(loader)


def test_shards_of_several_servers_come_whole(tmp_path, folder, make):
    with FaultyServer(folder) as one:
        urls = [f"{one.url}/b/tars/s0.tar", str(folder / "b" / "tars" / "s1.tar")]
        dataset = IndexedWebDataset(urls, cache_dir=tmp_path / "local").map(lambda s: (number_of(s), 0))
        train(InfoBatchLoader(dataset, tmp_path / "scores.zarr", batch_size=4, epochs=1))
    with pytest.raises(DataError, match="of several servers"):
        ranges.read_parts([("memory://a", 0, 1), (f"file://{folder}", 0, 1)])


def test_a_damaged_sample_is_not_read_by_itself(tmp_path, monkeypatch):
    """Streaming itself would take it."""
    with MDSWriter(out=str(tmp_path / "b" / "x"), columns={"data": "bytes"}, size_limit=1_000) as out:
        for _ in range(60):
            out.write({"data": bytes(50)})
    shard = tmp_path / "b" / "x" / "shard.00000.mds"
    data = bytearray(shard.read_bytes())
    begin = int.from_bytes(data[4:8], "little")
    data[begin : begin + 4] = (49).to_bytes(4, "little")
    shard.write_bytes(data)
    with FaultyServer(tmp_path) as server:
        use_s3(monkeypatch, server.url)
        source = open_source(StreamingDataset(remote="s3://b/x", local=str(tmp_path / "local")))
        with source.by_ranges([1, 30]):
            assert source.read_many([30, 1]) == [{"data": bytes(50)}] * 2
        with pytest.raises(ValueError, match="has values of"):
            source.by_ranges([0, 30])


def test_no_thread_waits_for_ever(make):
    loader, _ = make("mds")
    batches = iter(loader)
    next(batches)
    with suppress(StopIteration):
        next(batches)
    del batches, loader
    until(lambda: not [thread for thread in threading.enumerate() if thread.name == "infobatch-prefetch"], 30)
