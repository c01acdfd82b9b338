"""Conversions as processes: any number of them, killed, resumed, on full disks, over bad files, to buckets, on Ray."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.conversions import contents, fetched, images_in, stop_after, write_images
from typer.testing import CliRunner

from infobatch_stream import IndexedWebDataset
from infobatch_stream.convert import convert, write_shards
from infobatch_stream.convert.shard_plan import ShardPlan, cut
from infobatch_stream.errors import ConfigError, DataError
from infobatch_stream.formats.schema import MEMBERS
from infobatch_stream.formats.shard_set import STATE
from infobatch_stream.tools.app import app

pytestmark = pytest.mark.usefixtures("few_open_files")  # of StreamingDatasets

FORMATS = ("mds", "wds")
OPTIONS = {"shard_bytes": 1 << 16}  # about 11 images


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("tree"), 160, (3000, 8000))


# ---- what goes into which shard


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 50), max_size=60), limit=st.integers(1, 100), most=st.none() | st.integers(1, 9))
def test_pieces_are_as_large_as_they_may_be_and_no_larger(sizes, limit, most):
    bounds = cut(np.array(sizes, np.int64), limit, most)
    assert bounds[0] == 0
    assert bounds[-1] == len(sizes)
    for start, stop in pairwise(bounds):
        assert start < stop
        assert stop - start == 1 or (sum(sizes[start:stop]) <= limit and stop - start <= (most or 60))
        full = stop == len(sizes) or sum(sizes[start : stop + 1]) > limit or stop - start == most
        assert full


class SizedSet:
    """As much of a sample set as a plan asks for: samples of 10 bytes."""

    name, classes, fingerprint, columns = "", None, "x", {}

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def sizes(self):
        return np.full(self.count, 10)


@settings(deadline=None)
@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=3), seed=st.none() | st.integers(0, 9))
def test_tasks_hold_every_sample_of_every_set_once_in_the_order_of_the_seed(counts, seed):
    sets = [SizedSet(count) for count in counts]
    tasks = ShardPlan.begin(sets, [one.sizes() for one in sets], seed, 45).tasks(seed)
    assert [task.number for task in tasks] == list(range(len(tasks)))
    for part, count in enumerate(counts):
        own = [task for task in tasks if task.part == part]
        order = np.concatenate([task.positions for task in own])
        expected = np.arange(count) if seed is None else np.random.default_rng(seed).permutation(count)
        np.testing.assert_array_equal(order, expected)
        assert [task.first for task in own] == [4 * k for k in range(len(own))]


@pytest.mark.parametrize("format", FORMATS)
def test_any_number_of_workers_writes_the_same_bytes(tree, tmp_path, format):
    done = [convert(tree, tmp_path / str(n), format, workers=n, **OPTIONS).parts[0].shards for n in (1, 2, 3)]
    assert done[0] > 10
    assert len(set(done)) == 1
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "3")
    assert {path.stat().st_size <= 1 << 16 for path in (tmp_path / "1").glob("shard*[sr]")} == {True}


@pytest.mark.parametrize("format", FORMATS)
def test_a_shard_holds_no_more_samples_than_are_asked_for(tree, tmp_path, format):
    done = convert(tree, tmp_path / "out", format, shard_samples=7)
    assert (done.parts[0].shards, done.parts[0].samples) == (23, 160)


def test_progress_counts_to_the_total(tree, tmp_path):
    seen = []
    convert(tree, tmp_path / "out", "wds", on_progress=seen.append, **OPTIONS)
    assert [now.samples for now in seen] == sorted({now.samples for now in seen})
    assert (seen[-1].samples, seen[-1].total) == (160, 160)
    assert seen[-1].bytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.tar"))


@pytest.mark.parametrize("workers", [1, 2])
def test_the_seconds_of_a_conversion_are_without_those_of_imports(tree, tmp_path, workers):
    (tmp_path / "sitecustomize.py").write_text("""
import sys, time

class Slow:
    def find_spec(self, name, *_):
        if name == "webdataset":
            time.sleep(4)
            sys.meta_path.remove(self)

sys.meta_path.insert(0, Slow())
""")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    start = time.monotonic()
    line = command(tree, tmp_path / "out", "--format", "wds", "--workers", workers, "--json")
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
    took = time.monotonic() - start
    assert 0 < json.loads(done.stdout)["seconds"] < took - 4


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # streaming leaves what it decompresses open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("compression", ["zstd", "gz:3"])
def test_compressed_mds_with_hashes_reads_back(tree, tmp_path, compression):
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    convert(tree, tmp_path / "out", "mds", compression=compression, hashes=["xxh64", "sha1"], workers=2, **OPTIONS)
    index = json.loads((tmp_path / "out/index.json").read_text())
    for shard in index["shards"]:
        assert shard["compression"] == compression
        assert shard["zip_data"]["hashes"].keys() == {"sha1", "xxh64"}
        assert (tmp_path / "out" / shard["zip_data"]["basename"]).stat().st_size == shard["zip_data"]["bytes"]
    clean_stale_shared_memory()
    dataset = StreamingDataset(local=str(tmp_path / "out"), batch_size=1, validate_hash="sha1")
    assert dataset.num_samples == 160
    for shard in dataset.shards:
        shard.column_encodings[shard.column_names.index("image")] = "bytes"
    found = {dataset[k]["name"]: dataset[k]["image"] for k in range(160)}
    assert found == {str(path.relative_to(tree)): path.read_bytes() for path in tree.rglob("*.jpg")}
    del dataset
    clean_stale_shared_memory()


def test_tars_are_not_compressed(tree, tmp_path):
    with pytest.raises(ConfigError, match="only MDS shards are compressed"):
        convert(tree, tmp_path / "out", "wds", compression="zstd")


# ---- broken off, and resumed


def command(*arguments):
    return [sys.executable, "-m", "infobatch_stream.tools", "convert", *map(str, arguments)]


def wait_for(condition, process):
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("large"), 3000, (10_000, 10_001))


SLOW = [("mds", "KILL"), ("wds", "TERM"), ("wds", "INT")]


@pytest.mark.parametrize(
    ("format", "how"),
    [("wds", "KILL"), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_a_conversion_that_was_killed_goes_on_and_keeps_what_is_done(large, tmp_path, format, how):
    dst = tmp_path / "out"
    arguments = [large, dst, "--format", format, "--shard-size", "200KB", "--workers", "2"]
    pattern = "*.tar" if format == "wds" else "*.mds"
    partial = tmp_path / "out.partial"
    with subprocess.Popen(command(*arguments), stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        wait_for(lambda: len(list((partial / STATE / "done").glob("*"))) > 4, process)
        process.send_signal(getattr(signal, f"SIG{how}"))
        _, err = process.communicate(timeout=30)
    assert not dst.exists()
    deadline = time.monotonic() + 10
    while subprocess.run(["pgrep", "-s", str(process.pid)], check=False, stdout=subprocess.DEVNULL).returncode == 0:
        assert time.monotonic() < deadline, "a worker lives on"
        time.sleep(0.1)
    if how == "KILL":
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == (143 if how == "TERM" else 130)
        assert "--resume" in err
        assert not (partial / STATE / "scratch").exists()
    kept = {path.name: path.stat().st_ino for path in partial.glob(pattern)}
    recorded = len(list((partial / STATE / "done").glob("*.json")))
    assert 0 <= len(kept) - recorded <= 1  # a kill may fall between a shard and its record
    with pytest.raises(ConfigError, match=r"broken off.*--resume"):
        convert(large, dst, format, shard_bytes=200 << 10)
    with pytest.raises(ConfigError, match="begun with another seed"):
        convert(large, dst, format, shard_bytes=200 << 10, resume=True, seed=1)
    again = subprocess.run(command(*arguments, "--resume", "--json"), capture_output=True, text=True, check=True)
    assert json.loads(again.stdout)["parts"][0]["samples"] == 3000
    now = {path.name: path.stat().st_ino for path in dst.glob(pattern)}
    assert sum(now[name] == inode for name, inode in kept.items()) >= recorded
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    convert(large, tmp_path / "whole", format, shard_bytes=200 << 10)
    assert contents(dst) == contents(tmp_path / "whole")


def test_what_is_broken_off_before_a_shard_is_done_leaves_nothing(tree, tmp_path):
    (tmp_path / "src/c").mkdir(parents=True)
    (tmp_path / "src/c/empty.jpg").touch()
    with pytest.raises(DataError, match=r"c/empty\.jpg is empty"):
        convert(tmp_path / "src", tmp_path / "new/out", "wds")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_a_shard_that_was_cut_by_a_power_failure_is_made_again(large, tmp_path):
    stop_after(large, tmp_path / "out", 6)
    shards = sorted((tmp_path / "out.partial").glob("*.tar"))
    os.truncate(shards[2], 100)
    before = {path.name: path.stat().st_ino for path in shards}
    convert(large, tmp_path / "out", "wds", shard_bytes=200 << 10, resume=True)
    same = [name for name, inode in before.items() if (tmp_path / "out" / name).stat().st_ino == inode]
    assert same == ["shard-000000.tar", "shard-000001.tar"]
    convert(large, tmp_path / "whole", "wds", shard_bytes=200 << 10)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_is_no_conversion_of_ours_is_not_resumed_and_not_removed(tree, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match="no conversion that can be resumed"):
        convert(tree, tmp_path / "out", "wds", resume=True)
    assert (tmp_path / "out.partial/thesis.tex").read_text() == "precious"


def test_a_column_under_another_name_is_not_resumed(tmp_path):
    lines = [f"{number},{number % 3},{'x' * 500}" for number in range(2000)]
    (tmp_path / "t.csv").write_text("\n".join(["fine,coarse,text", *lines]))
    options = {"text": "text", "label": "fine"}
    stop_after(tmp_path / "t.csv", tmp_path / "out", 3, columns=options)
    for other in ({"text": "text", "label": "coarse"}, {"label": "fine", "text": "text"}):
        with pytest.raises(ConfigError, match="begun with another column"):
            convert(tmp_path / "t.csv", tmp_path / "out", "wds", shard_bytes=200 << 10, columns=other, resume=True)
    convert(tmp_path / "t.csv", tmp_path / "out", "wds", shard_bytes=200 << 10, columns=options, resume=True)


def mixed_tar(path):
    """Images and labels, of which one lacks its label, and a PNG that is damaged."""
    rng = np.random.default_rng(0)
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in range(80):
            stream = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(stream, "PNG")
            image = stream.getvalue()
            members = {"png": image[:900] if number == 60 else image, "cls": b"7", "json": b"{}"}
            if number == 50:
                del members["cls"]
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{number:03}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path.parent


@pytest.mark.parametrize("where", ["disk", "bucket"])
@pytest.mark.parametrize(("first", "then"), [("raise", "skip"), ("skip", "raise")])
def test_a_conversion_of_tars_goes_on_with_the_columns_that_it_began_with(request, tmp_path, where, first, then):
    dst = f"s3://{request.getfixturevalue('bucket').bucket}/{first}" if where == "bucket" else tmp_path / "out"
    options = {"shard_samples": 10, "check": True}
    src = mixed_tar(tmp_path / "src/x.tar")
    seen = []

    def stop(now):
        seen.append(now)
        if len(seen) == 3:
            raise KeyboardInterrupt

    kind, watch = (DataError, None) if first == "raise" else (KeyboardInterrupt, stop)
    with pytest.raises(kind) as caught:
        convert(src, dst, "wds", on_error=first, on_progress=watch, **options)
    assert "--resume" in caught.value.__notes__[0]
    if first == "raise":  # what is advised
        done = convert(src, dst, "wds", on_error=then, resume=True, **options)
        assert (done.parts[0].samples, len(done.problems)) == (79, 1)
        assert "'cls' is stored as bytes, as when the conversion began" in done.notes[0]
        columns = json.loads(fetched(dst)["columns.json"] if where == "bucket" else (dst / "columns.json").read_text())
        assert columns["cls"]["mds"] == "bytes"
        assert MEMBERS in columns
    else:
        with pytest.raises(DataError, match="'050'"):
            convert(src, dst, "wds", on_error=then, resume=True, **options)
        done = convert(src, dst, "wds", on_error=first, resume=True, **options)
        assert (done.parts[0].samples, len(done.problems), done.notes) == (78, 2, ())


def test_a_tree_of_images_whose_only_jpeg_is_removed_goes_on_with_the_columns_that_it_began_with(tmp_path):
    for number in range(40):
        path = tmp_path / "src/c" / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (9, 9), number).save(path)
    bad = tmp_path / "src/c/99.jpg"
    bad.touch()
    with pytest.raises(DataError, match="is empty") as caught:
        convert(tmp_path / "src", tmp_path / "out", "mds", shard_samples=5, shuffle=False)
    assert "remove what is named" in caught.value.__notes__[0]
    bad.unlink()
    done = convert(
        tmp_path / "src", tmp_path / "out", "mds", shard_samples=5, shuffle=False, resume=True, on_error="skip"
    )
    assert done.parts[0].samples == 40
    assert json.loads((tmp_path / "out/columns.json").read_text())["image"]["mds"] == "jpeg"


@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_where_no_sample_can_be_read_nothing_is_kept_and_once_mended_all_are_converted(request, tmp_path, where):
    dst = f"s3://{request.getfixturevalue('bucket').bucket}/none" if where == "bucket" else tmp_path / "out"
    src = write_images(tmp_path / "src", 40, (1, 2))
    for path in src.rglob("*.jpg"):
        path.write_bytes(b"")
    options = {"shard_samples": 3, "on_error": "skip"}
    with pytest.raises(DataError, match="no sample could be read") as caught:
        convert(src, dst, "wds", **options)
    assert not getattr(caught.value, "__notes__", [])
    assert (fetched(dst) if where == "bucket" else list(tmp_path.glob("out*"))) in ({}, [])
    write_images(src, 40, (3000, 8000))
    assert convert(src, dst, "wds", resume=True, **options).parts[0].samples == 40


@pytest.mark.parametrize("split", ["test", "train"])  # the first of them, and the last
def test_a_split_of_which_no_sample_could_be_read_may_be_mended_and_its_conversion_goes_on(tmp_path, split):
    for name in ("test", "train"):
        write_images(tmp_path / "src" / name, 40, (3000, 8000))
    bad = sorted((tmp_path / "src" / split).rglob("*.jpg"))
    good = [path.read_bytes() for path in bad]
    for path in bad:
        path.write_bytes(b"")
    options = {"shard_samples": 3, "on_error": "skip"}
    with pytest.raises(DataError, match=f"no sample of {split} could be read") as caught:
        convert(tmp_path / "src", tmp_path / "out", "wds", **options)
    assert bool(getattr(caught.value, "__notes__", [])) == (tmp_path / "out.partial").exists() == (split == "train")
    for path, data in zip(bad, good, strict=True):
        path.write_bytes(data)
    done = convert(tmp_path / "src", tmp_path / "out", "wds", resume=True, **options)
    assert [part.samples for part in done.parts] == [40, 40]


@pytest.mark.parametrize("kind", ["tree", "table"])
def test_after_bad_data_that_is_advised_which_works(tmp_path, kind):
    images = [Image.new("L", (9, 9), number) for number in range(40)]
    (tmp_path / "src/c").mkdir(parents=True)
    for number, image in enumerate(images):
        image.save(tmp_path / f"src/c/{number:02}.png")
    src, options = tmp_path / "src", {"shard_samples": 5, "check": True, "shuffle": False}
    bad = src / "c/30.png"
    whole = bad.read_bytes()

    def make(data):
        bad.write_bytes(data)
        if kind == "table":
            rows = [{"image": path.read_bytes()} for path in sorted((tmp_path / "src").rglob("*.png"))]
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
        return src if kind == "tree" else tmp_path / "t.parquet"

    for dst in ("skipped", "mended"):
        with pytest.raises(DataError, match="cannot be decoded") as caught:
            convert(make(whole[:-30]), tmp_path / dst, "wds", **options)
        (note,) = caught.value.__notes__
        assert ("mend or remove what is named, and go on with --resume" in note) == (kind == "tree")
        if dst == "skipped":
            done = convert(make(whole[:-30]), tmp_path / dst, "wds", resume=True, on_error="skip", **options)
            assert (done.parts[0].samples, len(done.problems)) == (39, 1)
    if kind == "table":
        shutil.rmtree(tmp_path / "mended.partial")
    assert convert(make(whole), tmp_path / "mended", "wds", resume=True, **options).parts[0].samples == 40


def test_a_source_of_a_pattern_is_not_replaced_by_what_is_made_of_it(tree, tmp_path):
    convert(tree, tmp_path / "data", "wds", **OPTIONS)
    before = contents(tmp_path / "data")
    for source in ("shard-{000000..000001}.tar", "*.tar", ""):
        with pytest.raises(ConfigError, match="one inside the other"):
            convert(tmp_path / "data" / source, tmp_path / "data", "mds", overwrite=True)
        with pytest.raises(ConfigError, match="one inside the other"):
            convert(f"file://{tmp_path}/data/{source}", f"file://{tmp_path}/data", "mds", overwrite=True)
    assert contents(tmp_path / "data") == before
    convert(tmp_path / "data/*.tar", f"file://{tmp_path}/out", "wds")
    assert images_in(tmp_path / "out") == images_in(tmp_path / "data")


def test_a_conversion_that_cannot_be_put_in_its_place_is_kept(tree, tmp_path, monkeypatch):
    def fail(self, target):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", fail)
        with pytest.raises(OSError, match="cross-device") as caught:
            convert(tree, tmp_path / "out", "wds", **OPTIONS)
    assert "--resume" in caught.value.__notes__[0]
    convert(tree, tmp_path / "out", "wds", resume=True, **OPTIONS)
    assert len(images_in(tmp_path / "out")) == 160
    assert not (tmp_path / "out" / STATE).exists()


def test_images_that_jpeg_cannot_hold_or_that_decoders_choke_on_are_named(tmp_path):
    (tmp_path / "src/c").mkdir(parents=True)
    Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)).save(tmp_path / "src/c/deep.tiff")
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\xff\xff\0\0"
    Image.new("RGB", (64, 64)).save(tmp_path / "src/c/exif.jpg", exif=exif)
    Image.new("RGB", (64, 64)).save(tmp_path / "src/c/fine.jpg")
    done = convert(tmp_path / "src", tmp_path / "out", "wds", resize=20, on_error="skip")
    assert done.parts[0].samples + len(done.problems) == 3
    assert any("deep.tiff" in text and "more than 8 bits" in text for text in done.problems)


@pytest.mark.parametrize("key", ["img.000", ""])
def test_a_key_that_would_be_read_as_another_is_refused(tmp_path, key):
    with pytest.raises(DataError, match="would be read as another"):
        write_shards([{"__key__": key, "text": "x"}], tmp_path / "out", "wds")


def test_resume_without_anything_to_resume_begins(tree, tmp_path):
    convert(tree, tmp_path / "out", "wds", resume=True, **OPTIONS)
    assert len(images_in(tmp_path / "out")) == 160


def test_two_conversions_to_one_folder_are_kept_apart(large, tmp_path):
    arguments = command(large, tmp_path / "out", "--format", "wds", "--shard-size", "200KB")
    with subprocess.Popen(arguments) as process:
        wait_for(lambda: any((tmp_path / "out.partial" / STATE / "done").glob("*")), process)
        process.send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(ConfigError, match="another process is converting"):
                convert(large, tmp_path / "out", "wds", shard_bytes=200 << 10, resume=True)
        finally:
            process.send_signal(signal.SIGCONT)
        assert process.wait(60) == 0
    assert len(images_in(tmp_path / "out")) == 3000


# ---- what cannot be read, and what cannot be written


def test_bad_files_are_named_and_passed_over_on_request(tree, tmp_path):
    src = tmp_path / "src"
    for name in ("c0/a.jpg", "c0/b.jpg", "c1/c.jpg", "c1/d.jpg"):
        (src / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 30), "red").save(src / name)
    (src / "c0/b.jpg").write_bytes(b"")
    (src / "c1/d.jpg").write_bytes((src / "c1/c.jpg").read_bytes()[:200])
    with pytest.raises(DataError, match=r"c0/b\.jpg is empty"):
        convert(src, tmp_path / "out", "wds", shuffle=False)
    done = convert(src, tmp_path / "out", "wds", on_error="skip")
    assert (done.parts[0].samples, len(done.problems)) == (3, 1)
    checked = CliRunner().invoke(
        app, ["convert", str(src), str(tmp_path / "mds"), "--format", "mds", "--on-error", "skip", "--check", "--json"]
    )
    assert checked.exit_code == 0, checked.stderr
    said = json.loads(checked.stdout)
    assert said["parts"][0]["samples"] == 2
    assert sorted("b.jpg" in text or "c1/d.jpg: an image cannot be decoded" in text for text in said["problems"]) == [
        True,
        True,
    ]
    for path in src.rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="no sample could be read"):
        convert(src, tmp_path / "none", "wds", on_error="skip")
    assert not (tmp_path / "none").exists()


def test_images_are_made_smaller_only_on_request(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "src/c").mkdir(parents=True)
    image = Image.fromarray(rng.integers(0, 256, (90, 60, 3), dtype=np.uint8))
    for name in ("a.jpg", "b.png", "c.webp", "d.bmp"):
        image.save(tmp_path / "src/c" / name)
    Image.new("L", (10, 12)).save(tmp_path / "src/c/small.jpg")
    convert(tmp_path / "src", tmp_path / "out", "wds", resize=30, quality=80)
    dataset = IndexedWebDataset(str(tmp_path / "out")).decode("pil")
    sizes = Counter()
    for k in range(len(dataset)):
        sample = dataset[k]
        kind = next(kind for kind in ("jpg", "png") if kind in sample)
        sizes[sample["txt"], kind, sample[kind].size] += 1
    assert sizes.keys() == {
        ("c/a.jpg", "jpg", (30, 45)),
        ("c/b.png", "png", (30, 45)),
        ("c/c.webp", "jpg", (30, 45)),
        ("c/d.bmp", "jpg", (30, 45)),
        ("c/small.jpg", "jpg", (10, 12)),
    }


def test_samples_of_one_key_stay_two_and_images_of_tars_get_the_extension_of_what_they_become(tmp_path):
    import io
    import tarfile

    stream = io.BytesIO()
    Image.new("RGB", (50, 40)).save(stream, "WEBP")
    (tmp_path / "src").mkdir()
    for number, names in enumerate((["a.view.webp"], ["a.view.webp", "a.cls"], ["b.view.webp"])):
        with tarfile.open(tmp_path / "src" / f"{number}.tar", "w") as tar:
            for name in names:
                data = b"7" if name == "a.cls" else stream.getvalue()
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    convert(tmp_path / "src", tmp_path / "same", "wds")
    convert(tmp_path / "src", tmp_path / "small", "wds", resize=20, columns={"m": "view.webp", "l": "cls"})
    for folder, extension in (("same", "view.webp"), ("small", "view.jpg")):
        dataset = IndexedWebDataset(str(tmp_path / folder))
        fields = [{name for name in dataset[k] if name[0] != "_"} for k in range(len(dataset))]
        assert fields == [{extension}, {extension, "cls"}, {extension}]


@pytest.mark.parametrize("options", [{"resize": 0}, {"quality": 96}, {"shard_samples": 0}])
def test_options_that_cannot_work_are_refused(tree, tmp_path, options):
    with pytest.raises(ConfigError):
        convert(tree, tmp_path / "out", "wds", **options)


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", folder], check=False).returncode:
        pytest.skip("mounting is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_ends_with_a_clear_error_and_whole_shards(tree, tmp_path, small_disk, format, workers):
    dst = small_disk / "out"
    with pytest.raises(OSError, match="No space left on device") as caught:
        convert(tree, dst, format, workers=workers, **OPTIONS)
    assert caught.value.errno == errno.ENOSPC
    assert str(dst) in str(caught.value)
    assert "--resume" in caught.value.__notes__[0]
    convert(tree, tmp_path / "whole", format, **OPTIONS)
    whole = contents(tmp_path / "whole")
    left = {name: data for name, data in contents(f"{dst}.partial").items() if not name.startswith(STATE)}
    assert left
    assert all(whole[name] == data for name, data in left.items())
    subprocess.run(["mount", "-o", "remount,size=10m", small_disk], check=True)
    convert(tree, dst, format, resume=True, **OPTIONS)
    assert contents(dst) == whole


# ---- to a bucket


@pytest.mark.parametrize("format", FORMATS)
def test_a_bucket_gets_the_same_as_a_folder(tree, tmp_path, bucket, format):
    url = f"s3://{bucket.bucket}/a-{format}"
    done = convert(tree, url, format, workers=2, **OPTIONS)
    convert(tree, tmp_path / "out", format, **OPTIONS)
    assert fetched(url) == contents(tmp_path / "out")
    assert done.parts[0].path == url
    before = fetched(url)
    for options in ({}, {"overwrite": True}):  # a failure after the old ones are gone would leave nothing
        with pytest.raises(ConfigError, match="not replaced"):
            convert(tree, url, format, seed=3, **options)
    with pytest.raises(ConfigError, match="one inside the other"):
        convert(f"{url}/*.tar", url, format)
    assert fetched(url) == before


def test_tars_of_a_bucket_are_a_source_with_their_columns_and_classes(tree, tmp_path, bucket):
    convert(tree, f"s3://{bucket.bucket}/src", "wds", **OPTIONS)
    convert(f"s3://{bucket.bucket}/src/*.tar", tmp_path / "out", "mds")
    convert(tree, tmp_path / "there", "wds", **OPTIONS)
    convert(tmp_path / "there", tmp_path / "same", "mds")
    assert contents(tmp_path / "out") == contents(tmp_path / "same")
    assert {"columns.json", "classes.json"} <= contents(tmp_path / "out").keys()


def test_samples_that_come_one_by_one_may_go_to_a_bucket(bucket):
    url = f"s3://{bucket.bucket}/one"
    write_shards(({"text": str(k), "label": k} for k in range(500)), url, "wds", shard_bytes=1 << 17)
    names = sorted(fetched(url))
    assert names[:2] == ["columns.json", "shard-000000.tar"]
    assert len(names) > 3


def test_a_conversion_to_a_bucket_goes_on(large, tmp_path, bucket):
    url = f"s3://{bucket.bucket}/resumed"
    stop_after(large, url, 12)
    left = fetched(url)
    done = [name for name in left if name.startswith(f"{STATE}/done")]
    assert done
    with pytest.raises(ConfigError, match="--resume"):
        convert(large, url, "wds", shard_bytes=200 << 10)
    with pytest.raises(ConfigError, match="another seed"):
        convert(large, url, "wds", shard_bytes=200 << 10, seed=4, resume=True)
    convert(large, url, "wds", shard_bytes=200 << 10, resume=True)
    convert(large, tmp_path / "out", "wds", shard_bytes=200 << 10)
    assert fetched(url) == contents(tmp_path / "out")


def test_a_bucket_that_holds_something_else_is_left_alone(tree, bucket):
    bucket.put("home/thesis.tex", b"precious")
    with pytest.raises(ConfigError, match="not empty"):
        convert(tree, f"s3://{bucket.bucket}/home", "wds")
    assert fetched(f"s3://{bucket.bucket}/home") == {"thesis.tex": b"precious"}


@pytest.mark.parametrize(
    ("url", "text"), [("s3://no-such-bucket/x", "no-such-bucket"), ("nothing://x/y", "nothing://x/y.*[Pp]rotocol")]
)
def test_a_url_that_cannot_be_written_is_named(tree, bucket, url, text):
    with pytest.raises((ConfigError, OSError), match=text):
        convert(tree, url, "wds", **OPTIONS)


# ---- on Ray


@pytest.mark.parametrize("format", [pytest.param("mds", marks=pytest.mark.slow), "wds"])
def test_a_ray_cluster_writes_the_same_bytes(tree, tmp_path, format):
    code = f"""
from infobatch_stream.convert import convert
convert({str(tree)!r}, {str(tmp_path / "ray")!r}, {format!r}, shard_bytes=1 << 16, ray="local")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    convert(tree, tmp_path / "here", format, **OPTIONS)
    assert contents(tmp_path / "ray") == contents(tmp_path / "here")


def test_a_ray_cluster_that_is_not_there_is_named(tree, tmp_path):
    code = f"""
from infobatch_stream.tools.app import app
app(["convert", {str(tree)!r}, {str(tmp_path / "out")!r}, "--format", "wds", "--ray", "127.0.0.1:1"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1
    assert "no Ray cluster can be reached at 127.0.0.1:1" in done.stderr
    assert list(tmp_path.iterdir()) == []
