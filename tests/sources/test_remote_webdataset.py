"""WebDataset shards on servers: read as if they lay here, whatever the server does."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
import zlib
from pathlib import Path

import numpy as np
import pytest
from support.ddp import remote_tars as remote
from support.ddp.children import Child, until
from support.ddp.data import loss_of
from support.ddp.launch import HERE, environment, error_of_rank
from support.ddp.remote_tars import number_of, write_tars
from support.servers import FaultyServer, s3_environment, s3_server, use_s3

from infobatch_stream import ConfigError, DataError, IndexedWebDataset, InfoBatchLoader
from infobatch_stream.sources.remote import download as downloads
from infobatch_stream.sources.webdataset import cached_tar
from infobatch_stream.sources.webdataset.index_cache import load_index
from infobatch_stream.sources.webdataset.source import WdsSource

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
SHARDS, SAMPLES = 4, 8
SIZE = 51_200  # of a shard
FORK = {"num_workers": 2, "multiprocessing_context": "fork"}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("infobatch_stream.sources.remote.retry.PAUSE", 0.01)
    monkeypatch.setattr(downloads, "TIMEOUT", 5.0)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The shards and their indexes, which have checksums."""
    folder = tmp_path_factory.mktemp("here")
    for path in write_tars(folder, SHARDS, SAMPLES):
        assert path.stat().st_size == SIZE
        load_index(path, checksum=True)
    return folder


@pytest.fixture(scope="module")
def s3(here, tmp_path_factory):
    bare = tmp_path_factory.mktemp("bare")
    write_tars(bare, SHARDS, SAMPLES)
    with s3_server() as s3:
        s3.put_folder(here, "train")
        s3.put_folder(bare, "bare")
        yield s3


@pytest.fixture
def web(here):
    with FaultyServer(here) as web:
        yield web


@pytest.fixture
def site(tmp_path):
    """Shards of its own, without indexes; a server; and the urls."""
    write_tars(tmp_path / "site", SHARDS, SAMPLES)
    with FaultyServer(tmp_path / "site") as web:
        yield web


def urls_of(web):
    return f"{web.url}/s{{0..{SHARDS - 1}}}.tar"


def plain(samples):
    """Without where they lie."""
    return [{name: value for name, value in sample.items() if name[:2] != "__"} for sample in samples]


def gets(server, *suffixes):
    """How often what ends so was asked for, by name."""
    return {Path(path).name: count for path, count in server.gets.items() if path.endswith(suffixes)}


EACH = {f"s{shard}.tar": 1 for shard in range(SHARDS)}
INDEXES = {f"s{shard}.tar.index.npz": 1 for shard in range(SHARDS)}


# ---- the same as here


@pytest.mark.parametrize(
    "urls",
    [
        "s3://shards/train/s{0..3}.tar",
        "s3://shards/train",
        "s3://shards/train/",
        "s3://shards/train/*.tar",
        "s3://shards/train/s[0-3].tar",
        [f"s3://shards/train/s{shard}.tar" for shard in range(4)],
        "http",
    ],
    ids=str,
)
def test_samples_are_those_of_local_shards_and_each_shard_is_fetched_once(here, s3, web, tmp_path, monkeypatch, urls):
    local = IndexedWebDataset(here)
    with FaultyServer(s3.url) as proxy:
        use_s3(monkeypatch, proxy.url)
        server, urls = (web, urls_of(web)) if urls == "http" else (proxy, urls)
        dataset = IndexedWebDataset(urls, cache_dir=tmp_path)
        assert gets(server, ".tar") == {}
        assert gets(server, ".npz") == INDEXES
        assert len(dataset) == len(local)
        assert dataset.shard_sizes.tolist() == local.shard_sizes.tolist()
        assert WdsSource(dataset).fingerprint == WdsSource(local).fingerprint
        assert plain(dataset) == plain(local)
        assert {sample["__url__"] for sample in dataset} == set(dataset.urls)
        assert all(Path(sample["__local_path__"]).parent == tmp_path for sample in dataset)
        again = IndexedWebDataset(urls, cache_dir=tmp_path)
        assert plain(again) == plain(local)
        assert gets(server, ".tar") == EACH
        assert gets(server, ".npz") == INDEXES


def test_shards_without_indexes_are_fetched_once_and_indexed(here, s3, tmp_path, monkeypatch):
    with FaultyServer(s3.url) as proxy:
        use_s3(monkeypatch, proxy.url)
        for _ in range(2):
            dataset = IndexedWebDataset("s3://shards/bare", cache_dir=tmp_path)
            assert plain(dataset) == plain(IndexedWebDataset(here))
        assert gets(proxy, ".tar") == EACH
        assert gets(proxy, ".npz") == INDEXES


def test_only_shards_that_are_read_are_fetched(web, tmp_path):
    dataset = IndexedWebDataset(urls_of(web), cache_dir=tmp_path)
    assert dataset[9]["cls"] == b"9"
    WdsSource(dataset).read_many([24, 9, 25])
    assert gets(web, ".tar") == {"s1.tar": 1, "s3.tar": 1}


def test_of_shards_without_an_included_sample_nothing_is_fetched(s3, tmp_path, monkeypatch):
    with FaultyServer(s3.url) as proxy:
        use_s3(monkeypatch, proxy.url)
        dataset = IndexedWebDataset("s3://shards/train", cache_dir=tmp_path / "cache")
        first = int(dataset.shard_sizes[:2].sum())
        include = np.arange(first, first + int(dataset.shard_sizes[2]))
        options = {"batch_size": 4, "epochs": 2, "include": include, "collate_fn": list}
        for _, picks in InfoBatchLoader(dataset, tmp_path / "scores.zarr", **options):
            assert set(picks.index.tolist()) <= set(include.tolist())
        assert gets(proxy, ".tar") == {"s2.tar": 1}


def test_a_shard_is_brought_when_asked_for(web, here, tmp_path):
    source = WdsSource(IndexedWebDataset(urls_of(web), cache_dir=tmp_path))
    assert source.is_remote
    assert source.capacity is None
    threads = [threading.Thread(target=source.ensure_local, args=[2]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert gets(web, ".tar") == {"s2.tar": 1}
    local = WdsSource(IndexedWebDataset(here))
    assert not local.is_remote
    assert local.capacity is None
    local.ensure_local(2)


def test_local_and_remote_shards_go_together(web, here, tmp_path):
    dataset = IndexedWebDataset([here / "s0.tar", f"{web.url}/s1.tar"], cache_dir=tmp_path, cache_limit=SIZE)
    assert [int(sample["cls"]) for sample in dataset] == list(range(16))
    assert gets(web, ".tar") == {"s1.tar": 1}


def test_a_query_is_no_part_of_a_name(web, here, tmp_path):
    dataset = IndexedWebDataset(f"{web.url}/s{{0..3}}.tar?token=a*b", cache_dir=tmp_path)
    assert gets(web, ".npz") == INDEXES
    assert plain(dataset) == plain(IndexedWebDataset(here))
    assert WdsSource(dataset).fingerprint == WdsSource(IndexedWebDataset(here)).fingerprint


def test_a_pickle_reads_the_same_and_holds_little(web, here, tmp_path):
    dataset = IndexedWebDataset(urls_of(web), cache_dir=tmp_path, cache_limit="1gb")
    data = pickle.dumps(dataset)
    assert len(data) < 3000
    assert plain(pickle.loads(data)) == plain(IndexedWebDataset(here))


def test_folders_and_globs_of_web_servers_are_refused(web, tmp_path):
    for url in (f"{web.url}/", f"{web.url}/s*.tar"):
        with pytest.raises(ConfigError, match="does not tell which files it has"):
            IndexedWebDataset(url, cache_dir=tmp_path)


def test_a_folder_without_shards_is_told(s3, tmp_path, monkeypatch):
    use_s3(monkeypatch, s3.url)
    for url in ("s3://shards/nothing", "s3://gone/", "s3://shards/train/*.gone"):
        with pytest.raises(DataError, match=f"There is no shard at {re.escape(url)}"):
            IndexedWebDataset(url, cache_dir=tmp_path)


# ---- indexes that lie beside the shards


def test_an_index_of_another_size_or_a_damaged_one_is_not_believed(site, tmp_path):
    stale, damaged = (Path(site.source) / f"s{shard}.tar.index.npz" for shard in (0, 1))
    other = write_tars(tmp_path / "other", 1, 2)[0]
    load_index(other)
    stale.write_bytes(Path(f"{other}.index.npz").read_bytes())
    damaged.write_bytes(b"PK" * 1000)
    dataset = IndexedWebDataset(urls_of(site), cache_dir=tmp_path / "c")
    assert [int(sample["cls"]) for sample in dataset] == list(range(SHARDS * SAMPLES))
    assert gets(site, ".tar") == EACH


def test_an_index_of_the_first_format_is_made_anew(site, tmp_path, here):
    import numpy as np

    path = Path(site.source) / "s0.tar"
    load_index(path)
    with np.load(f"{path}.index.npz", allow_pickle=False) as arrays:
        parts = dict(arrays)
    np.savez(f"{path}.index.npz", **{**parts, "header": np.array([1, *parts["header"][1:5]])})
    assert plain(IndexedWebDataset(f"{site.url}/s0.tar", cache_dir=tmp_path / "c")) == plain(
        IndexedWebDataset(here / "s0.tar")
    )
    assert gets(site, "s0.tar") == {"s0.tar": 1}


def test_an_index_may_have_a_checksum_of_the_whole_shard(here, tmp_path):
    path = write_tars(tmp_path, 1)[0]
    assert load_index(path).checksum is None
    checksum = zlib.crc32(path.read_bytes())
    assert load_index(path, checksum=True).checksum == checksum
    assert load_index(path).checksum == checksum  # it was kept


def test_a_page_that_a_server_sends_for_what_it_does_not_have_is_no_index_and_no_columns(site, here, tmp_path):
    """Some answer 200 and a page to everything."""
    from infobatch_stream.convert import convert

    site.page = b"<!doctype html><title>My homepage</title>"
    assert plain(IndexedWebDataset(urls_of(site), cache_dir=tmp_path / "c")) == plain(IndexedWebDataset(here))
    convert(urls_of(site), tmp_path / "out", "mds")
    convert(here, tmp_path / "same", "mds")
    for name in ("shard.00000.mds", "columns.json", "index.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "same" / name).read_bytes()
    assert not (tmp_path / "out/classes.json").exists()


# ---- limits


def test_a_limit_of_one_shard_serves(web, here, tmp_path):
    dataset = IndexedWebDataset(urls_of(web), cache_dir=tmp_path, cache_limit=SIZE)
    source, expected = WdsSource(dataset), plain(IndexedWebDataset(here))
    order = [31, 0, 8, 1, 16, 30, 2, 9]
    assert plain(source.read_many(order)) == [expected[number] for number in order]
    assert gets(web, ".tar") == EACH
    assert source.capacity == 1
    assert len(list(tmp_path.glob("*.shard"))) == 1
    opened = {str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.exists()}
    assert not any(str(tmp_path) in name for name in opened)


def test_a_limit_below_a_shard_is_told_when_the_dataset_is_opened(web, tmp_path):
    with pytest.raises(ConfigError, match=rf"cache_limit is 51,199 bytes, but the shard {web.url}/s0.tar has 51,200"):
        IndexedWebDataset(urls_of(web), cache_dir=tmp_path, cache_limit=SIZE - 1)


def test_a_shard_that_is_always_removed_before_it_is_read_is_told(web, tmp_path, monkeypatch):
    monkeypatch.setattr(cached_tar, "_ATTEMPTS", 3)
    dataset = IndexedWebDataset(urls_of(web), cache_dir=tmp_path, cache_limit=SIZE)
    look = cached_tar._stamp
    monkeypatch.setattr(cached_tar, "_stamp", lambda path: (look(path), Path(path).unlink())[0])  # by another process
    with pytest.raises(DataError, match=r"s0\.tar was removed from the cache 3 times .*cache_limit is too small"):
        dataset[0]
    assert gets(web, ".tar") == {"s0.tar": 3}


# ---- faults


def test_wrong_bytes_of_the_right_size_are_noticed(web, here, tmp_path):
    dataset = IndexedWebDataset(urls_of(web), cache_dir=tmp_path)
    once = web.fail(r"s0\.tar$", after=30_000, then="flip", times=1)
    assert plain([dataset[0]]) == plain([IndexedWebDataset(here)[0]])
    assert gets(web, ".tar") == {"s0.tar": 2}
    web.mend(once)
    web.fail(r"s1\.tar$", after=30_000, then="flip")
    for _ in range(2):
        with pytest.raises(DataError, match=r"s1\.tar could not be read after 6 attempts \(its CRC-32 is \w{8}, that"):
            dataset[8]
    assert not list(tmp_path.glob("s1.tar.*.shard"))


def test_wrong_bytes_are_noticed_in_parts_without_a_checksum(site, tmp_path):
    for path in Path(site.source).glob("*.tar"):
        load_index(path)
    dataset = IndexedWebDataset(urls_of(site), cache_dir=tmp_path / "c")
    site.fail(r"s0\.tar$", after=1000, then="flip")
    with pytest.raises(DataError, match=r"its probe is \w{8}, that of its index \w{8}\)"):
        dataset[0]


@pytest.mark.parametrize("size", [100, 4000])
def test_a_shard_that_was_replaced_is_told_and_a_new_dataset_has_the_new_one(site, tmp_path, size):
    dataset = IndexedWebDataset(urls_of(site), cache_dir=tmp_path / "c", cache_limit=SIZE)
    before = dataset[0]["bin"]
    assert dataset[8]  # s0 is gone from the cache
    path = Path(site.source) / "s0.tar"
    fresh = write_tars(tmp_path / "new", 1, SAMPLES, size)[0].read_bytes()
    path.write_bytes(fresh.replace(before[:size], bytes(size)))
    with pytest.raises(DataError, match=r"s0\.tar could not be read after 6 attempts .*open the dataset again"):
        dataset[0]
    with pytest.raises(DataError, match=r"s0\.tar changed after the dataset was opened"):
        dataset[0]
    again = IndexedWebDataset(urls_of(site), cache_dir=tmp_path / "c", cache_limit=SIZE)
    assert again[0]["bin"] == bytes(size)


def test_a_cached_shard_that_someone_cut_is_brought_again(web, here, tmp_path):
    IndexedWebDataset(urls_of(web), cache_dir=tmp_path)[0]
    os.truncate(next(tmp_path.glob("s0.tar.*.shard")), 5000)
    assert plain(IndexedWebDataset(urls_of(web), cache_dir=tmp_path)) == plain(IndexedWebDataset(here))


def test_no_tar_is_told_by_its_url_and_not_kept(site, tmp_path):
    (Path(site.source) / "s0.tar").write_bytes(b"<html>" * 3000)
    for _ in range(2):
        with pytest.raises(DataError, match=rf"{site.url}/s0\.tar \(18,000 bytes\) is no tar"):
            IndexedWebDataset(urls_of(site), cache_dir=tmp_path / "c")
    assert not list((tmp_path / "c").glob("s0*"))


def test_a_failure_that_took_long_is_not_waited_for_again_at_each_sample(web, tmp_path, monkeypatch):
    dataset = IndexedWebDataset(urls_of(web), cache_dir=tmp_path)
    monkeypatch.setattr("infobatch_stream.sources.remote.retry.PAUSE", 0.05)
    fault = web.fail(r"s0\.tar$", status=500)
    for sample in range(SAMPLES):
        with pytest.raises(DataError, match=r"s0\.tar could not be read after 6 attempts"):
            dataset[sample]
    assert gets(web, ".tar") == {"s0.tar": 6}
    web.mend(fault)
    assert pickle.loads(pickle.dumps(dataset))[0]["cls"] == b"0"
    monkeypatch.setattr(cached_tar, "_REMEMBERED", 0)
    assert dataset[0]["cls"] == b"0"


# ---- under the loader


def picks_of(dataset, store, **options):
    loader = InfoBatchLoader(dataset, store, batch_size=8, epochs=2, shuffle_window=16, **options)
    seen = []
    try:
        for epoch in range(2):
            for numbers, picks in loader:
                good = picks.weight > 0
                assert numbers[good].tolist() == picks.index[good].tolist()
                loader.update(loss_of(picks.index, epoch), picks)
                seen.append((picks.index.tolist(), picks.weight.tolist()))
    except DataError as error:
        # Torch keeps an error that a worker sent in a cycle, and the collector ends workers after ten seconds only.
        traceback.clear_frames(error.__traceback__)
        raise DataError(str(error)) from None
    return seen


@pytest.mark.parametrize("limit", [None, 2 * SIZE])
@pytest.mark.parametrize("workers", [{}, FORK], ids=["alone", "workers"])
@pytest.mark.filterwarnings("ignore:.*cache_limit:RuntimeWarning", "ignore:.*cache_limit:UserWarning")
def test_a_run_is_that_of_local_shards_though_servers_fail_now_and_then(web, here, tmp_path, workers, limit):
    dataset = IndexedWebDataset(urls_of(web), cache_dir=tmp_path / "c", cache_limit=limit).map(number_of)
    web.fail(r"\.tar$", status=503, times=2)
    web.fail(r"\.tar$", after=20_000, times=1)
    web.fail(r"\.tar$", after=20_000, then="flip", times=1)
    found = picks_of(dataset, tmp_path / "a.zarr", **workers)
    assert found == picks_of(IndexedWebDataset(here).map(number_of), tmp_path / "b.zarr")
    if limit is None:
        assert sum(gets(web, ".tar").values()) == SHARDS + 4


@pytest.mark.parametrize("workers", [{}, FORK], ids=["alone", "workers"])
@pytest.mark.parametrize("fault", [{"status": 404}, {"status": 403}, {"status": 500}, {"after": 9, "then": "hang"}])
def test_a_shard_that_cannot_be_had_ends_the_run_with_its_url_in_seconds(web, tmp_path, monkeypatch, workers, fault):
    if fault.get("then"):
        monkeypatch.setattr(downloads, "TIMEOUT", 0.2)
    dataset = IndexedWebDataset(urls_of(web), cache_dir=tmp_path / "c").map(number_of)
    web.fail(r"s2\.tar$", methods=("GET",), **fault)
    begun = time.monotonic()
    with pytest.raises(DataError, match=rf"{web.url}/s2\.tar could not be read"):
        picks_of(dataset, tmp_path / "a.zarr", **workers)
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("fault", [{"status": 404}, {"status": 500}], ids=str)
def test_with_replace_a_broken_shard_changes_no_number_of_steps(web, here, tmp_path, fault):
    dataset = IndexedWebDataset(urls_of(web), cache_dir=tmp_path / "c").map(number_of)
    web.fail(r"s2\.tar$", **fault)
    with pytest.warns(match=r"s2\.tar could not be read"):
        found = picks_of(dataset, tmp_path / "a.zarr", on_error="replace", **FORK)
    whole = picks_of(IndexedWebDataset(here).map(number_of), tmp_path / "b.zarr")
    assert [len(index) for index, _ in found[:4]] == [len(index) for index, _ in whole[:4]]
    used = {number for index, weight in found for number, w in zip(index, weight, strict=True) if w}
    assert used == set(range(32)) - set(range(16, 24))


def test_a_process_that_is_killed_in_a_download_costs_the_next_nothing_but_time(web, here, tmp_path):
    IndexedWebDataset(urls_of(web), cache_dir=tmp_path)  # the indexes
    stop = web.fail(r"s0\.tar$", after=30_000, then="hang")
    with Child(remote.ensure_all, [f"{web.url}/s0.tar"], str(tmp_path)) as child:
        assert child.hears() == "begins"
        until(lambda: any(path.stat().st_size > 20_000 for path in tmp_path.glob("*.part")))
        child.signal(signal.SIGKILL)
        child.ends()
    web.mend(stop)
    assert plain(IndexedWebDataset(urls_of(web), cache_dir=tmp_path)) == plain(IndexedWebDataset(here))
    assert not list(tmp_path.glob("*.part"))


# ---- ranks


def run_ranks(url, urls, cache, out):
    """(exit code, output, seconds) of two ranks."""
    run = ["-m", "torch.distributed.run", "--standalone", "--max-restarts", "0", "--nproc-per-node", "2"]
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, *run, HERE / "remote_tars.py", urls, cache, out],
        env={**environment(), **(s3_environment(url) if url else {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr, time.monotonic() - begun


@pytest.mark.ddp
def test_two_ranks_and_their_workers_fetch_each_shard_once(s3, tmp_path):
    with FaultyServer(s3.url) as proxy:
        code, output, _ = run_ranks(proxy.url, "s3://shards/train", tmp_path / "c", tmp_path)
        assert code == 0, output
        assert gets(proxy, ".tar") == EACH
        assert gets(proxy, ".npz") == INDEXES
    seen = [number for rank in (0, 1) for number in json.loads((tmp_path / f"seen-{rank}").read_text())]
    assert sorted(seen) == list(range(SHARDS * SAMPLES))


@pytest.mark.ddp
def test_two_ranks_of_which_one_meets_a_shard_that_is_not_there_both_end_in_seconds(web, tmp_path):
    web.fail(r"s2\.tar$", methods=("GET",), status=404)
    code, output, seconds = run_ranks("", urls_of(web), tmp_path / "c", tmp_path)
    assert code != 0
    assert f"{web.url}/s2.tar could not be read after 1 attempt" in output
    assert any(f"{web.url}/s2.tar" in (error_of_rank(tmp_path, rank) or ["", ""])[1] for rank in (0, 1))
    assert seconds < 30
