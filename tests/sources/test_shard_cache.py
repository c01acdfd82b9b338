"""The cache folder: shared by processes, never over its limit, never with a file that is not whole."""

import os
import pickle
import resource
import signal
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from support.ddp import remote_tars as remote
from support.ddp.children import Child, until
from support.ddp.remote_tars import write_tars
from support.servers import FaultyServer

from infobatch_stream import ConfigError, DataError, IndexedWebDataset
from infobatch_stream.sources.remote import download as downloads
from infobatch_stream.sources.remote import shard_cache
from infobatch_stream.sources.remote.shard_cache import ShardCache

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
SIZE = 81_920  # of a shard


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("infobatch_stream.sources.remote.retry.PAUSE", 0.01)
    monkeypatch.setattr(downloads, "TIMEOUT", 5.0)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    assert {path.stat().st_size for path in write_tars(folder, shards=6, size=8000)} == {SIZE}
    return folder


@pytest.fixture
def web(site):
    with FaultyServer(site) as web:
        yield web


def urls_of(web, shards=6):
    return [f"{web.url}/s{shard}.tar" for shard in range(shards)]


def names(folder):
    return sorted(path.name.partition(".tar.")[0] for path in folder.iterdir() if path.suffix == ".shard")


def only_shards(folder):
    return {path.suffix for path in folder.iterdir()} <= {".shard", ""}  # ".lock" has no suffix


@contextmanager
def watched(folder):
    """The largest size that shards and their parts had together meanwhile, as a list of one."""
    most, end = [0], threading.Event()

    def sizes():
        found = {}
        for path in folder.iterdir() if folder.exists() else ():
            if path.suffix in {".shard", ".part"}:  # locks and reservations are a few bytes, and do not count
                with suppress(FileNotFoundError):
                    found[path.name] = path.stat().st_size
        return found

    def look():
        while not end.wait(0.001):
            if (found := sizes()) == sizes():  # else one may have gone before another came, and both were seen
                most[0] = max(most[0], sum(found.values()))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        end.set()
        thread.join()


# ---- names


def test_equal_names_in_different_folders_do_not_meet(tmp_path):
    for folder, size in (("a", 10), ("b", 20), ("b/c", 30)):
        (tmp_path / "site" / folder).mkdir(parents=True)
        (tmp_path / "site" / folder / "s.tar").write_bytes(bytes(size))
    cache = ShardCache(tmp_path / "cache")
    with FaultyServer(tmp_path / "site") as web:
        for folder, size in (("a", 10), ("b", 20), ("b/c", 30)):
            assert not cache.place(f"{web.url}/{folder}/s.tar").exists()
            path = cache.ensure_local(f"{web.url}/{folder}/s.tar", size)
            assert Path(path).stat().st_size == size
            assert cache.place(f"{web.url}/{folder}/s.tar").exists()


@pytest.mark.parametrize("name", ["n" * 500, "é" * 300, "a b?c=d&e", "..", "%2e%2e", "a\nb", "\udcff"])
def test_any_url_has_a_name_in_the_folder(tmp_path, name):
    place = ShardCache(tmp_path).place(f"s3://bucket/{name}")
    assert place.parent == tmp_path
    place.touch()
    assert shard_cache._OURS.fullmatch(place.name)


def test_the_default_folder_is_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ShardCache().folder == tmp_path / "infobatch-stream"


# ---- limits as text


@pytest.mark.parametrize(
    ("limit", "size"),
    [(1, 1), ("100", 100), ("1kb", 1024), ("1.5 MB", 3 * 2**19), ("200GB", 200 * 2**30), ("2t", 2**41), ("7b", 7)],
)
def test_a_limit_may_have_a_unit(tmp_path, limit, size):
    assert ShardCache(tmp_path, limit).limit == size


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "", "gb", "-1gb", "0", "1 pb", "1e9", "nan"])
def test_a_limit_that_is_none_is_refused(tmp_path, limit):
    with pytest.raises(ConfigError, match="cache_limit"):
        ShardCache(tmp_path, limit)


def test_a_limit_below_one_shard_is_refused_with_both_numbers(tmp_path, web):
    for size in (SIZE, None):
        with pytest.raises(ConfigError, match=rf"cache_limit is 81,919 bytes, but .*{web.url}/s0\.tar has 81,920"):
            ShardCache(tmp_path, SIZE - 1).ensure_local(urls_of(web)[0], size)
    assert only_shards(tmp_path)
    assert names(tmp_path) == []


# ---- several at once


def test_four_processes_that_want_the_same_shards_fetch_each_once(tmp_path, web):
    web.rate = 2e6
    with ExitStack() as stack:
        children = [stack.enter_context(Child(remote.ensure_all, urls_of(web), str(tmp_path / "c"))) for _ in range(4)]
        for child in children:
            assert child.hears() == "begins"
        assert [child.result() for child in children] == [dict.fromkeys(urls_of(web), SIZE)] * 4
    assert dict(web.gets) == {f"/s{shard}.tar": 1 for shard in range(6)}
    assert only_shards(tmp_path / "c")


def test_one_that_fails_fails_for_those_that_wait_too(tmp_path, web):
    web.fail("s0", status=500)
    errors = []

    def download():
        try:
            ShardCache(tmp_path).ensure_local(urls_of(web)[0])
        except DataError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=download) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 5
    assert len(set(errors)) == 1
    assert web.gets["/s0.tar"] < 3 * downloads.ATTEMPTS
    assert not list(tmp_path.glob("*.tar*"))
    web.mend()
    assert ShardCache(tmp_path).ensure_local(urls_of(web)[0])


# ---- the limit


@pytest.mark.parametrize("shards", [1, 3])
def test_processes_never_exceed_the_limit(tmp_path, web, shards):
    folder, limit = tmp_path / "c", shards * SIZE + 100
    web.rate = 20e6
    with watched(folder) as most, ExitStack() as stack:
        children = [
            stack.enter_context(Child(remote.ensure_all, urls_of(web), str(folder), limit, 4)) for _ in range(2)
        ]
        cache = ShardCache(folder, limit)
        for url in urls_of(web) * 3:
            assert len(remote.read(cache, url)) == SIZE
        for child in children:
            assert child.hears() == "begins"
            assert child.result() == dict.fromkeys(urls_of(web), SIZE)
    assert SIZE <= most[0] <= limit
    assert only_shards(folder)
    assert 1 <= len(names(folder)) <= shards


def test_what_was_wanted_longest_ago_goes_first(tmp_path, web):
    cache = ShardCache(tmp_path, 3 * SIZE)
    urls = urls_of(web)
    for shard in (0, 1, 2, 0, 1, 3):
        cache.ensure_local(urls[shard], SIZE)
        time.sleep(0.002)
    assert names(tmp_path) == ["s0", "s1", "s3"]
    assert cache.ensure_local(urls[0], SIZE)
    assert web.gets["/s0.tar"] == 1
    cache.ensure_local(urls[4], SIZE)
    assert names(tmp_path) == ["s0", "s3", "s4"]


def test_a_file_of_unknown_size_claims_more_as_it_grows_and_begins_again_rather_than_wait_with_room(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(shard_cache, "_FIRST", 1000)
    cache = ShardCache(tmp_path, 10_000)
    barrier = threading.Barrier(2, timeout=5)
    begun = []

    def make(part, need):
        begun.append(part)
        with part.open("wb", buffering=0) as file:
            for size in range(500, 6001, 500):
                need(size)
                file.write(bytes(500))
                if size == 3000 and len(begun) <= 2:
                    barrier.wait()  # both have reserved 4000 now, and neither can have 8000

    def fill(name):
        cache.fill(cache.place(name), name, make, lambda: False, None)

    with watched(tmp_path) as most:
        threads = [threading.Thread(target=fill, args=(name,)) for name in ("x", "y")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert most[0] <= 10_000
    assert len(begun) in (3, 4)
    assert len(list(tmp_path.glob("*.shard"))) == 1


def test_a_shard_that_is_finished_while_the_others_are_counted_is_counted(tmp_path, monkeypatch):
    cache = ShardCache(tmp_path, 10_000)
    shard, other = cache.place("x"), cache.place("y")
    room = shard.with_name(f"{shard.name}.room")
    room.write_text("6000")
    listed = ShardCache._ours

    def finished_since(self):
        found = list(listed(self))
        shard.write_bytes(bytes(6000))
        room.unlink()
        return found

    monkeypatch.setattr(ShardCache, "_ours", finished_since)
    assert cache.reserve(other, 6000)
    assert not shard.exists()


def test_files_of_others_in_the_folder_are_never_removed(tmp_path, web):
    theirs = [
        "mine.tar",
        "s0.tar",
        f"x.{'0' * 32}.tar",
        "a.shard",
        f"x.{'0' * 31}.shard",
        "x.part",
        "y.claim",
        "z.room",
    ]
    for name in theirs:
        (tmp_path / name).write_bytes(bytes(SIZE))
    cache = ShardCache(tmp_path, SIZE)
    for url in urls_of(web):
        cache.ensure_local(url)
    assert all((tmp_path / name).stat().st_size == SIZE for name in theirs)
    assert len(list(tmp_path.glob("s*.tar.*.shard"))) == 1


# ---- faults of this machine


@pytest.mark.parametrize("limit", [None, 2 * SIZE])
def test_what_a_killed_process_left_is_never_read_and_is_removed(tmp_path, web, limit):
    folder = tmp_path / "c"
    stop = web.fail("s0", after=SIZE // 2, then="hang")
    with Child(remote.ensure_all, urls_of(web)[:1], str(folder), limit) as child:
        assert child.hears() == "begins"
        until(lambda: any(path.stat().st_size >= 2**15 for path in folder.glob("*.part")))
        other = threading.Thread(target=ShardCache(folder, limit).ensure_local, args=[urls_of(web)[0]])
        other.start()  # it waits
        web.mend(stop)
        time.sleep(0.1)
        assert other.is_alive()
        child.signal(signal.SIGKILL)
        other.join(5)
        assert not other.is_alive()
    assert only_shards(folder)
    assert Path(ShardCache(folder).find(urls_of(web)[0])).read_bytes() == (web.source / "s0.tar").read_bytes()


@pytest.mark.parametrize("limit", [None, 2 * SIZE])
def test_what_a_killed_process_left_of_a_shard_that_nobody_wants_is_removed_too(tmp_path, web, limit):
    folder = tmp_path / "c"
    web.fail("s0", after=SIZE // 2, then="hang")
    with Child(remote.ensure_all, urls_of(web)[:1], str(folder), limit) as child:
        assert child.hears() == "begins"
        until(lambda: any(path.stat().st_size >= 2**15 for path in folder.glob("*.part")))
        child.signal(signal.SIGKILL)
        child.ends()
    assert list(folder.glob("s0*.part"))
    ShardCache(folder, limit).ensure_local(urls_of(web)[1])
    assert only_shards(folder)
    assert names(folder) == ["s1"]


def test_a_full_disk_is_told_with_the_folder_and_leaves_nothing(tmp_path, web):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, before[1]))
    try:
        with pytest.raises(DataError, match=rf"s0\.tar could not be kept in {tmp_path} \(File too large\).*cache_dir="):
            ShardCache(tmp_path).ensure_local(urls_of(web)[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
    assert web.gets["/s0.tar"] == 1
    assert ShardCache(tmp_path).ensure_local(urls_of(web)[0])


def test_a_folder_that_cannot_be_made_is_told(tmp_path, web):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"could not be kept in .*file/sub \(Not a directory\)"):
        ShardCache(tmp_path / "file" / "sub").ensure_local(urls_of(web)[0])


def test_a_folder_that_is_removed_meanwhile_is_made_again(tmp_path, web):
    cache = ShardCache(tmp_path / "c")
    path = Path(cache.ensure_local(urls_of(web)[0]))
    path.unlink()
    path.parent.rmdir()
    assert not cache.place(urls_of(web)[0]).exists()
    assert cache.ensure_local(urls_of(web)[0]) == str(path)


def test_a_file_of_another_size_than_expected_is_brought_anew(tmp_path, web):
    cache = ShardCache(tmp_path)
    path = cache.ensure_local(urls_of(web)[0])
    os.truncate(path, 1000)
    assert Path(cache.ensure_local(urls_of(web)[0], SIZE)).stat().st_size == SIZE
    assert web.gets["/s0.tar"] == 2


def test_it_travels_to_other_processes(tmp_path, web):
    cache = ShardCache(tmp_path, "1gb")
    cache.ensure_local(urls_of(web)[0])
    data = pickle.dumps(cache)
    assert len(data) < 500
    assert pickle.loads(data).find(urls_of(web)[0])


def test_a_relative_folder_stays_where_it_was_when_the_working_folder_changes(web, tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    dataset = IndexedWebDataset(urls_of(web, 2), cache_dir="cache")
    monkeypatch.chdir(tmp_path / "sub")
    assert len([dataset[index] for index in range(len(dataset))]) == len(dataset)
    assert not list((tmp_path / "sub").iterdir())
    assert (tmp_path / "cache").is_dir()
