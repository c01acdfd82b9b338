"""MDS shards at a server: downloaded once, ahead of use, and with every fault that a server can have."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from streaming import MDSWriter, StreamingDataset
from streaming.base.dataset import _ShardState
from support.ddp.children import until
from support.ddp.data import loss_of, write_mds
from support.ddp.launch import environment, torchrun
from support.ddp.mds import Augmented
from support.mds_runs import FORK, SPAWN, train, within
from support.servers import FaultyServer, s3_environment, s3_server

from infobatch_stream import DataError, InfoBatchLoader, ScoreStore, SoftPruning
from infobatch_stream.planning.position import RunPosition
from infobatch_stream.sources.remote.single_flight import lock_path

pytestmark = [
    pytest.mark.usefixtures("no_stale_shared_memory", "few_open_files"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    # boto3's clients end with their process, and close nothing then
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]
SHARDS, ROWS = 20, 12
N = SHARDS * ROWS
OPTIONS = {"batch_size": 8, "epochs": 3, "delta": 1, "shuffle_window": 48}


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """The folder of a server: the bucket "b" has "plain", and "hashed", of which the index has checksums."""
    folder = tmp_path_factory.mktemp("server")
    write_mds(folder / "b" / "plain", samples=N, per_shard=ROWS)
    columns = {"i": "int", "pad": "bytes"}
    with MDSWriter(out=str(folder / "b" / "hashed"), columns=columns, hashes=["sha1"], size_limit=1000) as out:
        for i in range(48):
            out.write({"i": i, "pad": bytes(64)})
    return folder


@pytest.fixture
def server(bucket, monkeypatch):
    with FaultyServer(bucket) as server:
        for name, value in s3_environment(server.url).items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def make(tmp_path, server):
    """A loader over the shards at the server, with folders of its ``name``; options of the dataset are in ``data``."""

    def make(name="run", of="plain", kind=Augmented, data=None, **options):
        local = tmp_path / name / "local"
        dataset = kind(remote=f"s3://b/{of}", local=str(local), **{"download_retry": 1, **(data or {})})
        return InfoBatchLoader(dataset, tmp_path / name / "scores.zarr", **{**OPTIONS, **options})

    return make


def shard_gets(server):
    return {path: count for path, count in server.gets.items() if path.endswith(".mds")}


def here(tmp_path, name="run"):
    return {int(file.name.split(".")[1]) for file in (tmp_path / name / "local").glob("*.mds")}


def shards_of(index, rows=ROWS):
    return {i // rows for i in index}


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "infobatch-prefetch"]


# ---- what is read


WAYS = [({}, 0), ({}, 3), ({}, 64), (FORK, 0), ({**FORK, "persistent_workers": True}, 64), (SPAWN, 64)]


@pytest.mark.parametrize("ways", [WAYS[1:4], pytest.param(WAYS, marks=pytest.mark.slow)], ids=len)
def test_picks_and_samples_do_not_depend_on_what_is_downloaded_when(make, server, ways):
    """The augmentation neither; each shard is downloaded once."""
    wanted = None
    for number, (options, predownload) in enumerate(ways):
        server.gets.clear()
        with within(60):
            steps = train(make(str(number), predownload=predownload, epochs=2, **options))
        assert sum(shard_gets(server).values()) == SHARDS
        wanted = wanted or steps
        assert steps == wanted


def test_plain_columns_come_too(make):
    for data, picks in make(kind=StreamingDataset, epochs=1):
        assert data["i"].tolist() == picks.index.tolist()


def test_a_real_s3(bucket, tmp_path, monkeypatch):
    with s3_server() as s3, FaultyServer(s3.url) as proxy:
        for name, value in s3_environment(proxy.url).items():
            monkeypatch.setenv(name, value)
        url = s3.put_folder(bucket / "b" / "plain", "plain")
        dataset = Augmented(remote=url, local=str(tmp_path / "local"))
        steps = train(InfoBatchLoader(dataset, tmp_path / "scores.zarr", **{**OPTIONS, "epochs": 1}, **FORK))
        assert {i for _, index, *_ in steps for i in index} == set(range(N))
        assert set(shard_gets(proxy).values()) == {1}


def test_a_shard_without_a_kept_sample_is_never_downloaded(make, server, tmp_path):
    make("run", epochs=1).commit()
    store = ScoreStore.open(tmp_path / "run" / "scores.zarr")
    index = np.arange(N)
    store.record(index, np.where(index < N // 2, 0.0, 1.0).astype(np.float32) + index.astype(np.float32) * 1e-6)
    store.commit()
    del store
    loader = make("run", existing="continue", epochs=4, policy=SoftPruning(0.99))
    needed = set()
    for (_, _), picks in loader:
        needed |= shards_of(picks.index.tolist())
        loader.update(loss_of(picks.index), picks)
    assert len(needed) < SHARDS
    assert here(tmp_path) == needed
    assert len(shard_gets(server)) == len(needed)


@pytest.mark.parametrize("constant", [False, True])
def test_of_shards_without_an_included_sample_nothing_is_downloaded_from_a_real_s3(
    bucket, tmp_path, monkeypatch, constant
):
    chosen = {3, 11}  # a tenth of the shards
    include = [shard * ROWS + row for shard in chosen for row in range(0, ROWS, 2)]
    with s3_server() as s3, FaultyServer(s3.url) as proxy:
        for name, value in s3_environment(proxy.url).items():
            monkeypatch.setenv(name, value)
        dataset = Augmented(
            remote=s3.put_folder(bucket / "b" / "plain", "plain"), local=str(tmp_path / "run" / "local")
        )
        path = tmp_path / "run" / "scores.zarr"
        steps = train(InfoBatchLoader(dataset, path, include=include, constant_steps=constant, **OPTIONS))
        assert {i for _, index, *_ in steps for i in index} == set(include)
        assert here(tmp_path) == chosen
        assert list(shard_gets(proxy).values()) == [1, 1]


def test_before_the_first_batch_is_taken_no_more_is_asked_for_than_the_bound(make, server, tmp_path):
    for predownload in (0, 2, 10):
        name = f"ahead {predownload}"
        loader = make(name, predownload=predownload)
        unseen = np.full(N, np.nan, np.float32)
        plan = loader._run.config.plan(unseen, loader._run.source, RunPosition(), epochs=9, lanes=1, global_batch=8)
        batches = iter(loader)
        next(batches)
        until(lambda: not threads())
        bound = set().union(*(shards_of(plan.step(step).index.tolist()) for step in range(predownload + 1)))
        assert here(tmp_path, name) <= bound
        batches.close()


def test_the_first_batch_waits_for_its_own_shards_and_few_others(make, server, tmp_path):
    """On a narrow line; those that were begun when the last of its own was under way may come too."""
    server.rate = 40_000
    loader = make(**FORK)
    batches = iter(loader)
    _, picks = next(batches)
    own = shards_of(picks.index.tolist())
    # Two workers, each with its threads and the one that reads.
    assert len(here(tmp_path) - own) <= 6
    server.rate = None
    list(batches)


def test_a_resumed_run_looks_ahead_from_its_step(make, server, tmp_path):
    loader = make("first", epochs=1)
    states = []
    steps = train(loader, states)
    again = make("again", epochs=1, predownload=2)
    again.load_state_dict(states[20])
    server.gets.clear()
    batches = iter(again)
    _, picks = next(batches)
    assert picks.index.tolist() == steps[20][1]
    until(lambda: not threads())
    assert here(tmp_path, "again") <= set().union(*(shards_of(index) for _, index, *_ in steps[20:23]))


def test_under_a_limit_it_is_kept_and_too_small_a_one_is_told(make, tmp_path, bucket):
    size = max(file.stat().st_size for file in (bucket / "b" / "plain").glob("*.mds"))
    index = (bucket / "b" / "plain" / "index.json").stat().st_size
    limit = {"cache_limit": index + 8 * size}
    loader = make("enough", data=limit, epochs=2)
    assert loader._run.source.capacity == 8
    seen = 0
    for epoch in range(2):
        for _, picks in loader:
            loader.update(loss_of(picks.index, epoch), picks)
            seen = max(seen, len(here(tmp_path, "enough")))
    assert 5 < seen <= 8
    loader = make("small", data=limit, shuffle_window=240)
    with pytest.warns(RuntimeWarning, match=r"cache_limit .* about 8 shards, .*240 entries lies in 20"):
        iter(loader)


# ---- several ranks


@pytest.fixture(scope="module")
def ranks(bucket, tmp_path_factory):
    """By case, what 2 ranks with 2 workers each found, and how often the server was asked for each shard."""
    out = tmp_path_factory.mktemp("ranks")
    cases = {"sound": {}, "lost": {"status": 404}, "hanging": {}}
    with FaultyServer(bucket, rate=400_000) as server, pytest.MonkeyPatch.context() as patch:  # all want the same
        for name, value in s3_environment(server.url).items():
            patch.setenv(name, value)
        for name, fault in cases.items():
            (bucket / "b" / name).symlink_to(bucket / "b" / "plain")
            if name != "sound":
                server.fail(rf"{name}/shard\.00007", **fault)
        wanted = {name: (f"s3://b/{name}", {"download_retry": 1, "download_timeout": 3}) for name in cases}
        torchrun("remote.py", out, json.dumps(wanted), seconds=120)
    found = [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]
    return {name: [rank[name] for rank in found] for name in cases}, shard_gets(server)


@pytest.mark.ddp
def test_each_shard_is_downloaded_once_per_node_by_two_ranks_with_two_workers(ranks):
    found, gets = ranks
    assert [error for _, error in found["sound"]] == [None, None]
    assert sorted(i for indices, _ in found["sound"] for i in indices) == list(range(N))
    assert Counter(count for path, count in gets.items() if "sound" in path) == {1: SHARDS}


@pytest.mark.ddp
@pytest.mark.parametrize(("case", "words"), [("lost", "not found"), ("hanging", "Timeout")])
def test_all_ranks_stop_and_none_hangs(ranks, case, words):
    for _, (kind, text, seconds) in ranks[0][case]:
        assert kind == "DataError"
        assert f"s3://b/{case}/shard.00007.mds" in text
        assert words in text
        assert seconds < 30


# ---- faults that pass


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 500},
        {"status": 503},
        {"after": 300},
        {"after": 300, "then": "flip"},
        {"after": 300, "then": "hang"},
        {},
    ],
    ids=["500", "503", "cut", "flipped", "hangs in the middle", "hangs"],
)
def test_a_fault_that_passes_is_not_noticed(make, server, tmp_path, fault):
    server.fail(r"hashed/shard\.0000[12]", times=2, **fault)
    loader = make(of="hashed", data={"download_timeout": 1, "download_retry": 2}, epochs=1)
    with within(30):
        steps = train(loader)
    assert sorted(i for _, index, *_ in steps for i in index) == list(range(48))
    assert {file.suffix for file in (tmp_path / "run" / "local").iterdir()} == {".mds", ".json"}


def test_a_slow_server_is_waited_for(make, server):
    server.rate = 30_000
    with within(60):
        train(make(data={"download_timeout": 1}, epochs=1))


# ---- faults that last


@pytest.mark.parametrize(
    ("fault", "words", "gets"),
    [
        ({"status": 500}, "in 3 attempts: ClientError: .*500.*Check the server", 0),
        ({"status": 503}, "in 3 attempts: ClientError: .*503.*Check the server", 0),
        ({"status": 404}, r"plain/shard\.00007\.mds: ClientError: Object .* not found!.*Check the path", 0),
        ({"status": 403}, r"plain/shard\.00007\.mds: ClientError: .*Check the credentials", 0),
        ({"after": 300}, "in 3 attempts: .*Check the server", 3),
    ],
    ids=["500", "503", "404", "403", "cut"],
)
def test_a_fault_that_lasts_is_named(make, server, tmp_path, fault, words, gets):
    options = FORK if fault == {"status": 404} else {}  # torch takes 5 seconds to end its workers
    server.fail(r"shard\.00007", **fault)
    with within(30), pytest.raises(DataError, match=rf"s3://b/plain/shard\.00007\.mds.*{words}|{words}") as caught:
        train(make(**options))
    assert "shard.00007.mds is missing and could not be fetched from s3://b/plain/shard.00007.mds" in str(caught.value)
    assert server.gets["/b/plain/shard.00007.mds"] >= gets
    until(lambda: not threads())
    left = list((tmp_path / "run" / "local").glob("shard.00007*"))
    assert left in ([], [lock_path(tmp_path / "run" / "local" / "shard.00007.mds")])  # of a worker that torch ended
    server.mend()
    with within(30):
        assert len(train(make("again", epochs=1))) == N // 8


def test_bytes_that_are_not_those_of_the_index_are_never_read(make, server, tmp_path):
    """Nor taken for good by the next who comes: streaming leaves them on the disk."""
    server.fail(r"hashed/shard\.00001", after=300, then="flip")
    loader = make(of="hashed", epochs=1)
    for _ in range(2):
        with within(30), pytest.raises(DataError, match=r"hashed/shard\.00001\.mds in 3 attempts.*Checksum.*upload"):
            train(loader)
        until(lambda: not threads())
        assert not list((tmp_path / "run" / "local").glob("shard.00001*"))
    server.mend()
    with within(30):
        steps = train(loader)
    assert sorted(i for _, index, *_ in steps for i in index) == list(range(48))


def test_a_shard_of_another_size_than_the_index_says_is_refused(make, server, bucket, tmp_path):
    file = bucket / "b" / "plain" / "shard.00003.mds"
    whole = file.read_bytes()
    file.write_bytes(whole[:500])
    try:
        with within(30), pytest.raises(DataError, match=r"in 3 attempts.*came with 500 bytes.*upload it again"):
            train(make())
        until(lambda: not threads())
        assert not list((tmp_path / "run" / "local").glob("shard.00003*"))
        assert server.gets["/b/plain/shard.00003.mds"] % 3 == 0  # each attempt did ask
    finally:
        file.write_bytes(whole)


def test_a_file_here_that_is_cut_short_is_downloaded_again(make, server, tmp_path):
    train(make(epochs=1))
    os.truncate(tmp_path / "run" / "local" / "shard.00004.mds", 400)
    server.gets.clear()
    loader = make(epochs=1, existing="overwrite")
    steps = train(loader)
    assert sorted(i for _, index, *_ in steps for i in index) == list(range(N))
    assert shard_gets(server) == {"/b/plain/shard.00004.mds": 1}


def test_missing_credentials_are_told_at_once(make, server, monkeypatch):
    loader = make()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    begin = time.monotonic()
    with pytest.raises(DataError, match=r"s3://b/plain.*NoCredentialsError: .*Check the credentials"):
        train(loader)
    assert time.monotonic() - begin < 5


def test_a_server_that_is_gone_is_told(make, monkeypatch, tmp_path, bucket):
    loader = make()
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")
    with within(30), pytest.raises(DataError, match=r"in 3 attempts: EndpointConnectionError.*Check the server"):
        train(loader)


def test_an_index_that_is_missing_is_streamings_to_tell(make):
    with within(30), pytest.raises(Exception, match=r"s3://b/nothing/index\.json not found"):
        make(of="nothing")


def test_the_samples_of_a_lost_shard_are_replaced_and_asked_for_once_a_batch(make, server):
    server.fail(r"shard\.00007", status=404)
    loader = make(on_error="replace", epochs=1)
    with within(30), pytest.warns(RuntimeWarning, match=r"s3://b/plain/shard\.00007\.mds"):
        steps = train(loader)
    lost = set(range(7 * ROWS, 8 * ROWS))
    assert len(steps) == N // 8
    assert sorted(i for _, index, weight, *_ in steps for i, w in zip(index, weight, strict=True) if w) == sorted(
        set(range(N)) - lost
    )


def test_a_shard_evicted_by_its_own_batch_and_lost_at_the_server_is_named(make, server, bucket):
    limit = sum(file.stat().st_size for file in (bucket / "b" / "plain").iterdir()) // 3
    source = make(data={"cache_limit": limit})._run.source
    source.read(0)
    server.fail(r"shard\.00000", status=404)
    with within(30), pytest.raises(DataError, match=r"shard\.00000\.mds"):
        source.read_many(list(range(0, N, ROWS)))  # from more shards than the cache holds
    assert _ShardState.PREPARING not in source._dataset._shard_states.numpy()


# ---- processes that die, and what stays


KILLED = """
import sys
from streaming import StreamingDataset
from infobatch_stream.sources import open_source
source = open_source(StreamingDataset(remote="s3://b/hashed", local=sys.argv[1]))
print("begun", flush=True)
source.ensure_local(1)
"""


@pytest.mark.parametrize("moment", ["in the download", "before the check"])
def test_a_download_that_was_killed_is_never_read(make, server, bucket, tmp_path, moment):
    """Neither the part, nor bytes that came whole but were not compared with the checksum."""
    local = tmp_path / "run" / "local"
    server.fail(r"hashed/shard\.00001", after=300, then="hang", times=1)
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(local)], env=environment(), stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        process.stdout.readline()
        until(lambda: server.sent["/b/hashed/shard.00001.mds"])
        os.killpg(process.pid, signal.SIGKILL)
    assert lock_path(local / "shard.00001.mds").exists()
    if moment == "before the check":
        bad = bytearray((bucket / "b" / "hashed" / "shard.00001.mds").read_bytes())
        bad[-1] ^= 255
        (local / "shard.00001.mds").write_bytes(bad)
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    loader = make(of="hashed", epochs=1)
    with within(30):
        steps = train(loader)
    assert sorted(i for _, index, *_ in steps for i in index) == list(range(48))
    whole = (bucket / "b" / "hashed" / "shard.00001.mds").read_bytes()
    assert (local / "shard.00001.mds").read_bytes() == whole
    assert {file.suffix for file in local.iterdir()} == {".mds", ".json"}


def test_a_worker_that_ends_in_a_download_is_waited_for_by_nobody(make, server):
    """After a break torch ends its workers; streaming has the shard as being prepared for ever."""
    server.rate = 20_000
    loader = make(**FORK)
    batches = iter(loader)
    next(batches)
    batches.close()
    del batches
    loader.dataloader._iterator = None
    server.rate = None
    with within(30):
        train(make("again", **FORK))
        steps = train(loader)
    assert len(steps) > 60
    assert _ShardState.PREPARING not in loader._run.source._dataset._shard_states.numpy()


def sockets():
    """(Files of shards stay open up to a number.)"""
    links = [str(file.readlink()) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
    return sum(link.startswith("socket:") for link in links)


@pytest.mark.parametrize("leave", ["at the end", "by a break"])
def test_nothing_grows_with_the_epochs(make, tmp_path, leave):
    epochs = 8
    loader = make(epochs=epochs)
    facts = []
    for epoch in range(epochs):
        for place, (_, picks) in enumerate(loader):
            loader.update(loss_of(picks.index, epoch), picks)
            if leave == "by a break" and place == 3:
                break
        for file in (tmp_path / "run" / "local").glob("*.mds"):  # to be downloaded again
            loader._run.source._dataset.evict_shard(int(file.name.split(".")[1]))
        until(lambda: not threads())
        facts.append(sockets())
    assert facts[-1] <= max(facts[1:4])
