"""Shards that are written anew, with equal names and sizes, are not read for those that the index here is of."""

import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from streaming import StreamingDataset
from support.ddp.data import loss_of, write_mds
from support.ddp.mds import Augmented

from infobatch_stream import ConfigError, DataError, InfoBatchLoader
from infobatch_stream.sources import open_source

pytestmark = [
    pytest.mark.usefixtures("no_stale_shared_memory", "few_open_files"),
    # Python's own warning that forking a process with threads is risky; workers are forked here as users fork them.
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    # streaming leaves the compressed shard that it reads open
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]
N = 120


@pytest.fixture
def remote(tmp_path):
    """A folder of 10 shards of the samples 0..119, with no checksums."""
    return Path(write_mds(tmp_path / "remote", samples=N))


def rewrite(folder, first, samples=N, **options):
    """Other samples of equal size."""
    time.sleep(0.02)  # the time of a file is that of the last tick of the system's clock
    for file in list(Path(folder).iterdir()):
        file.unlink()
    write_mds(folder, first=first, samples=samples, **options)


def files(folder):
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def again(cache):
    """A copy of a cache, as another process finds it: in this one streaming takes a folder once."""
    return str(shutil.copytree(cache, cache.with_name(f"{cache.name}, again")))


def test_shards_without_a_remote_that_are_written_anew_under_a_run_are_told(own, tmp_path):
    loader = InfoBatchLoader(Augmented(local=str(own)), tmp_path / "scores.zarr", batch_size=8, epochs=3, delta=1)
    for _, picks in loader:
        loader.update(loss_of(picks.index), picks)
    rewrite(own, first=500, samples=48)
    with pytest.raises(DataError, match=r"shard.*\.mds changed .* after the dataset was opened"):
        list(loader)


# ---- under a run


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_no_sample_of_a_remote_that_is_written_anew_is_trained_on(remote, tmp_path, workers):
    cache = tmp_path / "cache"
    dataset = Augmented(remote=str(remote), local=str(cache))
    loader = InfoBatchLoader(
        dataset,
        tmp_path / "scores.zarr",
        batch_size=8,
        epochs=2,
        delta=1,
        shuffle=False,
        predownload=2,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )
    originals = files(remote)
    with pytest.raises(DataError, match=r"remote/index\.json changed after .*cache/index\.json was copied from it"):
        for step, ((numbers, _), picks) in enumerate(loader):
            if step == 0:
                time.sleep(0.5)  # the threads that download ahead are through, and go on from the new ones
                rewrite(remote, first=500)
            time.sleep(0.05)
            assert numbers.tolist() == picks.index.tolist()
            loader.update(loss_of(picks.index), picks)
    assert all(data == originals[name] for name, data in files(cache).items() if name.endswith(".mds"))
    with pytest.raises(DataError, match="changed after"):  # by whoever opens it
        InfoBatchLoader(dataset, tmp_path / "other.zarr", batch_size=8, epochs=2, delta=1)


@pytest.mark.parametrize("hashes", [[], ["sha1"]], ids=str)
def test_what_comes_while_the_remote_is_written_anew_is_removed(tmp_path, hashes):
    class Late(Augmented):
        """Of which the remote is written anew when all that can be looked at before a download was."""

        def prepare_shard(self, shard, blocking=True):
            if shard == 3:
                rewrite(remote, first=500, hashes=hashes)
            super().prepare_shard(shard, blocking)

    remote, cache = tmp_path / "remote", tmp_path / "cache"
    write_mds(remote, samples=N, hashes=hashes)
    source = open_source(Late(remote=str(remote), local=str(cache), download_retry=1))
    assert source.read(0)[0] == 0
    before = files(cache)
    for index in (36, 36, 48):
        with pytest.raises(DataError, match=r"changed after|Checksum failure"):
            source.read(index)
        assert files(cache) == before
    assert source.read(1)[0] == 1


def test_a_shard_that_comes_when_the_index_is_gone_is_not_taken(remote, tmp_path):
    source = open_source(Augmented(remote=str(remote), local=str(tmp_path / "cache")))
    rewrite(remote, first=500)
    (remote / "index.json").unlink()  # it is written last
    with pytest.raises(DataError, match=r"index\.json is gone after"):
        source.read(0)
    assert set(files(tmp_path / "cache")) == {"index.json"}


def test_with_checksums_the_remote_may_be_copied_anew(tmp_path):
    remote = write_mds(tmp_path / "remote", samples=N, hashes=["sha1"])
    source = open_source(Augmented(remote=remote, local=str(tmp_path / "cache")))
    assert source.read(0)[0] == 0
    rewrite(remote, first=0, hashes=["sha1"])
    assert [number for number, _ in source.read_many(list(range(N)))] == list(range(N))
    assert open_source(Augmented(remote=remote, local=again(tmp_path / "cache"))).read(5)[0] == 5


# ---- between two runs


@pytest.mark.parametrize("change", ["the same index", "other checksums", "other sizes"])
def test_a_cache_of_another_remote_is_refused_and_the_remedy_works(tmp_path, change):
    hashes = ["sha1"] if change == "other checksums" else []
    remote, cache = write_mds(tmp_path / "remote", samples=N, hashes=hashes), tmp_path / "cache"
    open_source(Augmented(remote=remote, local=str(cache))).read(0)
    rewrite(remote, first=500, samples=60 if change == "other sizes" else N, hashes=hashes)
    copy = again(cache)
    dataset = Augmented(remote=remote, local=copy)
    with pytest.raises(DataError, match=rf"index\.json changed after .*remove the folder {copy}, and begin with a new"):
        open_source(dataset)
    del dataset  # the run ends
    shutil.rmtree(copy)
    assert [number for number, _ in open_source(Augmented(remote=remote, local=copy)).read_many([0, 50])] == [500, 550]


def test_without_checksums_a_remote_that_was_copied_anew_is_taken_when_the_user_says_so(remote, tmp_path):
    cache = tmp_path / "cache; its"
    open_source(Augmented(remote=str(remote), local=str(cache))).read(0)
    rewrite(remote, first=0)
    copy = again(cache)
    dataset = Augmented(remote=str(remote), local=copy)
    with pytest.raises(DataError, match="its samples are the same as before") as error:
        open_source(dataset)
    subprocess.run(shlex.split(str(error.value).split("call: ")[1]), check=True)
    assert [number for number, _ in open_source(dataset).read_many([0, 50])] == [0, 50]


def test_a_remote_folder_that_is_gone_is_no_matter_while_nothing_is_wanted_of_it(remote, tmp_path):
    cache = tmp_path / "cache"
    open_source(Augmented(remote=str(remote), local=str(cache))).read_many(list(range(N)))
    shutil.rmtree(remote)
    source = open_source(Augmented(remote=str(remote), local=again(cache)))
    assert [number for number, _ in source.read_many(list(range(N)))] == list(range(N))


def test_a_cache_that_has_all_is_used_but_nothing_comes_to_it_from_another_remote(remote, tmp_path):
    cache = tmp_path / "cache"
    open_source(Augmented(remote=str(remote), local=str(cache))).read_many(list(range(N)))
    rewrite(remote, first=500)
    source = open_source(Augmented(remote=str(remote), local=again(cache)))
    assert [number for number, _ in source.read_many(list(range(N)))] == list(range(N))
    file = tmp_path / "cache, again" / "shard.00003.mds"
    os.truncate(file, 100)
    with pytest.raises(DataError, match="changed after"):
        source.read(40)
    assert file.stat().st_size == 100


# ---- validate_hash


def test_a_checksum_that_nothing_is_compared_with_is_no_error(remote):
    dataset = Augmented(local=str(remote), remote=str(remote.parent / "gone"), validate_hash="sha1")
    assert open_source(dataset).read(5)[0] == 5


@pytest.mark.parametrize("zipped", [None, "zstd"])
def test_where_there_are_no_checksums_the_advice_is_to_ask_for_none(tmp_path, zipped):
    remote = write_mds(tmp_path / "remote", compression=zipped)
    local = {"local": remote, "keep_zip": True} if zipped else {"remote": remote, "local": str(tmp_path / "cache")}
    with pytest.raises(ConfigError, match=r"validate_hash='sha1': .*it has: none\)\. Leave validate_hash out"):
        open_source(Augmented(**local, validate_hash="sha1"))
    if not zipped:
        local["local"] = again(Path(local["local"]))
    assert open_source(Augmented(**local)).read(5)[0] == 5


def test_nor_under_a_limit_that_has_shards_come_again(remote, tmp_path):
    cache = again(remote)
    dataset = Augmented(remote=str(remote), local=cache, validate_hash="sha1", cache_limit="1mb")
    with pytest.raises(ConfigError, match="Leave validate_hash out"):
        open_source(dataset)


# ---- the opening


def test_no_path_is_resolved_for_each_shard_that_is_not_compressed(tmp_path, monkeypatch):
    def resolved(shards):
        folder = tmp_path / str(shards)
        dataset = StreamingDataset(
            remote=write_mds(folder / "remote", samples=12 * shards), local=str(folder / "local")
        )
        assert dataset.num_shards == shards
        count = 0

        def counting(path, strict=False, original=Path.resolve):
            nonlocal count
            count += 1
            return original(path, strict)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "resolve", counting)
            open_source(dataset)
        return count

    assert resolved(3) == resolved(30)
