"""Files of MDS shards that cannot be fetched again are never removed or replaced."""

import os
import pickle
import shutil
import subprocess
from pathlib import Path

import pytest
from streaming import Stream, StreamingDataset
from support.ddp.data import loss_of, write_mds
from support.ddp.mds import Augmented
from support.servers import FaultyServer, s3_environment

from infobatch_stream import ConfigError, DataError, InfoBatchLoader
from infobatch_stream.sources import open_source
from infobatch_stream.sources.remote.single_flight import lock_path

pytestmark = [
    pytest.mark.usefixtures("no_stale_shared_memory", "few_open_files"),
    # streaming leaves the compressed shard that it reads open; boto3's clients close nothing
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The same, compressed."""
    folder = tmp_path_factory.mktemp("mds") / "packed"
    return Path(write_mds(folder, first=1000, samples=120, compression="zstd"))


def files(folder):
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def room(whole, *others):
    """Bytes of all files of a folder, and of the indexes and four shards of others."""
    sizes = [file.stat().st_size for file in Path(whole).iterdir()]
    for other in map(Path, others):
        sizes += [
            (other / "index.json").stat().st_size,
            *sorted(file.stat().st_size for file in other.glob("*.mds"))[-4:],
        ]
    return sum(sizes)


def read_twice(dataset, tmp_path):
    loader = InfoBatchLoader(dataset, tmp_path / "scores.zarr", batch_size=8, epochs=2, delta=1, shuffle_window=24)
    for epoch in range(2):
        for data, picks in loader:
            loader.update(loss_of(picks.index, epoch), picks)
            yield from data["i"].tolist() if isinstance(data, dict) else data[0].tolist()


# ---- the cache_limit


def test_shards_of_a_stream_without_a_remote_are_never_evicted(own, many, tmp_path):
    before = files(own)
    streams = [Stream(local=str(own)), Stream(remote=str(many), local=str(tmp_path / "cache"))]
    dataset = StreamingDataset(streams=streams, cache_limit=room(own, many))
    assert {*range(48), *range(1000, 1120)} == set(read_twice(dataset, tmp_path))
    assert files(own) == before
    assert len(list((tmp_path / "cache").glob("*.mds"))) <= 4  # and the limit is kept by the others
    for shard in range(4, 14):  # also where the user reads from the dataset
        _ = dataset[int(dataset.sample_offset_per_shard[shard])]
    assert files(own) == before


def test_nor_by_a_dataset_that_was_pickled(own, many, tmp_path):
    before = files(own)
    streams = [Stream(local=str(own)), Stream(remote=str(many), local=str(tmp_path / "cache"))]
    dataset = StreamingDataset(streams=streams, cache_limit=room(own, many))
    open_source(dataset)
    for shard in range(4, 14):
        _ = pickle.loads(pickle.dumps(dataset))[int(dataset.sample_offset_per_shard[shard])]
    assert files(own) == before


def test_a_limit_that_leaves_no_room_beside_them_is_refused_with_the_one_that_does(own, many, tmp_path):
    def make(limit):
        streams = [Stream(local=str(own)), Stream(remote=str(many), local=str(tmp_path / f"cache {limit}"))]
        return StreamingDataset(streams=streams, cache_limit=limit)

    largest = max(file.stat().st_size for file in many.glob("*.mds"))
    dataset = make(room(many) // 2)
    with pytest.raises(
        ConfigError, match=rf"never removed.*up to {largest:,}: raise cache_limit to at least \d+"
    ) as error:
        open_source(dataset)
    limit = int(str(error.value).removesuffix(".").split()[-1])
    assert {*range(48), *range(1000, 1120)} == set(read_twice(make(limit), tmp_path))


@pytest.fixture
def same_folder(tmp_path):
    """Ways in which a remote is the folder of the copies, by name: (remote, local) for a folder."""

    def link(folder):
        (tmp_path / "link").symlink_to(folder)
        return tmp_path / "link", folder

    def link_here(folder):
        (tmp_path / "link").symlink_to(folder)
        return folder, tmp_path / "link"

    def links_to_files(folder):
        (tmp_path / "links").mkdir()
        for file in folder.iterdir():
            (tmp_path / "links" / file.name).symlink_to(file)
        return tmp_path / "links", folder

    def mounted(folder):
        (tmp_path / "mounted").mkdir()
        if subprocess.run(
            ["mount", "--bind", folder, tmp_path / "mounted"], check=False, capture_output=True
        ).returncode:
            pytest.skip("mounting is not permitted here")
        return tmp_path / "mounted", folder

    yield {way.__name__: way for way in (link, link_here, links_to_files, mounted)}
    if (tmp_path / "mounted").exists():
        subprocess.run(["umount", tmp_path / "mounted"], check=False)


@pytest.mark.parametrize("way", ["link", "link_here", "links_to_files", "mounted"])
@pytest.mark.parametrize("kind", ["many", "packed"])
def test_nothing_is_removed_where_the_remote_is_the_folder_itself(request, many, same_folder, tmp_path, way, kind):
    own = shutil.copytree(request.getfixturevalue(kind), tmp_path / "own")
    before = files(own)
    remote, local = same_folder[way](own)
    streams = [Stream(remote=str(remote), local=str(local)), Stream(remote=str(many), local=str(tmp_path / "cache"))]
    dataset = StreamingDataset(streams=streams, cache_limit=room(many, many) + (room(own) if kind == "packed" else 0))
    assert set(read_twice(dataset, tmp_path)) == set(range(1000, 1120))
    after = files(own)
    assert all(after.get(name) == content for name, content in before.items())


def test_nothing_is_removed_from_a_folder_that_two_streams_share(own, many, tmp_path):
    before = files(own)
    (tmp_path / "link").symlink_to(own)
    streams = [Stream(local=str(own)), Stream(remote=str(many), local=str(tmp_path / "link"))]
    largest = max(file.stat().st_size for file in own.iterdir())
    dataset = StreamingDataset(streams=streams, cache_limit=5 * largest)
    assert set(read_twice(dataset, tmp_path)) == set(range(48))
    assert files(own) == before


def test_what_the_remote_folder_has_not_any_more_is_not_evicted(many, tmp_path):
    remote = shutil.copytree(many, tmp_path / "remote")
    limit = room(many) // 2
    dataset = Augmented(remote=str(remote), local=str(tmp_path / "cache"), cache_limit=limit, download_retry=1)
    source = open_source(dataset)
    source.read_many([0, 12])
    for number in (0, 1):
        (remote / f"shard.0000{number}.mds").unlink()
    source.read_many(list(range(24, 120)))
    assert [number for number, _ in source.read_many([0, 12])] == [1000, 1012]
    before = files(tmp_path / "cache")
    assert {"shard.00000.mds", "shard.00001.mds"} < before.keys()
    shutil.rmtree(remote)
    with pytest.raises(DataError, match="no shard here may be removed"):
        source.read_many(list(range(120)))
    assert files(tmp_path / "cache") == before


def test_a_server_that_is_gone_costs_no_shard(many, tmp_path, monkeypatch):
    (tmp_path / "server" / "b").mkdir(parents=True)
    shutil.copytree(many, tmp_path / "server" / "b" / "many")
    cache = tmp_path / "cache"
    shutil.copytree(many, cache)
    (cache / "shard.00003.mds").unlink()
    before = files(cache)
    with FaultyServer(tmp_path / "server") as server:
        for name, value in s3_environment(server.url).items():
            monkeypatch.setenv(name, value)
        server.fail(r"shard", status=404)
        dataset = Augmented(remote="s3://b/many", local=str(cache), cache_limit=room(many) // 2, download_retry=1)
        source = open_source(dataset)
        with pytest.raises(DataError, match="not found"):
            source.read(40)
        assert files(cache) == before
        server.mend()
        assert source.read(40)[0] == 1040
        source.read_many(list(range(36, 48)))
        (cache / "shard.00004.mds").unlink()
        dataset._shard_states[4] = 1  # remote
        assert source.read(50)[0] == 1050
        assert len(list(cache.glob("*.mds"))) <= 5  # the limit is kept once it is seen to work


# ---- files that are not as the index says


@pytest.mark.parametrize("url", [False, True], ids=["folder", "server"])
def test_a_file_that_is_not_whole_stays_until_another_has_come(many, tmp_path, monkeypatch, url):
    remote = tmp_path / "server" / "b" / "many"
    shutil.copytree(many, remote)
    cache = Path(shutil.copytree(many, tmp_path / "cache"))
    os.truncate(cache / "shard.00003.mds", 300)
    before = files(cache)
    with FaultyServer(tmp_path / "server") as server:
        for name, value in s3_environment(server.url).items():
            monkeypatch.setenv(name, value)
        whole = (remote / "shard.00003.mds").read_bytes()
        (remote / "shard.00003.mds").unlink()
        dataset = Augmented(remote="s3://b/many" if url else str(remote), local=str(cache), download_retry=1)
        source = open_source(dataset)
        for _ in range(2):
            with pytest.raises(DataError, match=r"shard\.00003\.mds is not whole and could not be fetched from"):
                source.read(40)
            assert files(cache) == before
        (remote / "shard.00003.mds").write_bytes(whole)
        assert source.read(40)[0] == 1040
    assert files(cache) == files(many)


@pytest.fixture
def kept(packed, tmp_path):
    """(remote, cache): the cache has all shards, compressed and decompressed; of the fourth 100 bytes are left."""
    remote = shutil.copytree(packed, tmp_path / "remote")
    cache = Path(shutil.copytree(packed, tmp_path / "cache"))
    list(StreamingDataset(local=str(cache), keep_zip=True, batch_size=8))  # decompresses them
    assert len(list(cache.glob("*.mds"))) == len(list(cache.glob("*.mds.zstd"))) == 10
    os.truncate(cache / "shard.00003.mds", 100)
    return remote, cache


def read_from(remote, cache):
    dataset = Augmented(remote=str(remote), local=str(cache), keep_zip=True, download_retry=1)
    return open_source(dataset).read(40)[0]


def test_a_shard_that_is_cut_comes_from_its_compressed_form_without_the_remote(kept):
    remote, cache = kept
    shutil.rmtree(remote)
    before = files(cache)
    assert read_from(remote, cache) == 1040
    after = files(cache)
    assert len(after.pop("shard.00003.mds")) > len(before.pop("shard.00003.mds"))
    assert after == before


@pytest.mark.parametrize("damage", ["cut", "changed"])
@pytest.mark.parametrize("there", [True, False], ids=["remote", "no remote"])
def test_a_compressed_form_that_is_damaged_stays_until_another_has_come(kept, damage, there):
    remote, cache = kept
    zipped = cache / "shard.00003.mds.zstd"
    data = zipped.read_bytes()
    zipped.write_bytes(data[:50] if damage == "cut" else bytes(len(data)))
    before = files(cache)
    if there:
        assert read_from(remote, cache) == 1040
        assert zipped.read_bytes() == data
        return
    shutil.rmtree(remote)
    with pytest.raises(DataError, match=r"shard\.00003\.mds is not whole and could not be fetched from"):
        read_from(remote, cache)
    assert files(cache) == before


def test_files_of_the_users_beside_a_shard_stay(many, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    mine = ["shard.00003.mds.bak", "shard.00003.mds.20240131", "shard.00003.mds.zip", "shard.00003.mdsx"]
    unfinished = ["shard.00003.mds.tmp", "shard.00003.mds.a0B1c2D3", "shard.00003.mds.tmp.a0B1c2D3"]
    for name in [*mine, *unfinished]:
        (cache / name).write_text("mine")
    dataset = Augmented(remote=str(many), local=str(cache))
    lock_path(cache / "shard.00003.mds").write_text("\n")  # as of a process that was killed
    assert open_source(dataset).read(40)[0] == 1040
    assert set(files(cache)) == {*mine, "shard.00003.mds", "index.json"}
