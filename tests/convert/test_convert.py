"""Conversion: what is read back is what was there, and a conversion that fails leaves nothing behind."""

import gzip
import io
import json
import resource
import shutil
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from support.commands import run
from support.idx_files import make_idx, write_idx

from infobatch_stream import IndexedWebDataset, InfoBatchLoader
from infobatch_stream.convert.pipeline import Conversion, convert, write_shards
from infobatch_stream.convert.readers import read_idx, read_images
from infobatch_stream.errors import ConfigError, DataError, MissingExtraError, StoreError
from infobatch_stream.formats.schema import Column, EncodedImage
from infobatch_stream.sources.urls import expand_shards
from infobatch_stream.sources.webdataset.index_cache import is_fresh
from infobatch_stream.tools.__main__ import main
from infobatch_stream.tools.convert import parse_size

pytestmark = pytest.mark.usefixtures("few_open_files")  # of StreamingDatasets

FORMATS = ("mds", "wds")
FILES = [
    *(f"ants/{k}.jpg" for k in range(12)),
    "ants/deep/er/UPPER.JPG",
    "ants/two.dots.png",
    *(f"bees/{k}.png" for k in range(9)),
    "bees/b.jpeg",
    "bees/c.WebP",
    "bees/d.bmp",
    "crâne d'âne/e.gif",
    "crâne d'âne/f.PPM",
    "crâne d'âne/g.tiff",
]


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> Path:
    """Images of every kind in three class folders, with things among them that are no images."""
    src, rng = tmp_path_factory.mktemp("tree"), np.random.default_rng(7)
    for name in FILES:
        path = src / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)).save(path)
    (src / "README.txt").write_text("not an image")
    (src / "ants" / "notes.txt").write_text("not an image")
    (src / "ants" / "._0.jpg").write_bytes(b"resource fork")
    (src / ".hidden").mkdir()
    return src


def read_all(dataset) -> list:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset does not close the tars it has read
        return list(dataset)


def read_back(folder: Path, format: str, raw: bool = True) -> list[dict]:
    """The samples of ``folder`` in order, by the libraries that users read shards with."""
    if format == "wds":
        import webdataset

        dataset = webdataset.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False)
        return read_all(dataset if raw else dataset.decode("pil"))
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    dataset = StreamingDataset(local=str(folder), batch_size=1, shuffle=False)
    if raw:
        for shard in dataset.shards:
            if shard.column_encodings[shard.column_names.index("image")] in ("jpeg", "png"):
                shard.column_encodings[shard.column_names.index("image")] = "bytes"
    samples = [dataset[k] for k in range(len(dataset))]
    del dataset
    clean_stale_shared_memory()
    return samples


def images_of(folder: Path, format: str) -> list[tuple[str, int, bytes]]:
    """(name, label, bytes) of every image, in order."""
    samples = read_back(folder, format)
    if format == "mds":
        return [(sample["name"], sample["label"], sample["image"]) for sample in samples]
    return [
        (
            sample["txt"].decode(),
            int(sample["cls"]),
            next(data for key, data in sample.items() if key[0] != "_" and key not in ("cls", "txt")),
        )
        for sample in samples
    ]


def shard_bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".npz"  # an index holds the time of its shard
    }


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("format", FORMATS)
def test_every_image_comes_back_byte_for_byte_with_its_label(tree, tmp_path, format):
    done = convert(tree, tmp_path / "out", format, shard_bytes=1 << 14)
    found = images_of(tmp_path / "out", format)
    classes = ["ants", "bees", "crâne d'âne"]
    expected = [(name, classes.index(name.split("/")[0]), (tree / name).read_bytes()) for name in FILES]
    assert Counter(found) == Counter(expected)
    assert json.loads((tmp_path / "out/classes.json").read_text("utf-8")) == classes
    assert done.classes == tuple(classes)
    assert [part.samples for part in done.parts] == [len(FILES)]
    assert done.skipped == 4  # README.txt, notes.txt, ._0.jpg and .hidden
    assert listing(tmp_path)[0] == "out"
    assert not [name for name in listing(tmp_path) if "partial" in name]


@pytest.mark.parametrize("format", FORMATS)
def test_images_decode_to_the_pixels_of_the_source(tree, tmp_path, format):
    convert(tree, tmp_path / "out", format)
    samples = read_back(tmp_path / "out", format, raw=False)
    assert len(samples) == len(FILES)
    kinds = ("jpg", "png", "jpeg", "webp", "bmp", "gif", "ppm", "tiff", "image")
    for sample in samples:
        with Image.open(tree / sample.get("name", sample.get("txt"))) as original:
            expected = np.asarray(original.convert("RGB"))
        image = next(sample[kind] for kind in kinds if kind in sample)
        if isinstance(image, bytes):  # webdataset decodes some kinds only
            image = Image.open(io.BytesIO(image))
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), expected)


def test_webdataset_users_get_tuples_and_lower_case_extensions(tree, tmp_path):
    import webdataset

    some = tmp_path / "src"
    for name in FILES[:24]:  # jpg, JPG, png, jpeg
        (some / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tree / name, some / name)
    convert(some, tmp_path / "out", "wds")
    dataset = webdataset.WebDataset(str(tmp_path / "out/shard-000000.tar"), shardshuffle=False)
    pairs = read_all(dataset.decode("pil").to_tuple("jpg;png;jpeg", "cls"))
    assert Counter(label for _, label in pairs) == {0: 14, 1: 10}
    assert all(image.size == (11, 9) for image, _ in pairs)
    keys = [sample["__key__"] for sample in read_back(tmp_path / "out", "wds")]
    assert keys == [f"{k:09d}" for k in range(24)]
    extensions = {key for sample in read_back(tmp_path / "out", "wds") for key in sample if key[0] != "_"}
    assert extensions == {"jpg", "jpeg", "png", "cls", "txt"}


@pytest.mark.parametrize(("names", "encoding"), [(["a.png"], "png"), (["a.jpg", "b.png"], "jpeg"), (["a.webp"], "png")])
def test_mds_encoding_is_jpeg_if_any_image_is(tmp_path, names, encoding):
    (tmp_path / "c").mkdir()
    for name in names:
        (tmp_path / "c" / name).write_bytes(b"x")
    assert read_images(tmp_path)[0].columns["image"].mds == encoding


@pytest.mark.parametrize("format", FORMATS)
def test_order_is_the_seeds_and_bytes_repeat(tree, tmp_path, format):
    for name, options in {
        "a": {"seed": 5},
        "again": {"seed": 5},
        "other": {"seed": 6},
        "sorted": {"shuffle": False},
    }.items():
        convert(tree, tmp_path / name, format, shard_bytes=1 << 14, **options)
        time.sleep(0.01)
    in_order = [name for name, _, _ in images_of(tmp_path / "sorted", format)]
    shuffled = [name for name, _, _ in images_of(tmp_path / "a", format)]
    other = [name for name, _, _ in images_of(tmp_path / "other", format)]
    assert in_order == sorted(FILES)
    assert shuffled == [in_order[k] for k in np.random.default_rng(5).permutation(len(FILES))]
    assert other != shuffled
    assert sorted(other) == in_order
    assert shard_bytes_of(tmp_path / "a") == shard_bytes_of(tmp_path / "again")
    assert len([name for name in shard_bytes_of(tmp_path / "a") if name.startswith("shard")]) > 1


def as_dataset(folder: Path, format: str):
    if format == "wds":
        return IndexedWebDataset(str(folder))
    from streaming import StreamingDataset

    return StreamingDataset(local=str(folder))


@pytest.mark.parametrize("format", FORMATS)
def test_scores_follow_the_shards_to_another_folder_but_not_into_another_order(tmp_path, format):
    samples = [{"image": np.full((4, 4), k), "label": k % 5} for k in range(300)]  # all of one size
    write_shards(samples, tmp_path / "one", format, shard_bytes=1 << 14)
    write_shards(samples[::-1], tmp_path / "other", format, shard_bytes=1 << 14)
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    sizes = [{file.name: file.stat().st_size for file in folder.glob("shard*[sr]")} for folder in tmp_path.iterdir()]
    assert sizes[0] == sizes[1] == sizes[2]
    options = {"batch_size": 100, "epochs": 2, "existing": "continue", "collate_fn": len}
    loader = InfoBatchLoader(as_dataset(tmp_path / "one", format), tmp_path / "scores.zarr", **options)
    for _, picks in loader:
        loader.update(picks.index.float(), picks)
    loader.commit()
    moved = InfoBatchLoader(as_dataset(tmp_path / "moved", format), tmp_path / "scores.zarr", **options)
    assert moved.epoch == 1
    assert len(list(moved)) == 3
    with pytest.raises(StoreError, match="scores of another dataset"):
        InfoBatchLoader(as_dataset(tmp_path / "other", format), tmp_path / "scores.zarr", **options)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_values_come_back_identical(tmp_path, format, suffix):
    splits = make_idx(tmp_path / "src", suffix)
    done = convert(tmp_path / "src", tmp_path / "out", format, seed=2)
    assert [(part.path.name, part.samples) for part in done.parts] == [("test", 20), ("train", 50)]
    for name, (images, labels) in splits.items():
        order = np.random.default_rng(2).permutation(len(images))
        samples = read_back(tmp_path / "out" / name, format)
        if format == "wds":
            samples = [
                {"image": np.load(io.BytesIO(s["npy"]), allow_pickle=False), "label": int(s["cls"])} for s in samples
            ]
        assert all(sample["image"].dtype == np.uint8 for sample in samples)
        np.testing.assert_array_equal([sample["image"] for sample in samples], images[order])
        np.testing.assert_array_equal([sample["label"] for sample in samples], labels[order])
        assert json.loads((tmp_path / "out" / name / "classes.json").read_text()) == list("01234")


def test_a_plain_idx_file_goes_before_its_gzip(tmp_path):
    make_idx(tmp_path / "src")
    (tmp_path / "src/train-images-idx3-ubyte.gz").write_bytes(b"damaged")
    assert sum(part.samples for part in convert(tmp_path / "src", tmp_path / "out", "wds").parts) == 70


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("limit", [20_480, 30_000, 100_000])
def test_no_shard_is_larger_than_allowed_and_few_are_needed(tmp_path, format, limit):
    rng = np.random.default_rng(0)
    samples = [
        {"image": EncodedImage(rng.bytes(int(size)), "jpg"), "label": k}
        for k, size in enumerate(rng.integers(1, 9000, 60))
    ]
    done = write_shards(samples, tmp_path / "out", format, shard_bytes=limit)
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("shard*[sr]")]
    assert (done.samples, done.shards, done.bytes) == (60, len(sizes), sum(sizes))
    assert max(sizes) <= limit
    assert sorted(sizes)[1] > limit - 9000 - 2048 - 10240  # all but the last are as full as they can be
    found = [
        (s["image"], s["label"]) if format == "mds" else (s["jpg"], int(s["cls"]))
        for s in read_back(tmp_path / "out", format)
    ]
    assert found == [(s["image"].data, s["label"]) for s in samples]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("at", [0, 3])
def test_a_sample_larger_than_a_shard_is_refused(tmp_path, format, at):
    samples = [{"data": bytes(20_000 if k == at else 10)} for k in range(5)]
    with pytest.raises(ConfigError, match=rf"sample {at} needs a shard of .*--shard-size"):
        write_shards(samples, tmp_path / "out", format, shard_bytes=1 << 14)
    assert listing(tmp_path) == []


@pytest.mark.parametrize("format", FORMATS)
def test_columns_follow_the_first_sample(tmp_path, format):
    image = np.arange(6, dtype=">i4").reshape(2, 3).T
    write_shards([{"image": image, "label": np.int64(3), "note": "né"}], tmp_path / "out", format)
    (sample,) = read_back(tmp_path / "out", format)
    if format == "mds":
        assert (sample["label"], sample["note"]) == (3, "né")
        np.testing.assert_array_equal(sample["image"], image)
    else:
        assert (sample["cls"], sample["txt"].decode()) == (b"3", "né")
        np.testing.assert_array_equal(np.load(io.BytesIO(sample["npy"])), image)


@pytest.mark.parametrize("format", FORMATS)
def test_columns_may_be_given(tmp_path, format):
    columns = {"a": Column("str", "a.txt"), "b": Column("str", "b.txt")}
    write_shards([{"a": "x", "b": "y"}], tmp_path / "out", format, columns=columns)
    (sample,) = read_back(tmp_path / "out", format, raw=False) if format == "wds" else [{}]
    assert format == "mds" or (sample["a.txt"], sample["b.txt"]) == ("x", "y")


@pytest.mark.parametrize(
    ("samples", "format", "options", "error", "text"),
    [
        ([], "mds", {}, ConfigError, "no samples"),
        ([{"a": 1}], "tar", {}, ConfigError, "'tar'; 'mds' and 'wds'"),
        ([{"a": 1}], "mds", {"shard_bytes": 100}, ConfigError, "16,384 to"),
        ([{"a": 1}], "wds", {"shard_bytes": 1 << 32}, ConfigError, "4,294,967,295"),
        ([{"a": 1j}], "wds", {}, ConfigError, "'a' is a complex"),
        ([{"a": np.zeros(0)}], "mds", {}, ConfigError, "not empty"),
        ([{"a": 1}, {"b": 1}], "mds", {}, DataError, r"sample 1 has the fields \['b'\]"),
        ([{"a": 1}, {"a": "x"}], "mds", {}, DataError, "sample 1 does not fit"),
        ([{"a": 1}, {"a": 1.5}], "wds", {}, DataError, "sample 1 does not fit"),
        ([{"a": np.zeros(2)}, {"a": np.zeros(3)}], "mds", {}, DataError, "an array of shape"),
        ([{"a": 1, "b": 2}], "wds", {}, DataError, "two columns have the extension 'cls'"),
        ([{"a": 1}], "mds", {"columns": {"a": Column("no such", "x")}}, ConfigError, "no such"),
    ],
)
def test_samples_that_cannot_be_stored_are_refused(tmp_path, samples, format, options, error, text):
    with pytest.raises(error, match=text):
        write_shards(samples, tmp_path / "new" / "out", format, **options)
    assert listing(tmp_path) == []


def no_such_folder(src: Path) -> None:
    pass


def a_file(src: Path) -> None:
    src.write_text("x")


def nothing(src: Path) -> None:
    src.mkdir()


def loose_images(src: Path) -> None:
    src.mkdir()
    (src / "a.jpg").write_bytes(b"x")
    (src / "jpg").write_bytes(b"no image: it has no extension")


def an_empty_image(src: Path) -> None:
    (src / "c").mkdir(parents=True)
    (src / "c/a.jpg").write_bytes(b"x")
    (src / "c/b.jpg").write_bytes(b"")


def bad_magic(src: Path) -> None:
    make_idx(src)
    (src / "train-labels-idx1-ubyte").write_bytes((src / "train-images-idx3-ubyte").read_bytes())


def truncated(src: Path) -> None:
    make_idx(src)
    path = src / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])


def truncated_gzip(src: Path) -> None:
    make_idx(src, ".gz")
    path = src / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])


def no_gzip(src: Path) -> None:
    make_idx(src, ".gz")
    (src / "t10k-labels-idx1-ubyte.gz").write_bytes(b"<html>404</html>")


def a_lying_header(src: Path) -> None:
    make_idx(src, ".gz")
    head = bytes([0, 0, 8, 3]) + np.array([2**32 - 1] * 3, ">u4").tobytes()
    (src / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(head))


def no_samples_in_idx(src: Path) -> None:
    make_idx(src, test=0)


def counts_differ(src: Path) -> None:
    make_idx(src)
    write_idx(src / "t10k-labels-idx1-ubyte", np.zeros(19, np.uint8))


def labels_missing(src: Path) -> None:
    make_idx(src)
    (src / "t10k-labels-idx1-ubyte").unlink()


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (no_such_folder, ConfigError, "does not exist; expected either class folders"),
        (a_file, ConfigError, "is a file; expected"),
        (nothing, ConfigError, "holds no images; expected"),
        (loose_images, ConfigError, "holds 1 images directly in it and none in class folders; expected"),
        (an_empty_image, DataError, r"c/b.jpg is empty"),
        (bad_magic, DataError, "starts with 00000803, and not with 00000801"),
        (truncated, DataError, r"truncated .*\(50, 6, 7\), 2,100 bytes"),
        (truncated_gzip, DataError, "truncated or damaged"),
        (no_gzip, DataError, "damaged .*gzip"),
        (a_lying_header, DataError, "truncated or damaged: its header"),
        (no_samples_in_idx, DataError, "empty by its header"),
        (counts_differ, DataError, "20 images, but .* 19 labels"),
        (labels_missing, ConfigError, "no t10k-labels-idx1-ubyte"),
    ],
)
def test_a_source_that_cannot_be_converted_leaves_nothing(tmp_path, make, error, text):
    make(tmp_path / "src")
    before = listing(tmp_path)
    with pytest.raises(error, match=text):
        convert(tmp_path / "src", tmp_path / "new" / "out", "wds")
    assert listing(tmp_path) == before


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=40), zipped=st.booleans(), magic=st.booleans())
@example(data=b"\0\0\0\2\0\0\0\1\0\0\0\3abcdef", zipped=True, magic=True)
def test_idx_files_are_read_whole_or_refused(tmp_path, data, zipped, magic):
    path = tmp_path / ("x.gz" if zipped else "x")
    data = b"\0\0\x08\3" + data if magic else data
    path.write_bytes(gzip.compress(data) if zipped else data)
    try:
        array = read_idx(path, ndim=3)
    except DataError:
        pass  # any other exception fails the test
    else:
        assert data == b"\0\0\x08\3" + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def test_links_are_followed_and_loops_end(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.png").write_bytes(b"x")
    (tmp_path / "src").mkdir()
    (tmp_path / "src/c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/loop").symlink_to(tmp_path / "elsewhere")
    (tree,) = read_images(tmp_path / "src")
    assert [sample["name"] for sample in tree] == ["c/a.png"]


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_leaves_nothing(tmp_path, format):
    samples = [{"data": bytes(30_000)} for _ in range(20)]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_shards(samples, tmp_path / "out", format, shard_bytes=200_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert listing(tmp_path) == []


def test_a_destination_that_cannot_be_made_is_refused(tree, tmp_path):
    (tmp_path / "file").write_text("x")
    for dst, text in {
        tmp_path / "file": "is a file",
        tmp_path / "file" / "out": "cannot be made",
        Path("/proc"): "is a mount point",
        tree / "out": "one inside the other",
        tree: "one inside the other",
        tree.parent: "one inside the other",
    }.items():
        with pytest.raises(ConfigError, match=text):
            convert(tree, dst, "wds", overwrite=True)
    assert listing(tmp_path) == ["file"]
    with pytest.raises(ConfigError, match="seed is -1"):
        convert(tree, tmp_path / "out", "wds", seed=-1)


@pytest.mark.parametrize("format", FORMATS)
def test_a_destination_is_replaced_on_request_and_only_by_a_complete_one(tree, tmp_path, format):
    dst = tmp_path / "out"
    dst.mkdir()
    convert(tree, dst, format, seed=1)  # an empty folder is as good as none
    first = shard_bytes_of(dst)
    with pytest.raises(ConfigError, match=r"not empty.*--overwrite"):
        convert(tree, dst, format)
    broken = tmp_path / "broken"
    an_empty_image(broken)
    with pytest.raises(DataError):
        convert(broken, dst, format, overwrite=True)
    assert shard_bytes_of(dst) == first
    convert(tree, dst, format, seed=2, overwrite=True)
    assert shard_bytes_of(dst).keys() == first.keys()
    assert shard_bytes_of(dst) != first
    (dst / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match=r"holds thesis\.tex"):
        convert(tree, dst, format, overwrite=True)
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out"]


@pytest.mark.parametrize(
    ("format", "module", "extra"), [("mds", "streaming", "mds"), ("wds", "webdataset.tariterators", "wds")]
)
def test_a_missing_library_is_named_with_its_extra(tree, tmp_path, monkeypatch, format, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"infobatch-stream\[{extra}\]"):
        convert(tree, tmp_path / "out", format)
    assert listing(tmp_path) == []


def test_a_torchvision_that_does_not_fit_is_explained(tree, tmp_path, monkeypatch):
    class Broken:
        def find_spec(self, name, path, target=None):
            if name == "streaming":
                raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.delitem(sys.modules, "streaming", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ConfigError, match=r"nms.*install the two together"):
        convert(tree, tmp_path / "out", "mds")
    assert listing(tmp_path) == []


def test_command_convert_says_what_it_wrote(tree, tmp_path):
    code, out, err = run("convert", tree, tmp_path / "out", "--format", "wds", "--shard-size", "40KB")
    assert (code, err) == (0, "")
    assert f"{tmp_path / 'out'}: {len(FILES)} samples of 3 classes (ants, bees, crâne d'âne) in 3 shards" in out
    assert f"note: {tree}: skipped 4 files" in out
    same = convert(tree, tmp_path / "same", "wds", shard_bytes=40 << 10)
    assert isinstance(same, Conversion)
    assert shard_bytes_of(tmp_path / "out") == shard_bytes_of(tmp_path / "same")
    assert all(is_fresh(path) for path in (tmp_path / "out").glob("*.tar"))


def test_command_convert_reports_errors_in_one_line(tmp_path):
    code, out, err = run("convert", tmp_path / "none", tmp_path / "out", "--format", "wds")
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {tmp_path / 'none'} does not exist")
    assert err.count("\n") == 1
    assert run("convert", tmp_path, tmp_path / "out", "--format", "zip")[0] == 2
    assert run("convert", tmp_path, tmp_path / "out", "--format", "wds", "--seed", "-1")[0] == 2
    code, _, err = run("convert", tmp_path, tmp_path / "out", "--format", "wds", "--shard-size", "big")
    assert code == 2
    assert "64MB" in err
    assert listing(tmp_path) == []


def test_sizes():
    assert [parse_size(text) for text in ("64MB", "1gb", "512 KB", "100000")] == [
        1 << 26,
        1 << 30,
        1 << 19,
        100_000,
    ]


def test_shard_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a-0.tar", "a-1.tar", "sub/b.tar", "{odd}.tar"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    assert expand_shards(["a-{0..2}.tar"]) == ["a-0.tar", "a-1.tar", "a-2.tar"]
    assert expand_shards(["a-*.tar", "a-1.tar"]) == ["a-0.tar", "a-1.tar", "a-1.tar"]
    assert expand_shards(["**/b.tar", "{odd}.tar"]) == ["sub/b.tar", "{odd}.tar"]
    assert expand_shards([str(tmp_path / "sub")]) == [str(tmp_path / "sub/b.tar")]
    with pytest.raises(ConfigError, match="braces"):
        expand_shards(["a-{0..1.tar"])
    with pytest.raises(DataError, match="no shard"):
        expand_shards([str(tmp_path / "no*.tar")])


def test_the_installed_command_converts(tmp_path):
    make_idx(tmp_path / "src")
    command = Path(sys.executable).with_name("infobatch-stream")
    done = subprocess.run(
        [command, "convert", tmp_path / "src", tmp_path / "out", "--format", "wds"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "50 samples of 5 classes (" in done.stdout
    assert len(read_back(tmp_path / "out/train", "wds")) == 50


def test_commands_load_heavy_libraries_only_when_needed():
    code = (
        "import sys, infobatch_stream.tools.app, infobatch_stream.convert.pipeline;"
        "print({'streaming', 'webdataset', 'matplotlib'} & sys.modules.keys())"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


def test_without_typer_the_command_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "infobatch_stream.tools.app")
    with pytest.raises(SystemExit, match=r"needs typer.*pip install 'infobatch-stream\[tools\]'"):
        main()
