"""Which files a pattern means, on a disk and in a bucket: for training, converting, indexing and verifying alike."""

import io
import tarfile
from pathlib import Path

import pytest
from support.commands import run
from support.servers import s3_server, use_s3

from infobatch_stream import IndexedWebDataset
from infobatch_stream.convert.readers import read_source
from infobatch_stream.errors import ConfigError, DataError
from infobatch_stream.sources.urls import expand_shards

TARS = ("a.tar", "x/b.tar", "x/y/c.tar", ".hidden/d.tar", "x/.e.tar", "x/note.txt")


def write_tar(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo(f"{path.stem}.cls")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"1"))
    return path


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    root = tmp_path_factory.mktemp("tars")
    for name in TARS:
        write_tar(root / name)
    return str(root)


@pytest.fixture(scope="module")
def bucket(disk):
    with s3_server() as s3:
        yield s3, s3.put_folder(disk, "tars")


@pytest.fixture(params=["disk", "bucket"])
def root(request, disk, monkeypatch):
    if request.param == "disk":
        return disk
    s3, url = request.getfixturevalue("bucket")
    use_s3(monkeypatch, s3.url)
    return url


PATTERNS = {
    "**/*.tar": ["a.tar", "x/b.tar", "x/y/c.tar"],
    "*/**/*.tar": ["x/b.tar", "x/y/c.tar"],
    "x/**/[bc].tar": ["x/b.tar", "x/y/c.tar"],
    "**/y/**/*.tar": ["x/y/c.tar"],
    "{a,x/*}.tar": ["a.tar", "x/b.tar"],
    "{a,?}.tar": ["a.tar"],  # twice the same
    "{?,a}.tar": ["a.tar"],
    "{a,?,a}.tar": ["a.tar", "a.tar"],  # written twice
    "?/?.tar": ["x/b.tar"],
    "x/.*.tar": ["x/.e.tar"],
    "x*": ["x/b.tar"],  # a folder, since no file matches
    "x/*": ["x/b.tar", "x/note.txt"],  # files, since there are some
    "x": ["x/b.tar"],
    "x/": ["x/b.tar"],
}


def test_a_pattern_means_the_same_on_a_disk_and_in_a_bucket(root):
    for pattern, names in PATTERNS.items():
        assert expand_shards(f"{root}/{pattern}") == [f"{root}/{name}" for name in names], pattern


def test_training_converting_indexing_and_verifying_take_files_of_any_depth(tmp_path):
    for name in ("a.tar", "x/b.tar", "x/y/c.tar"):
        write_tar(tmp_path / "t" / name)
    pattern = f"{tmp_path}/t/**/*.tar"
    assert len(IndexedWebDataset(pattern)) == 3
    (source,) = read_source(pattern)
    assert [source[number]["__key__"] for number in range(len(source))] == ["a", "b", "c"]
    assert "3 shards, 3 samples" in run("verify", pattern)[1]
    assert "3" in run("index", pattern)[1]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables_are_found_by_stars_and_braces_of_any_depth(tmp_path, kind):
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    write = pa.csv.write_csv if kind == "csv" else pa.parquet.write_table
    for number, name in enumerate(("0", "x/1", "x/y/2")):
        (tmp_path / "t" / name).parent.mkdir(parents=True, exist_ok=True)
        write(pa.table({"n": [number]}), tmp_path / f"t/{name}.{kind}")
    (source,) = read_source(f"{tmp_path}/t/**/*.{kind}")
    assert [source[number]["n"] for number in range(len(source))] == [0, 1, 2]
    (source,) = read_source(f"{tmp_path}/t/{{x/{{1,y/2}},0}}.{kind}")
    assert [source[number]["n"] for number in range(len(source))] == [1, 2, 0]
    with pytest.raises(ConfigError, match=rf"x/3\.{kind} does not exist"):  # and not: without it
        read_source(f"{tmp_path}/t/x/{{1,3}}.{kind}")
    with pytest.raises(ConfigError, match="braces"):
        read_source(f"{tmp_path}/t/{{1.{kind}")


def test_tars_are_found_by_a_pattern_that_does_not_end_as_they_do(tmp_path):
    write_tar(tmp_path / "t/a.tar")
    assert len(read_source(f"{tmp_path}/t/*")[0]) == 1
    with pytest.raises(ConfigError, match=r"matches the folders .*/t; .*'data/\*\*/\*\.tar'"):
        read_source(f"{tmp_path}/*")


def test_what_is_called_like_a_pattern_is_meant_where_it_is_there(root, tmp_path, request, monkeypatch):
    names = ("run[1]/a.tar", "run1/b.tar", "q?/c.tar", "qq/d.tar", "s*/e.tar", "sx/f.tar", "g[1].tar", "g1.tar")
    for name in names:
        write_tar(tmp_path / name)
    place = str(tmp_path)
    if root.startswith("s3"):
        s3, _ = request.getfixturevalue("bucket")
        place = s3.put_folder(tmp_path, "odd")
    for pattern, expected in {
        "run[1]": ["run[1]/a.tar"],
        "run[1]/": ["run[1]/a.tar"],
        "run[1]/*.tar": ["run[1]/a.tar"],
        "run[1]/**/?.tar": ["run[1]/a.tar"],
        "q?/c.tar": ["q?/c.tar"],
        "q?/*.tar": ["q?/c.tar"],
        "s*/*.tar": ["s*/e.tar"],
        "g[1].tar": ["g[1].tar"],
        "run[12]/*.tar": ["run1/b.tar"],  # of which there is no folder
    }.items():
        assert expand_shards(f"{place}/{pattern}") == [f"{place}/{name}" for name in expected], pattern
    if not root.startswith("s3"):
        write_tar(tmp_path / "o{1,2}/h.tar")
        assert expand_shards(f"{place}/o{{1,2}}/*.tar") == [f"{place}/o{{1,2}}/h.tar"]


def test_a_file_that_links_give_several_names_is_found_once(tmp_path):
    write_tar(tmp_path / "t/x/a.tar")
    (tmp_path / "t/again").symlink_to("x")
    (tmp_path / "t/x/loop").symlink_to("..")
    found = expand_shards(f"{tmp_path}/t/**/*.tar")
    assert len(found) == 1
    assert expand_shards(f"{tmp_path}/t/*/*.tar") == [f"{tmp_path}/t/again/a.tar", f"{tmp_path}/t/x/a.tar"]


def test_what_is_written_twice_is_meant_twice(disk):
    assert expand_shards(f"{disk}/{{a,a}}.tar") == [f"{disk}/a.tar"] * 2
    assert expand_shards([f"{disk}/?.tar", f"{disk}/a.tar"]) == [f"{disk}/a.tar"] * 2


def test_what_matches_nothing_is_refused(root):
    with pytest.raises(DataError, match="a glob must match files"):
        expand_shards(f"{root}/**/no*.tar")
