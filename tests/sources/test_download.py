"""Files from servers that fail in all the ways that servers do: whole, or an error that says what and where."""

import os
import random
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.http import HTTPFileSystem
from s3fs import S3FileSystem
from support.ddp import remote_tars as remote
from support.ddp.children import Child
from support.servers import FaultyServer, s3_environment, s3_server, use_s3

from infobatch_stream import DataError, MissingExtraError
from infobatch_stream.sources.remote import download as downloads
from infobatch_stream.sources.remote.download import (
    BadBytesError,
    NotThereError,
    SpoiledError,
    download,
    list_files,
    size_of,
)

DATA = random.Random(0).randbytes(300_000)
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture(scope="module")
def s3():
    with s3_server() as s3:
        s3.put("a/x.bin", DATA)
        yield s3


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("infobatch_stream.sources.remote.retry.PAUSE", 0.01)
    monkeypatch.setattr(downloads, "TIMEOUT", 5.0)


@pytest.fixture(params=["http", "s3"])
def place(request, s3, tmp_path, monkeypatch, quick):
    """(server, url of DATA there)."""
    if request.param == "http":
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "x.bin").write_bytes(DATA)
        with FaultyServer(tmp_path / "site") as server:
            yield server, f"{server.url}/x.bin"
    else:
        with FaultyServer(s3.url) as server:
            use_s3(monkeypatch, server.url)
            yield server, "s3://shards/a/x.bin"


def gets(server):
    return sum(count for path, count in server.gets.items() if path.endswith("x.bin"))


def failing(url, folder, **options):
    """The error of a download, which must leave nothing."""
    with pytest.raises(DataError) as caught:
        download(url, folder / "part", **options)
    assert not (folder / "part").exists()
    assert url in str(caught.value)
    return caught.value


def test_a_file_comes_as_it_is_with_one_get(place, tmp_path):
    server, url = place
    download(url, tmp_path / "part", len(DATA))
    assert (tmp_path / "part").read_bytes() == DATA
    assert gets(server) == 1
    assert size_of(url) == len(DATA)


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 500},
        {"status": 503},
        {"status": 429},
        {"after": 70_000},
        {"after": 0},
        {"after": 70_000, "then": "hang"},
        {"status": None},  # never answers
    ],
    ids=str,
)
def test_what_passes_is_tried_again_until_it_works(place, tmp_path, monkeypatch, fault):
    if fault in ({"status": None}, {"after": 70_000, "then": "hang"}):
        monkeypatch.setattr(downloads, "TIMEOUT", 0.3)
    server, url = place
    server.fail("x.bin", times=2, methods=("GET",), **fault)
    download(url, tmp_path / "part", len(DATA))
    assert (tmp_path / "part").read_bytes() == DATA
    assert gets(server) == 3


@pytest.mark.parametrize("fault", [{"status": 500}, {"after": 70_000}, {"after": 9, "then": "hang"}], ids=str)
def test_what_does_not_pass_ends_with_the_url_the_attempts_and_the_cause(place, tmp_path, monkeypatch, fault):
    if fault.get("then"):
        monkeypatch.setattr(downloads, "TIMEOUT", 0.1)
    server, url = place
    server.fail("x.bin", methods=("GET",), **fault)
    error = failing(url, tmp_path)
    assert f"after {downloads.ATTEMPTS} attempts (" in str(error)
    assert "Check the server" in str(error)
    assert gets(server) == downloads.ATTEMPTS or fault.get("then")  # if the machine is busy, one may not get so far


@pytest.mark.parametrize(("status", "advice"), [(404, "Check the url"), (403, "what the credentials permit")])
def test_what_is_not_there_or_not_permitted_is_asked_for_once(place, tmp_path, status, advice):
    server, url = place
    server.fail("x.bin", status=status)
    error = failing(url, tmp_path)
    assert isinstance(error, NotThereError)
    assert "after 1 attempt (" in str(error)
    assert advice in str(error)
    assert gets(server) == 1


@pytest.mark.parametrize("size", [len(DATA) - 1, len(DATA) + 1])
def test_another_size_is_tried_again_and_then_told_with_both_numbers(place, tmp_path, size):
    error = failing(place[1], tmp_path, size=size)
    assert isinstance(error, SpoiledError)
    assert f"{size:,}" in str(error)


def test_bytes_that_the_caller_refuses_are_tried_again(place, tmp_path):
    server, url = place

    def check(path):
        if path.read_bytes() != DATA:
            raise BadBytesError("they are spoiled")

    server.fail("x.bin", after=1000, then="flip", times=2)
    download(url, tmp_path / "part", check=check)
    assert gets(server) == 3
    server.fail("x.bin", after=1000, then="flip")
    assert "(they are spoiled). Upload it again" in str(failing(url, tmp_path, check=check))


def test_a_slow_server_may_take_longer_than_the_patience_with_a_silent_one(place, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "TIMEOUT", 0.4)
    server, url = place
    server.rate = 300_000
    begun = time.monotonic()
    download(url, tmp_path / "part")
    assert time.monotonic() - begun > 0.8
    assert gets(server) == 1


def test_a_server_that_is_gone_is_named(tmp_path, quick):
    with FaultyServer(tmp_path) as server:
        pass
    assert "Cannot connect" in str(failing(f"{server.url}/x.bin", tmp_path))


def test_missing_credentials_are_told_at_once(s3, tmp_path, monkeypatch, quick):
    use_s3(monkeypatch, s3.url)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    begun = time.monotonic()
    error = failing("s3://shards/a/x.bin", tmp_path)
    assert time.monotonic() - begun < 5
    assert "after 1 attempt (NoCredentialsError" in str(error)
    assert "AWS_ACCESS_KEY_ID" in str(error)


def test_a_protocol_without_its_package_names_the_extra(tmp_path, monkeypatch, quick):
    with pytest.raises(MissingExtraError, match=r"nobody://.*infobatch-stream\[remote\]"):
        download("nobody://x/y", tmp_path / "part")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(MissingExtraError, match=r"gs://.*infobatch-stream\[remote\]"):
        download("gs://x/y", tmp_path / "part")


def test_listing_tells_what_matches_or_nothing(place, s3):
    server, url = place
    if url.startswith("s3"):
        assert list_files("s3://shards/a/*.bin") == [url]
        assert list_files("s3://shards/b/*.bin") == []
        server.fail("shards", status=403)
        with pytest.raises(NotThereError, match="what the credentials permit"):
            list_files("s3://shards/a/*.bin")


# ---- file systems that block


class Stalling(fsspec.AbstractFileSystem):
    """Of a library that answers when it likes."""

    protocol = "stalling"
    calm = threading.Event()

    def get_file(self, rpath, lpath, callback=None, **options):
        if not self.calm.wait(0.5):
            raise OSError("late")
        Path(lpath).write_bytes(DATA)


def test_a_file_system_that_blocks_is_left_behind(tmp_path, monkeypatch, quick):
    monkeypatch.setattr(downloads, "TIMEOUT", 0.1)
    fsspec.register_implementation("stalling", Stalling, clobber=True)
    assert "TimeoutError: nothing came for 0.1 s" in str(failing("stalling://x", tmp_path))
    Stalling.calm.set()
    download("stalling://x", tmp_path / "part", len(DATA))


def test_a_file_system_that_is_not_asynchronous_serves_too(tmp_path, quick):
    fsspec.filesystem("memory").pipe("/a/x.bin", DATA)
    download("memory://a/x.bin", tmp_path / "part", len(DATA))
    assert (tmp_path / "part").read_bytes() == DATA
    assert size_of("memory://a/x.bin") == len(DATA)
    failing("memory://a/y.bin", tmp_path)


# ---- what a download does to its process


def test_random_numbers_of_users_do_not_depend_on_what_servers_do(place, tmp_path):
    server, url = place
    states = [random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()]
    server.fail("x.bin", status=500, times=3, methods=("GET",))
    download(url, tmp_path / "part")
    assert states == [random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()]


def test_threads_download_at_once(place, tmp_path):
    server, url = place
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: download(url, tmp_path / f"{n}", len(DATA)), range(16)))
    assert gets(server) == 16
    assert all((tmp_path / f"{n}").read_bytes() == DATA for n in range(16))


def test_a_process_that_was_forked_downloads_at_once_with_connections_of_its_own(place, tmp_path, monkeypatch):
    _, url = place
    parent = os.getpid()
    for kind in (HTTPFileSystem, S3FileSystem):
        close = kind.close_session

        def closing(*session, close=close):
            if os.getpid() != parent:  # which would take a second, for a loop that has no thread there
                os._exit(2)
            close(*session)

        monkeypatch.setattr(kind, "close_session", staticmethod(closing))
    download(url, tmp_path / "parent")
    child = os.fork()
    if not child:
        code = 1
        try:
            download(url, tmp_path / "child", len(DATA))
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (tmp_path / "child").read_bytes() == DATA
    download(url, tmp_path / "again")


@pytest.fixture
def ctrl_c():
    """Ctrl-C raises KeyboardInterrupt, also where this process was started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_a_download_and_leaves_nothing(place, tmp_path):
    server, url = place
    server.fail("x.bin", after=1000, then="hang")
    timer = threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT])
    timer.start()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        download(url, tmp_path / "part")
    assert time.monotonic() - begun < 5
    assert not (tmp_path / "part").exists()
    timer.join()


def test_a_large_file_takes_little_memory(tmp_path, s3):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "large").write_bytes(bytes(40_000_000))
    s3.put("large", bytes(40_000_000))
    with FaultyServer(tmp_path / "site") as server:
        for url in (f"{server.url}/large", "s3://shards/large"):
            with Child(remote.peak_of_download, url, str(tmp_path / "part"), s3_environment(s3.url)) as child:
                assert child.result() < 8e6
