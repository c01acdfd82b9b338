"""Where conversions write: names of any kind, and neighbours that nobody may touch."""

import json
import os

import pytest
from support.conversions import contents, fetched, images_in, stop_after, write_images
from support.servers import s3_server, use_s3

from infobatch_stream import IndexedWebDataset
from infobatch_stream.convert import convert, write_shards
from infobatch_stream.errors import ConfigError, DataError
from infobatch_stream.formats.shard_set import STATE

OPTIONS = {"shard_bytes": 1 << 16}
ODD = ["run?", "run*", "br[1]", "a{1,2}", "h#1 p%20"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("tree"), 40, (3000, 8000))


def neighbours(put):
    """Files of others that patterns made of odd names would match."""
    for name in ("run1", "run2", "br1", "a1", "a2", "x"):
        for file in ("shard-000000.tar", f"{STATE}/recipe.json", f"{STATE}/done/000000.json", "index.json"):
            put(f"{name}/{file}", b"precious")


def damaged(src):
    """Have the last of its images empty."""
    last = sorted(src.rglob("*.jpg"))[-1]
    last.write_bytes(b"")
    return last


@pytest.mark.parametrize("name", ODD)
def test_a_folder_of_any_name_is_written_read_and_resumed_and_its_neighbours_stay(tree, tmp_path, name):
    root = tmp_path / "root"

    def put(path, data):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)

    neighbours(put)
    before = contents(root)
    stop_after(tree, root / name, 1)
    convert(tree, root / name, "wds", shard_bytes=200 << 10, resume=True)
    convert(tree, root / name, "wds", shard_bytes=200 << 10, overwrite=True, seed=3)
    assert len(images_in(root / name)) == 40
    src = write_images_into(tmp_path / "bad", 4)
    damaged(src)
    with pytest.raises(DataError, match="is empty"):
        convert(src, root / f"{name}2", "wds")
    assert {path: data for path, data in contents(root).items() if not path.startswith(f"{name}/")} == before


def write_images_into(folder, count):
    folder.mkdir()
    return write_images(folder, count, (3000, 8000))


@pytest.mark.parametrize("name", ["v1.0", "p%20 x~&=+,@:;'!$()"])
@pytest.mark.parametrize("format", ["mds", "wds"])
def test_a_bucket_takes_names_that_mean_themselves_to_every_reader(tree, bucket, tmp_path, name, format):
    from streaming import StreamingDataset

    url = f"s3://{bucket.bucket}/{format}/{name}"
    assert convert(tree, f"{url}//", format).parts[0].path == url
    if format == "wds":
        assert len(IndexedWebDataset(url, cache_dir=tmp_path)) == 40
    else:
        assert StreamingDataset(remote=url, local=str(tmp_path / "local"), batch_size=1).num_samples == 40


def test_a_bucket_refuses_names_that_mean_something_else_and_its_neighbours_stay(tree, bucket):
    neighbours(bucket.put)
    before = fetched(f"s3://{bucket.bucket}")
    for name in ("run?", "run*", "br[1]", "a{1,2}", "h#1", "a//b", "a/../run1", "./run1"):
        with pytest.raises(ConfigError, match="would look for them elsewhere"):
            convert(tree, f"s3://{bucket.bucket}/{name}", "wds")
    assert fetched(f"s3://{bucket.bucket}") == before


@pytest.mark.parametrize("name", ["p%20 b", "run"])
def test_a_conversion_to_a_bucket_that_fails_removes_what_it_wrote_and_no_more(bucket, tmp_path, name):
    neighbours(bucket.put)
    bucket.put(f"{name}2/shard-000000.tar", b"precious")
    before = fetched(f"s3://{bucket.bucket}")
    src = write_images_into(tmp_path / "bad", 4)
    damaged(src)
    with pytest.raises(DataError, match="is empty"):
        convert(src, f"s3://{bucket.bucket}/{name}", "wds", shuffle=False)
    assert fetched(f"s3://{bucket.bucket}") == before


def test_keys_with_wildcards_are_removed_one_by_one(bucket, tree, monkeypatch):
    """Were such a name let through: the file system's own ``rm`` takes it for a pattern."""
    monkeypatch.setattr("infobatch_stream.convert.destinations.remote._check_name", lambda url: None)
    neighbours(bucket.put)
    before = fetched(f"s3://{bucket.bucket}")
    for name in ("run?", "br[1]", "run*"):
        convert(tree, f"s3://{bucket.bucket}/{name}", "wds")
    after = fetched(f"s3://{bucket.bucket}")
    assert {key: data for key, data in after.items() if key in before} == before
    assert not any(key.startswith(("run?", "br[1]", "run*")) and STATE in key for key in after)


def test_a_folder_marker_is_no_content(tree, bucket):
    """Consoles leave an empty key where a user makes a folder."""
    bucket.put("made/", b"")
    bucket.put("made/sub/", b"")
    convert(tree, f"s3://{bucket.bucket}/made", "wds")
    assert "made/" in fetched(f"s3://{bucket.bucket}")


def test_a_shard_that_a_task_left_which_was_made_again_is_removed_from_a_bucket(tree, bucket, tmp_path):
    url = f"s3://{bucket.bucket}/left"
    stop_after(tree, url, 1)
    bucket.put("left/shard-000099.tar", b"of a task whose record never came")
    convert(tree, url, "wds", shard_bytes=200 << 10, resume=True)
    convert(tree, tmp_path / "out", "wds", shard_bytes=200 << 10)
    assert fetched(url) == contents(tmp_path / "out")


def test_of_two_conversions_that_begin_at_once_in_a_bucket_one_is_refused(tree, bucket, monkeypatch):
    url = f"s3://{bucket.bucket}/both"
    convert(tree, url, "wds")
    first = fetched(url)
    bucket.put(f"both/{STATE}/recipe.json", b"the other's")
    # As if the other had begun after this one looked.
    monkeypatch.setattr("s3fs.S3FileSystem.find", lambda *_, **__: {})
    with pytest.raises(ConfigError, match="broken off, or is running"):
        convert(tree, url, "wds")
    monkeypatch.undo()
    use_s3(monkeypatch, bucket.url)
    assert fetched(url) == {**first, f"{STATE}/recipe.json": b"the other's"}


def test_what_somebody_puts_into_the_folder_in_the_making_stays(tree, tmp_path):
    def drop(_):
        (tmp_path / "out.partial/thesis.tex").write_text("precious")

    convert(tree, tmp_path / "out", "wds", on_progress=drop)
    assert (tmp_path / "out/thesis.tex").read_text() == "precious"
    src = write_images_into(tmp_path / "bad", 4)
    damaged(src)

    def source():
        yield {"text": "a"}
        (folder,) = tmp_path.glob("two.partial*")
        (folder / "thesis.tex").write_text("precious")
        raise KeyError("the user's")

    with pytest.raises(KeyError):
        write_shards(source(), tmp_path / "two", "wds")
    (left,) = tmp_path.glob("two.partial*")
    assert [path.name for path in left.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("name", ["shard-thesis.tar", "shards_old.mds.bak", "shard.mds", "photos"])
def test_overwrite_replaces_nothing_that_no_conversion_writes(tree, tmp_path, name):
    convert(tree, tmp_path / "out", "wds")
    if name == "photos":
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "out" / name).symlink_to(tmp_path / "elsewhere")
    else:
        (tmp_path / "out" / name).write_text("precious")
    with pytest.raises(ConfigError, match=f"{name}, which is no part of a set of shards"):
        convert(tree, tmp_path / "out", "wds", overwrite=True)
    assert os.path.lexists(tmp_path / "out" / name)


def test_overwrite_leaves_datasets_that_other_conversions_put_into_folders_below(tree, tmp_path):
    for split in ("train", "val"):
        (tmp_path / "splits").mkdir(exist_ok=True)
        write_images_into(tmp_path / "splits" / split, 4)
    convert(tree, tmp_path / "data/one", "mds")
    convert(tree, tmp_path / "data/two", "wds")
    before = contents(tmp_path / "data")
    for src in (tree, tmp_path / "splits"):
        with pytest.raises(ConfigError, match=r"holds shards in (one|two)"):
            convert(src, tmp_path / "data", "wds", overwrite=True)
    with pytest.raises(ConfigError, match=r"holds shards in (one|two)"):
        write_shards([{"n": 1}], tmp_path / "data", "mds", overwrite=True)
    assert contents(tmp_path / "data") == before
    convert(tmp_path / "splits", tmp_path / "out", "mds")
    convert(tmp_path / "splits", tmp_path / "out", "wds", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "out").glob("*/*.tar")) == ["shard-000000.tar"] * 2


def test_to_resume_in_a_bucket_leaves_a_dataset_that_another_conversion_put_into_a_folder_below(tree, bucket):
    url = f"s3://{bucket.bucket}/parent"
    stop_after(tree, url, 1)
    convert(tree, f"{url}/one", "wds")
    before = fetched(f"{url}/one")
    with pytest.raises(ConfigError, match="holds shards in one"):
        convert(tree, url, "wds", shard_bytes=200 << 10, resume=True)
    assert fetched(f"{url}/one") == before


def test_a_folder_of_the_user_that_is_called_like_one_in_the_making_is_told_of_as_what_it_is(tree, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match="is in the way") as caught:
        convert(tree, tmp_path / "out", "wds")
    assert "remove" not in str(caught.value)


@pytest.mark.parametrize("name", ["run?1", "h#1", "p%20"])
def test_a_file_url_names_its_path_to_the_last_letter(tree, tmp_path, name):
    (tmp_path / name.partition("?")[0].partition("#")[0]).mkdir()
    convert(tree, f"file://{tmp_path}/{name}", "wds")
    convert(f"file://{tmp_path}/{name}", f"file://localhost{tmp_path}/again", "wds")
    assert images_in(tmp_path / name) == images_in(tmp_path / "again")
    assert images_in(f"file://{tmp_path}/{name}") == images_in(tmp_path / "again")


@pytest.mark.parametrize(
    ("url", "text"), [("s3:/bucket/x", "names no server"), ("file://data/x", "machine 'data'"), ("gs:x", "no server")]
)
def test_what_is_no_url_and_no_path_is_refused(tree, tmp_path, monkeypatch, url, text):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=text):
        convert(tree, url, "wds")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(params=["disk", "bucket"])
def tars(request, tree, tmp_path, monkeypatch):
    """A folder with tars in x and y/z."""
    for name in ("x", "y/z"):
        convert(tree, tmp_path / "d" / name, "wds")
    if request.param == "disk":
        return str(tmp_path / "d")
    s3 = request.getfixturevalue("s3")
    use_s3(monkeypatch, s3.url)
    return s3.put_folder(tmp_path / "d", "tars")


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("**/*.tar", "all"),
        ("**/*.tar", "y/all"),
        ("*/*.tar", "all"),
        ("*/**/*.tar", "y/w/all"),
        ("{x,y/*}/*.tar", "y/all"),
        ("*", "all"),
        ("*.partial/*.tar", "all"),
    ],
)
def test_a_destination_in_which_the_source_would_be_looked_for_next_time_is_refused(tars, pattern, name):
    with pytest.raises(ConfigError, match="finds what is written to"):
        convert(f"{tars}/{pattern}", f"{tars}/{name}", "wds")


@pytest.mark.parametrize(("pattern", "name"), [("x/*.tar", "all"), ("*/*.tar", "new/all"), ("y/**/*.tar", "all")])
def test_a_destination_that_a_pattern_cannot_find_may_lie_beside_the_source(tars, pattern, name):
    names = [f"{tars}/{name}{len(pattern)}-{k}" for k in range(2)]
    counts = [convert(f"{tars}/{pattern}", dst, "wds").parts[0].samples for dst in names]
    assert counts[0] == counts[1] > 0


def test_a_source_that_is_called_like_a_pattern_is_taken_as_it_is(tree, tmp_path):
    convert(tree, tmp_path / "a[1]", "wds")
    convert(tmp_path / "a[1]/*.tar", tmp_path / "a1", "wds")
    for dst in ("a[1]", "a[1]/out"):
        with pytest.raises(ConfigError, match="one inside the other"):
            convert(tmp_path / "a[1]", tmp_path / dst, "wds", overwrite=True)


# ---- what was written is found again


@pytest.mark.parametrize("name", ["v2.0", "x.y/v2.tar.d"])
def test_a_folder_of_a_bucket_whose_name_has_a_dot_is_a_folder(tree, bucket, tmp_path, name):
    url = f"s3://{bucket.bucket}/{name}"
    convert(tree, url, "wds", **OPTIONS)
    assert len(IndexedWebDataset(url, cache_dir=tmp_path)) == 40
    convert(url, tmp_path / "out", "mds")
    assert sum(shard["samples"] for shard in json.loads((tmp_path / "out/index.json").read_text())["shards"]) == 40


def test_a_bucket_whose_name_has_a_dot_is_a_folder(tree, tmp_path, monkeypatch):
    with s3_server("data.example.org") as server:
        use_s3(monkeypatch, server.url)
        url = convert(tree, f"s3://{server.bucket}", "wds").parts[0].path
        assert len(IndexedWebDataset(url, cache_dir=tmp_path)) == 40


def test_a_folder_of_a_bucket_that_is_called_like_a_pattern_is_read_and_not_its_neighbour(bucket, tree, tmp_path):
    convert(tree, tmp_path / "mine", "wds")
    convert(tree, tmp_path / "other", "wds", seed=1)
    bucket.put_folder(tmp_path / "mine", "set[1]")
    bucket.put_folder(tmp_path / "other", "set1")
    dataset = IndexedWebDataset(f"s3://{bucket.bucket}/set[1]", cache_dir=tmp_path / "cache")
    assert [dataset[k]["jpg"] for k in range(40)] == images_in(tmp_path / "mine")


def test_a_table_in_a_bucket_is_refused_as_a_table(bucket, tmp_path):
    with pytest.raises(ConfigError, match="tables are read from this machine only"):
        convert(f"s3://{bucket.bucket}/t.parquet", tmp_path / "out", "wds")
