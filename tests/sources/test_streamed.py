"""Compressed tars and commands: read once as a stream, then by index like any other shard."""

import bz2
import gzip
import importlib
import json
import lzma
import os
import shutil
import sys
from pathlib import Path

import pytest
from support.ddp.data import loss_of
from support.ddp.remote_tars import number_of, write_tars
from support.servers import FaultyServer, s3_server, use_s3

from infobatch_stream import ConfigError, DataError, IndexedWebDataset, InfoBatchLoader, MissingExtraError
from infobatch_stream import StreamedWebDataset as Streamed
from infobatch_stream.sources.remote import download as downloads
from infobatch_stream.sources.remote import shard_cache
from infobatch_stream.sources.webdataset.source import WdsSource

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
SHARDS, SAMPLES = 3, 8
SIZE = 51_200  # of a plain shard
FORK = {"num_workers": 2, "multiprocessing_context": "fork"}


def zstd(data):
    pyarrow = pytest.importorskip("pyarrow")
    return pyarrow.compress(data, codec="zstd", asbytes=True)


NO_SUM = ("flipped", "zst")
PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    monkeypatch.setattr("infobatch_stream.sources.remote.retry.PAUSE", 0.01)
    monkeypatch.setattr(downloads, "TIMEOUT", 5.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("here")
    write_tars(folder, SHARDS, SAMPLES)
    IndexedWebDataset(folder)
    return folder


@pytest.fixture
def packed(here, tmp_path):
    """Make the folder of the shards packed in a way; -> url with braces."""

    def packed(kind="gz", name="s{}.tar.{}"):
        (tmp_path / "packed").mkdir(exist_ok=True)
        for shard in range(SHARDS):
            data = PACKERS[kind]((here / f"s{shard}.tar").read_bytes())
            (tmp_path / "packed" / name.format(shard, kind)).write_bytes(data)
        return f"{tmp_path}/packed/" + name.format("{0..2}", kind)

    return packed


def plain(samples):
    """Without where they lie."""
    return [{name: value for name, value in sample.items() if name[:2] != "__"} for sample in samples]


# ---- the same samples


@pytest.mark.parametrize("kind", PACKERS)
def test_samples_are_those_of_the_plain_shards(here, packed, kind):
    dataset = Streamed(packed(kind))
    assert plain(dataset) == plain(IndexedWebDataset(here))
    assert [Path(sample["__url__"]).name for sample in dataset][::SAMPLES] == [f"s{n}.tar.{kind}" for n in range(3)]


def test_it_is_told_by_the_first_bytes_how_a_shard_is_packed(here, packed):
    assert plain(Streamed(packed("xz", "s{}.tgz"))) == plain(IndexedWebDataset(here))


def test_a_file_of_several_packed_parts_is_read_to_its_end(here, tmp_path):
    data = (here / "s0.tar").read_bytes()
    for kind, pack in PACKERS.items():
        (tmp_path / f"s.tar.{kind}").write_bytes(pack(data[:20_000]) + pack(data[20_000:]))
    samples = plain(IndexedWebDataset(here / "s0.tar"))
    assert plain(Streamed(tmp_path)) == samples * 4


@pytest.mark.parametrize(
    "command", ["cat HERE/sN.tar", "gzip -c HERE/sN.tar", "head -c 3 HERE/sN.tar; sleep 0.1; tail -c +4 HERE/sN.tar"]
)
def test_commands_give_samples(here, command):
    commands = [command.replace("N", str(shard)).replace("HERE", str(here)) for shard in range(SHARDS)]
    assert plain(Streamed([f"pipe:{command}" for command in commands])) == plain(IndexedWebDataset(here))


def test_braces_of_commands_are_those_of_webdataset(here):
    assert plain(Streamed(f"pipe:cat {here}/s{{0..2}}.tar")) == plain(IndexedWebDataset(here))


def test_a_command_may_have_braces_of_its_own(here):
    assert len(Streamed(f"pipe:awk 'BEGIN {{ }}'; cat {here}/s0.tar")) == SAMPLES
    assert len(Streamed(f"pipe:echo '{{' >&2; cat {here}/s0.tar")) == SAMPLES


def test_what_can_be_read_by_index_is_and_all_kinds_go_together(here, packed, tmp_path):
    packed()
    urls = [here / "s0.tar", tmp_path / "packed" / "s1.tar.gz", f"pipe:cat {here}/s2.tar"]
    dataset = Streamed(urls)
    assert plain(dataset) == plain(IndexedWebDataset(here))
    assert sum(path.suffix == ".shard" for path in (tmp_path / "xdg/infobatch-stream").iterdir()) == 2
    packed("xz")
    assert len(Streamed(tmp_path / "packed")) == 2 * SHARDS * SAMPLES  # a folder


@pytest.mark.parametrize("server", ["http", "s3"])
def test_packed_shards_of_servers_are_fetched_once(here, packed, tmp_path, monkeypatch, server):
    packed()
    if server == "http":
        with FaultyServer(tmp_path / "packed") as web:
            for _ in range(2):
                assert plain(Streamed(f"{web.url}/s{{0..2}}.tar.gz")) == plain(IndexedWebDataset(here))
            assert sum(web.gets.values()) == SHARDS
    else:
        with s3_server() as s3, FaultyServer(s3.url) as proxy:
            s3.put_folder(tmp_path / "packed", "packed")  # moto has one store for all servers of a process
            use_s3(monkeypatch, proxy.url)
            for _ in range(2):
                assert plain(Streamed("s3://shards/packed")) == plain(IndexedWebDataset(here))
            assert sum(count for path, count in proxy.gets.items() if path.endswith("gz")) == SHARDS


@pytest.mark.parametrize("url", ["s.tar.gz", "pipe:gzip -dc s.tar.gz"])
def test_a_relative_path_means_what_it_did_when_the_dataset_was_made(here, tmp_path, monkeypatch, url):
    folders = [tmp_path / "one", tmp_path / "two"]
    for shard, folder in enumerate(folders):
        folder.mkdir()
        (folder / "s.tar.gz").write_bytes(gzip.compress((here / f"s{shard}.tar").read_bytes()))

    def made(folder):
        monkeypatch.chdir(folder)
        return Streamed(url, counts=SAMPLES, cache_dir=tmp_path / "cache")

    wanted = [plain(IndexedWebDataset(here / f"s{shard}.tar")) for shard in range(2)]
    first, second = map(made, folders)
    assert plain(first) == wanted[0]
    assert plain(second) == wanted[1]
    assert plain(made(folders[0])) == wanted[0]  # as the cache has it
    gone = made(folders[0])
    shutil.rmtree(tmp_path / "cache")
    shutil.rmtree(folders[0])
    with pytest.raises(DataError, match=r"one/s\.tar\.gz cannot be read|The command of"):
        gone[0]


def test_stages_and_source_are_those_of_an_indexed_dataset(packed):
    dataset = Streamed(packed()).map(number_of)
    assert type(dataset) is Streamed
    assert list(dataset) == list(range(24))
    with pytest.raises(ConfigError, match=r"StreamedWebDataset has no shuffle\(\)"):
        dataset.shuffle(100)
    source = WdsSource(dataset)
    assert source.is_remote
    source.ensure_local(1)
    assert source.read_many([23, 0]) == [23, 0]


def test_a_shard_that_is_written_anew_is_read_anew(here, packed, tmp_path):
    url = packed()
    before = len(Streamed(url))
    write_tars(tmp_path / "new", 1, 5)
    (tmp_path / "packed" / "s0.tar.gz").write_bytes(gzip.compress((tmp_path / "new" / "s0.tar").read_bytes()))
    assert (before, len(Streamed(url))) == (24, 21)


# ---- each shard once


def counting(here, tmp_path):
    """Commands that leave a line in a file of the shard whenever they run."""
    return [f"pipe:echo x >> {tmp_path}/runs{n}; cat {here}/s{n}.tar" for n in range(SHARDS)]


def runs(tmp_path):
    return [len((tmp_path / f"runs{n}").read_text()) // 2 if (tmp_path / f"runs{n}").exists() else 0 for n in range(3)]


def test_without_counts_each_shard_is_read_once_and_never_again(here, tmp_path):
    urls = counting(here, tmp_path)
    for _ in range(2):
        assert plain(Streamed(urls)) == plain(IndexedWebDataset(here))
    assert runs(tmp_path) == [1, 1, 1]


@pytest.mark.parametrize("form", ["one", "list", "dict", "names", "file", "file of one"])
def test_with_counts_only_what_is_read_is_opened(here, tmp_path, form):
    urls = counting(here, tmp_path)
    counts = {
        "one": 8,
        "list": [8, 8, 8],
        "dict": dict.fromkeys(urls, 8),
        "names": {f"s{n}.tar": 8 for n in range(SHARDS)},
        "file": tmp_path / "counts.json",
        "file of one": str(tmp_path / "counts.json"),
    }[form]
    (tmp_path / "counts.json").write_text(json.dumps(dict.fromkeys(urls, 8) if form == "file" else 8))
    dataset = Streamed(urls, counts)
    assert len(dataset) == 24
    assert runs(tmp_path) == [0, 0, 0]
    assert dataset[9]["cls"] == b"9"
    assert runs(tmp_path) == [0, 1, 0]
    assert WdsSource(dataset).fingerprint == WdsSource(Streamed(urls)).fingerprint


def test_a_count_that_is_wrong_is_told_with_both_numbers(here, tmp_path):
    dataset = Streamed(counting(here, tmp_path), [8, 7, 8])
    assert dataset[0]["cls"] == b"0"
    for _ in range(2):
        with pytest.raises(DataError, match=r"s1\.tar has 8 samples, but counts says 7"):
            dataset[8]
    assert runs(tmp_path) == [1, 1, 0]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([8, 8], "2 numbers for 3 shards"),
        ({"s0.tar": 8}, "no number for 2 of 3 shards, as .*s1.tar"),
        (-1, r"counts \(of .*s0\.tar.*\)=-1"),
        ([8, 8, 1.5], r"s2\.tar.*=1.5"),
        ("gone.json", "no JSON file"),
        ([8, 8, None], r"s2\.tar.*=None"),
    ],
    ids=str,
)
def test_counts_that_do_not_fit_are_refused(here, tmp_path, counts, message):
    with pytest.raises(ConfigError, match=message):
        Streamed(counting(here, tmp_path), counts)


def test_a_json_file_that_is_damaged_is_refused(here, tmp_path):
    for text in ("", "[8", "null", '"8"', "[" * 100_000, '{"a": 8}'):
        (tmp_path / "counts.json").write_text(text)
        with pytest.raises(ConfigError, match="counts"):
            Streamed(counting(here, tmp_path), tmp_path / "counts.json")


# ---- the cache


def test_a_limit_of_one_shard_serves_and_what_was_removed_is_read_again(here, tmp_path):
    dataset = Streamed(counting(here, tmp_path), 8, cache_dir=tmp_path / "c", cache_limit=SIZE)
    for number in (0, 8, 16, 1, 9, 17):
        assert dataset[number]["cls"] == b"%d" % number
    assert runs(tmp_path) == [2, 2, 2]
    assert len(list((tmp_path / "c").glob("*.shard"))) == 1


def test_a_limit_has_to_hold_what_is_fetched_and_what_it_becomes(here, packed, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_cache, "_FIRST", 10_000)
    packed()
    fetched = max(path.stat().st_size for path in (tmp_path / "packed").iterdir())
    with FaultyServer(tmp_path / "packed") as web:
        url = f"{web.url}/s{{0..2}}.tar.gz"
        limit = SIZE + fetched
        assert plain(Streamed(url, cache_dir=tmp_path / "a", cache_limit=limit)) == plain(IndexedWebDataset(here))
        with pytest.raises(ConfigError, match=r"cache_limit is .*/s0\.tar\.gz has"):
            Streamed(url, cache_dir=tmp_path / "b", cache_limit=SIZE + 100)
    assert not list((tmp_path / "b").glob("s*"))


def test_a_command_that_gives_other_bytes_each_time_is_noticed(here, tmp_path):
    url = f"pipe:cat {here}/s0.tar; date +%N"
    dataset = Streamed([url, f"pipe:cat {here}/s1.tar"], cache_dir=tmp_path / "c", cache_limit=SIZE + 20)
    with pytest.raises(DataError, match=r"date \+%N gives other bytes than when it was indexed"):
        for number in (0, 8, 0, 8, 0):
            assert dataset[number]


# ---- faults


@pytest.mark.parametrize(
    ("kind", "damage"),
    # pyarrow's frames of zstd have no checksum, those of the program do
    [(kind, damage) for kind in PACKERS for damage in ("cut", "cut short", "flipped") if (damage, kind) != NO_SUM],
)
def test_a_damaged_shard_is_named_and_nothing_is_kept(packed, tmp_path, kind, damage):
    url = packed(kind)
    path = tmp_path / "packed" / f"s1.tar.{kind}"
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(
        {
            "cut": data[:middle],
            "cut short": data[:-3],
            "flipped": data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :],
        }[damage]
    )
    for _ in range(2):
        with pytest.raises(DataError, match=rf"s1\.tar\.{kind} cannot be read to its end"):
            Streamed(url)
    assert not list((tmp_path / "xdg/infobatch-stream").glob("s1*"))


def test_a_download_that_came_damaged_is_tried_again(here, packed, tmp_path):
    packed()
    with FaultyServer(tmp_path / "packed") as web:
        web.fail("s1", after=10_000, then="flip", times=1)
        web.fail("s2", after=10_000, times=2)
        assert plain(Streamed(f"{web.url}/s{{0..2}}.tar.gz")) == plain(IndexedWebDataset(here))
        assert dict(web.gets) == {"/s0.tar.gz": 1, "/s1.tar.gz": 2, "/s2.tar.gz": 3}
        web.fail("s1", status=404)
        with pytest.raises(DataError, match=rf"{web.url}/s1\.tar\.gz could not be read after 1 attempt"):
            Streamed(f"{web.url}/s{{0..2}}.tar.gz", cache_dir=tmp_path / "c")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("exit 3", r"failed \(exit status 3\)"),
        ("cat HERE/s0.tar; exit 1", r"failed \(exit status 1\)"),
        ("head -c 9999 HERE/s0.tar; exit 7", r"failed \(exit status 7\)"),
        ("kill -9 $$", r"failed \(exit status -9\)"),
        ("head -c 20000 HERE/s0.tar", r"\(20,000 bytes\) is no tar .* ends beyond the end"),
        ("gzip -c HERE/s0.tar | head -c 9000", "cannot be read to its end"),
        ("true", "is no tar"),
    ],
)
def test_a_command_that_fails_or_ends_early_is_named(here, tmp_path, command, message):
    command = command.replace("HERE", str(here))
    with pytest.raises(DataError, match=message) as caught:
        Streamed(f"pipe:{command}", cache_dir=tmp_path / "c")
    assert f"pipe:{command}" in str(caught.value)
    assert {path.name for path in (tmp_path / "c").iterdir()} <= {".lock"}


def test_a_command_is_not_run_where_webdataset_refuses_it(here, tmp_path, monkeypatch):
    monkeypatch.setattr("webdataset.utils.enforce_security", True)  # as WDS_SECURE=1 does when it is imported
    with pytest.raises(DataError, match="is not run: webdataset refuses commands"):
        Streamed(counting(here, tmp_path))
    assert runs(tmp_path) == [0, 0, 0]


def test_missing_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.tgz cannot be read \(No such file"):
        Streamed(tmp_path / "gone.tgz")


def test_without_a_library_for_zstd_one_is_named(packed, monkeypatch):
    url = packed("zst")
    for name in ("compression.zstd", "backports.zstd", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"pip install backports\.zstd.*pipe:zstd"):
        Streamed(url)


# ---- under the loader


@pytest.mark.parametrize("workers", [{}, FORK], ids=["alone", "workers"])
@pytest.mark.filterwarnings("ignore:.*cache_limit")
def test_a_run_is_that_of_plain_shards(here, tmp_path, workers):
    def picks_of(dataset, name, **options):
        loader = InfoBatchLoader(dataset, tmp_path / name, batch_size=8, epochs=2, shuffle_window=16, **options)
        seen = []
        for epoch in range(2):
            for numbers, picks in loader:
                assert numbers.tolist() == picks.index.tolist()
                loader.update(loss_of(picks.index, epoch), picks)
                seen.append((picks.index.tolist(), picks.weight.tolist()))
        return seen

    urls = counting(here, tmp_path)
    found = picks_of(Streamed(urls, 8).map(number_of), "a.zarr", **workers)
    assert found == picks_of(IndexedWebDataset(here).map(number_of), "b.zarr")
    assert runs(tmp_path) == [1, 1, 1]
    tight = Streamed(urls, 8, cache_dir=tmp_path / "c", cache_limit=2 * SIZE).map(number_of)
    assert picks_of(tight, "c.zarr", **workers) == found


def test_no_process_of_a_command_is_left(here, tmp_path, monkeypatch):
    gopen = importlib.import_module("webdataset.gopen")  # a function of that name hides it
    pids, popen = [], gopen.Popen

    def noted(*args, **options):
        process = popen(*args, **options)
        pids.append(process.pid)
        return process

    monkeypatch.setattr(gopen, "Popen", noted)
    monkeypatch.setattr(shard_cache, "_FIRST", 1000)
    with pytest.raises(ConfigError, match="cache_limit is 20,000 bytes"):
        Streamed(f"pipe:cat {here}/s0.tar /dev/zero", cache_dir=tmp_path / "c", cache_limit=20_000)
    with pytest.raises(ChildProcessError):
        os.waitpid(pids[0], os.WNOHANG)
    assert len(pids) == 1
