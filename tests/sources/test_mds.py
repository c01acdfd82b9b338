"""MDS shards, through StreamingDataset."""

import shutil
import subprocess
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from streaming import Stream, StreamingDataset
from streaming.base.dataset import _ShardState
from support.ddp.data import loss_of, write_mds
from support.ddp.mds import Augmented
from support.mds_runs import FORK, SPAWN, train, within

from infobatch_stream import ConfigError, DataError, InfoBatchLoader, ScoreStore, SoftPruning

pytestmark = [
    pytest.mark.usefixtures("no_stale_shared_memory", "few_open_files"),
    # Python's own warning that forking a process with threads is risky; workers are forked here as users fork them.
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]
N = 48
# streaming leaves the compressed shard that it reads open
leaves_files_open = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture
def make(tmp_path):
    def make(dataset, store="scores.zarr", **options):
        return InfoBatchLoader(dataset, tmp_path / store, **{"batch_size": 8, "epochs": 4, "delta": 1, **options})

    return make


@pytest.fixture
def small_cache(tmp_path):
    """(remote, dataset): 10 shards, of which the cache holds 4 at most."""
    many = Path(write_mds(tmp_path / "many", samples=120, per_shard=12))
    size = max(file.stat().st_size for file in many.glob("*.mds"))
    limit = (many / "index.json").stat().st_size + 4 * size
    return many, Augmented(remote=str(many), local=str(tmp_path / "local"), cache_limit=limit, download_retry=1)


def indices(steps, epoch):
    """Of the entries that count."""
    return [i for e, index, weight, *_ in steps if e == epoch for i, w in zip(index, weight, strict=True) if w]


# ---- samples


def test_samples_are_those_of_the_users_getitem(shards, make, tmp_path):
    loader = make(Augmented(local=shards))
    steps = train(loader)
    assert sorted(indices(steps, 0)) == list(range(N))
    assert len(indices(steps, 1)) < N
    for _, index, _, numbers, noise in steps:
        assert numbers == index
        assert np.shape(noise) == (8, 3)
    assert np.array_equal(ScoreStore.open(tmp_path / "scores.zarr").scores, loss_of(torch.arange(N)).numpy())


def test_a_plain_streaming_dataset_gives_its_columns(shards, make):
    for data, picks in make(StreamingDataset(local=shards)):
        assert torch.equal(data["i"], picks.index)
        assert data["pad"] == [bytes(64)] * 8


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, FileNotFoundError])
def test_what_the_users_getitem_raises_passes_with_a_note(shards, make, kind):
    mine = kind("mine")

    class Picky(Augmented):
        def __getitem__(self, index):
            if index == 17:
                raise mine
            return super().__getitem__(index)

    with pytest.raises(kind, match=r"^mine\n") as caught:
        train(make(Picky(local=shards)))
    assert caught.value is mine


def test_a_map_style_wrapper_around_it_is_taken(shards, make):
    class Wrapped:
        def __init__(self):
            self.inner = StreamingDataset(local=shards)

        def __len__(self):
            return self.inner.num_samples

        def __getitem__(self, index):
            return self.inner[index]["i"], 0

    assert sorted(indices(train(make(Wrapped(), epochs=1)), 0)) == list(range(N))


@pytest.mark.parametrize("zipped", [None, pytest.param("zstd", marks=leaves_files_open)])
def test_a_remote_is_downloaded_by_whoever_needs_it(shards, make, tmp_path, zipped):
    remote = write_mds(tmp_path / "remote", compression=zipped) if zipped else shards
    wanted = train(make(Augmented(local=shards), "wanted.zarr", epochs=2))
    for name, options in {"main": {}, "fork": FORK}.items():
        dataset = Augmented(remote=str(remote), local=str(tmp_path / name))
        assert not list((tmp_path / name).glob("*.mds*"))
        assert train(make(dataset, f"{name}.zarr", epochs=2, **options)) == wanted
        assert len(list((tmp_path / name).glob("*.mds"))) == 4


@leaves_files_open
def test_compressed_shards_without_a_remote(shards, make, tmp_path):
    folder = write_mds(tmp_path / "zipped", compression="zstd")
    assert not list(Path(folder).glob("*.mds"))
    dataset = Augmented(local=folder, keep_zip=True)
    assert train(make(dataset)) == train(make(Augmented(local=shards), "wanted.zarr"))


@pytest.mark.parametrize("options", [{}, FORK], ids=["main", "fork"])
def test_a_small_cache_evicts_and_fetches_again(make, tmp_path, small_cache, options):
    _, dataset = small_cache
    loader = make(dataset, shuffle_window=24, epochs=3, **options)
    with within(60):
        steps = train(loader)
    assert sorted(indices(steps, 0)) == list(range(120))
    assert all(numbers == index for _, index, _, numbers, _ in steps)
    ahead = options.get("num_workers", 1) - 1  # streaming counts a download when it is done: others may be under way
    assert len(list((tmp_path / "local").glob("*.mds"))) <= 4 + ahead


@pytest.mark.parametrize(
    "options",
    [FORK, {**FORK, "persistent_workers": True}, pytest.param(SPAWN, marks=pytest.mark.slow)],
    ids=["fork", "fork, persistent", "spawn"],
)
def test_after_a_peek_workers_read_the_same(shards, make, tmp_path, options):
    wanted = train(make(Augmented(local=shards), "wanted.zarr", epochs=2))
    dataset = Augmented(remote=shards, local=str(tmp_path / "local"))
    loader = make(dataset, epochs=2, **options)
    _ = dataset[0], dataset[N - 1]
    (_, noise), picks = loader.peek()
    assert (picks.index.tolist(), noise.tolist()) == (wanted[0][1], wanted[0][4])
    with within(60):
        assert train(loader) == wanted
    assert dataset[N // 2][0] == N // 2


# ---- mixing


def mixed(tmp_path, kind, **options):
    one, two = tmp_path / "one", tmp_path / "two"
    if not one.exists():
        write_mds(one, first=0, samples=48)
        write_mds(two, first=48, samples=24)
    weights = {
        "plain": ({}, {}),
        "proportion, otherwise": ({"proportion": 0.5}, {"proportion": 0.5}),
        "proportion": ({"proportion": 0.25}, {"proportion": 0.75}),
        "repeat": ({"repeat": 1}, {"repeat": 2.5}),
        "choose": ({"choose": 30}, {"choose": 60}),
        "once": ({}, {}),
        "repeat 1": ({"repeat": 1}, {"repeat": 1}),
    }[kind]
    streams = [Stream(local=str(path), **w) for path, w in zip((one, two), weights, strict=True)]
    return Augmented(streams=streams, **options)


@pytest.mark.parametrize("kind", ["proportion", "repeat", "choose", "once", "repeat 1", "repeat, constant steps"])
def test_a_mixed_epoch_draws_from_what_streaming_would(make, tmp_path, kind):
    kind, _, constant = kind.partition(", ")
    dataset = mixed(tmp_path, kind)
    loader = make(dataset, epochs=4, policy=SoftPruning(0.5), constant_steps=bool(constant))
    for epoch in range(4):
        pool = Counter(dataset.resample_streams(epoch)[1].tolist())
        scores = ScoreStore.open(tmp_path / "scores.zarr").scores.copy() if epoch else np.full(72, np.nan, np.float32)
        found, weights, recorded = Counter(), {}, Counter()
        before = len(loader)
        for (numbers, _), picks in loader:
            assert numbers.tolist() == picks.index.tolist()
            loader.update(loss_of(picks.index, epoch), picks)
            for i, w, r in zip(picks.index.tolist(), picks.weight.tolist(), picks._record.tolist(), strict=True):
                if w:
                    found[i] += 1
                    weights.setdefault(i, set()).add(w)
                recorded[i] += r
        assert {len(different) for different in weights.values()} == {1}  # repeats share the decision
        assert {i: pool[i] for i in found} == found  # kept with all its repeats, or not at all
        assert {i: recorded[i] for i in found} == dict.fromkeys(found, 1)  # only one of them records
        assert loader.stats["kept"] == found.total()
        assert loader.stats["pruned"] == pool.total() - found.total()
        low = scores < np.nanmean(scores, dtype=np.float64) if epoch else np.zeros(72, bool)
        assert {i for i in pool if not low[i]} <= set(found)
        if epoch:
            assert found.total() < pool.total()
        else:
            assert found == pool
            assert before == len(loader) == -(-pool.total() // 8)
        if constant:
            assert len(loader) == loader.unpruned_steps
        loader.commit()
        after = ScoreStore.open(tmp_path / "scores.zarr").scores
        wanted = scores.copy()
        wanted[list(found)] = loss_of(torch.tensor(list(found)), epoch).numpy()
        assert np.array_equal(after, wanted, equal_nan=True)


# ---- resume


@pytest.mark.parametrize("kind", ["plain", "proportion", "repeat", "repeat, constant steps"])
def test_a_resumed_run_goes_on_with_the_same_picks_and_augmentation(make, tmp_path, kind):
    kind, _, constant = kind.partition(", ")
    states, options = [], {"constant_steps": bool(constant)}
    steps = train(make(mixed(tmp_path, kind), **options), states)
    assert len(states) == len(steps) > 20
    again = mixed(tmp_path, kind)
    for first in range(0, len(steps), 4):
        loader = make(again, "resumed.zarr", existing="overwrite", **options)
        loader.load_state_dict(states[first])
        assert train(loader) == steps[first:], f"from step {first}"


@pytest.mark.parametrize(
    ("kind", "options", "there"),
    [
        ("proportion, otherwise", {}, r"'choose': \[36, 36\]"),
        ("plain", {}, r"\{\}"),
        ("proportion", {"shuffle_seed": 5}, r"'shuffle_seed': 5"),
        ("proportion", {"sampling_method": "fixed"}, r"'sampling_method': 'fixed'"),
    ],
)
def test_a_state_of_another_mixture_is_refused(make, tmp_path, kind, options, there):
    state = make(mixed(tmp_path, "proportion")).state_dict()
    other = make(mixed(tmp_path, kind, **options), "other.zarr")
    with pytest.raises(ConfigError, match=rf"saved with mixing=.*this loader has mixing=.*{there}"):
        other.load_state_dict(state)
    assert not other._run.scores.path.exists()


# ---- shards that are missing or damaged
# After an error in a worker, PyTorch takes 5 seconds to end its workers; so few tests have both.


def test_a_missing_shard_is_named_and_may_come_back(own, make):
    dataset = Augmented(local=str(own), download_retry=1)
    whole = (own / "shard.00002.mds").read_bytes()
    (own / "shard.00002.mds").unlink()
    with within(20), pytest.raises(DataError, match=r"shard .*own/shard\.00002\.mds is missing.*no remote"):
        train(make(dataset))
    with within(20), pytest.raises(DataError, match=r"shard\.00002\.mds is missing"):
        make(dataset)._run.source.read(24)  # nothing is left that the next to ask would wait for
    (own / "shard.00002.mds").write_bytes(whole)
    with within(20):
        steps = train(make(dataset, epochs=1))
    assert sorted(indices(steps, 0)) == list(range(N))


@pytest.fixture
def disk(tmp_path):
    """A file system of 64 KiB, and a way to have it read only."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], check=False).returncode:
        pytest.skip("mounting is not permitted here")
    yield folder, lambda: subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize(
    ("fault", "advice"),
    [
        ("read only", r"Read-only file system.*Give the dataset another local folder, one that can be written\."),
        ("full", r"No space left.*Make room on the disk of the dataset's local folder, or set its cache_limit\."),
        ("a file in the way", r"is no folder: remove it, or give the dataset another local folder\."),
    ],
)
def test_a_local_folder_that_takes_no_shard_is_told_with_what_to_do(shards, make, disk, fault, advice):
    local = disk[0] / "local"
    dataset = Augmented(remote=shards, local=str(local), download_retry=1)
    source = make(dataset)._run.source
    if fault == "read only":
        disk[1]()
    elif fault == "full":
        with suppress(OSError):
            (disk[0] / "other").write_bytes(bytes(2**16))
    else:
        shutil.rmtree(local)
        local.write_text("")
    with within(20), pytest.raises(DataError, match=rf"could not be fetched from {shards}.*{advice}"):
        source.read(0)


def test_a_truncated_shard_is_named_and_may_come_back(own, make):
    dataset = Augmented(local=str(own))
    whole = (own / "shard.00002.mds").read_bytes()
    (own / "shard.00002.mds").write_bytes(whole[:500])
    for _ in range(2):
        with within(20), pytest.raises(DataError, match=r"own/shard\.00002\.mds has 500 bytes.*truncated"):
            train(make(dataset))
    (own / "shard.00002.mds").write_bytes(whole)
    with within(20):
        steps = train(make(dataset, epochs=1))
    assert sorted(indices(steps, 0)) == list(range(N))


def test_a_shard_that_is_still_growing_is_waited_for(own, make):
    dataset = Augmented(local=str(own))
    file = own / "shard.00002.mds"
    whole = file.read_bytes()

    def finish():
        file.write_bytes(whole)
        dataset._shard_states[2] = _ShardState.LOCAL

    dataset._shard_states[2] = _ShardState.PREPARING
    file.write_bytes(whole[:500])
    download = threading.Timer(0.5, finish)
    download.start()
    with within(20):
        assert make(dataset)._run.source.read(24)[0] == 24
    download.join()


def test_the_samples_of_a_missing_shard_are_replaced(own, make):
    dataset = Augmented(local=str(own), download_retry=1)
    (own / "shard.00001.mds").unlink()
    loader = make(dataset, on_error="replace", epochs=1)
    with within(30), pytest.warns(RuntimeWarning, match=r"shard\.00001\.mds"):
        steps = train(loader)
    assert len(steps) == 6
    assert sorted(indices(steps, 0)) == [*range(12), *range(24, N)]


@pytest.mark.parametrize("options", [{}, FORK], ids=["main", "fork"])
def test_a_failed_download_raises_in_every_process_and_may_be_tried_again(own, make, tmp_path, options):
    dataset = Augmented(remote=str(own), local=str(tmp_path / "local"), download_retry=1)
    whole = (own / "shard.00001.mds").read_bytes()
    (own / "shard.00001.mds").unlink()
    loader = make(dataset, existing="overwrite", **options)
    with within(40), pytest.raises(DataError, match=rf"shard\.00001\.mds .*fetched from {own}"):
        train(loader)
    with within(20), pytest.raises(DataError, match=r"shard\.00001\.mds"):
        loader._run.source.read(12)  # and in the main process
    (own / "shard.00001.mds").write_bytes(whole)
    with within(20):
        steps = train(make(dataset, existing="overwrite", epochs=1, **options))
    assert sorted(indices(steps, 0)) == list(range(N))


def test_downloads_that_fail_under_a_small_cache_hang_nobody(make, small_cache):
    remote, dataset = small_cache
    loader = make(dataset, epochs=1, shuffle_window=24)
    batches = iter(loader)
    next(batches)
    for file in remote.glob("*.mds"):
        file.unlink()
    with within(30), pytest.raises(DataError, match=r"shard\.0000\d\.mds"):
        list(batches)
    for index in range(0, 120, 12):  # each is there, or raises; none is left for others to wait for
        with within(10), suppress(DataError):
            loader._run.source.read(index)
    assert _ShardState.PREPARING not in dataset._shard_states.numpy()
