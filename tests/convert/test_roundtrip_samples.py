"""MDS shards become tars and MDS shards again: all that there was comes back, or nothing is written."""

import io
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from support.commands import members_of, raw_mds, run

from infobatch_stream.convert import convert, write_shards
from infobatch_stream.errors import ConfigError, DataError
from infobatch_stream.formats.schema import KEY, MEMBERS
from infobatch_stream.report.dataset import open_shards
from infobatch_stream.report.previews import previews

PICTURE = Image.fromarray(np.arange(18, dtype=np.uint8).reshape(2, 3, 3))
ARRAY = np.arange(6, dtype=np.uint8).reshape(2, 3)


def floats(name: str, bits: int) -> st.SearchStrategy:
    return st.floats(width=bits, allow_nan=False).map(np.dtype(name).type)


def whole(name: str) -> st.SearchStrategy:
    return st.integers(int(np.iinfo(name).min), int(np.iinfo(name).max))


VALUES = {
    **{f"float{bits}": floats(f"float{bits}", bits) for bits in (16, 32, 64)},
    **{f"{sign}int{bits}": whole(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)},
    "int": whole("int64"),
    "bytes": st.binary(max_size=6) | st.sampled_from([b"1", b"0.5", b"{}", b"\x93NUMPY"]),
    "str": st.text(max_size=6) | st.sampled_from(["7", "0.5", "[]"]),
    "json": st.lists(st.integers() | st.text(max_size=3), max_size=3) | st.just({"a": None}),
    "str_int": st.integers(),
    "str_float": st.floats(allow_nan=False),
    "str_decimal": st.decimals(allow_nan=False),
    "pkl": st.tuples(st.integers()),
    "jpeg": st.just(PICTURE),
    "png": st.just(PICTURE),
    "pil": st.just(PICTURE.convert("L")),
    "jpeg_array": st.just(np.asarray(PICTURE)),
    "jpegarray": st.just(np.asarray(PICTURE)),
    "list[pil]": st.just([PICTURE, PICTURE]),
    "list[jpeg]": st.just([PICTURE]),
    "list[png]": st.just([PICTURE, PICTURE]),
    "ndarray": st.sampled_from([ARRAY.astype(np.int16), np.array([np.nan, np.inf], np.float16)]),
    "ndarray:int16": st.just(np.arange(300, dtype=np.int16)[:, None]),
    "ndarray:uint8:2,3": st.just(ARRAY),
}
NAMES = st.text(min_size=1, max_size=4) | st.sampled_from(
    ["a.b", "seg.png", "txt", "cls", "A", "__index_level_0__", "__url__", "x/y", "..", "é", "a b"]
)
KEYS = st.text(st.characters(categories=["L", "N"], include_characters="-_/ "), min_size=1, max_size=5) | (
    st.text(max_size=5) | st.sampled_from(["img.12", "/a", "../a", "__a__/b", "a/", "a\0b", "a\nb/c"])
)


@st.composite
def datasets(draw) -> tuple[dict[str, str], list[dict]]:
    """Columns, some of them of any name, and samples; with keys or not."""
    names = NAMES.filter(lambda name: name not in (KEY, MEMBERS))
    columns = draw(st.dictionaries(names, st.sampled_from(sorted(VALUES)), min_size=1, max_size=5))
    if draw(st.booleans()):
        columns[KEY] = draw(st.sampled_from(["str", "str", "str", "int", "bytes"]))
    values = VALUES | ({"str": VALUES["str"]} if KEY not in columns else {})
    count = draw(st.integers(1, 4))
    keys = draw(st.lists(KEYS, min_size=count, max_size=count))
    samples = [{name: draw(values[encoding]) for name, encoding in columns.items()} for _ in range(count)]
    if columns.get(KEY) == "str":
        samples = [{**sample, KEY: key} for sample, key in zip(samples, keys, strict=True)]
    return columns, samples


def write_mds(folder: Path, columns: dict[str, str], samples: list[dict]) -> None:
    from streaming import MDSWriter

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with MDSWriter(columns=columns, out=str(folder), size_limit=200) as writer:
            for sample in samples:
                writer.write(sample)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(dataset=datasets())
@example(dataset=({KEY: "str", "score": "float64"}, [{KEY: "a", "score": 0.5}]))
@example(dataset=({KEY: "str", "b": "bytes"}, [{KEY: "a", "b": b"1"}]))
@example(dataset=({"__a": "int", "b": "int"}, [{"__a": 1, "b": 2}]))
def test_mds_comes_back_from_tars_or_is_refused_before_anything_is_written(tmp_path_factory, dataset):
    folder = tmp_path_factory.mktemp("trip")
    write_mds(folder / "src", *dataset)
    convert(folder / "src", folder / "copy", "mds")
    assert raw_mds(folder / "copy") == raw_mds(folder / "src")
    refused = ""
    try:
        convert(folder / "src", folder / "tars", "wds")
    except (ConfigError, DataError) as error:
        refused = str(error)
    if refused:
        assert KEY in dataset[0]  # the rest has a form in any case
        assert "--no-keys" in refused
        assert sorted(path.name for path in folder.iterdir()) == ["copy", "src"]
        convert(folder / "src", folder / "tars", "wds", keys=False)
        convert(folder / "src", folder / "without", "mds", keys=False)
        convert(folder / "tars", folder / "back", "mds")
        assert raw_mds(folder / "back") == raw_mds(folder / "without")
        return
    convert(folder / "tars", folder / "back", "mds")
    assert raw_mds(folder / "back") == raw_mds(folder / "src")
    convert(folder / "tars", folder / "tars2", "wds")
    assert members_of(folder / "tars2") == members_of(folder / "tars")


@pytest.mark.parametrize("key", ["img.12", "", "/a", "../a", "x/../a", "__meta__/a", "a\0b"])
def test_a_key_that_cannot_name_a_member_is_kept_in_mds_and_refused_for_tars_with_a_remedy_that_works(tmp_path, key):
    write_mds(tmp_path / "src", {KEY: "str", "n": "int"}, [{KEY: key, "n": 1}])
    convert(tmp_path / "src", tmp_path / "mds", "mds")
    assert raw_mds(tmp_path / "mds") == raw_mds(tmp_path / "src")
    code, _, err = run("convert", tmp_path / "src", tmp_path / "tars", "--format", "wds")
    assert code == 1
    assert "sample 0: the key" in err
    assert "--no-keys" in err
    assert run("convert", tmp_path / "src", tmp_path / "tars", "--format", "wds", "--no-keys")[0] == 0
    assert members_of(tmp_path / "tars") == [("000000000.cls", b"1")]
    with pytest.raises(DataError, match="--no-keys"):
        write_shards([{KEY: key, "n": 1}], tmp_path / "own", "wds")


def test_names_in_a_tar_that_lead_elsewhere_are_refused_only_where_a_tar_is_written(tmp_path):
    for name in ("/abs/0", "../0"):
        folder = tmp_path / f"{len(name)}"
        folder.mkdir()
        with tarfile.open(folder / "x.tar", "w") as tar:
            info = tarfile.TarInfo(f"{name}.cls")
            info.size = 1
            tar.addfile(info, io.BytesIO(b"7"))
        convert(folder, folder / "../mds", "mds", overwrite=True)
        for source in (folder, tmp_path / "mds"):
            with pytest.raises(DataError, match=r"leads out of the folder.*--no-keys"):
                convert(source, tmp_path / "tars", "wds")
        convert(tmp_path / "mds", tmp_path / "tars", "wds", keys=False, overwrite=True)
        assert members_of(tmp_path / "tars") == [("000000000.cls", b"7")]


def test_bad_keys_are_passed_over_where_that_is_asked_for(tmp_path):
    samples = [{KEY: key, "n": 1} for key in ("a", "img.12", "b")]
    write_shards(samples, tmp_path / "src", "mds")
    done = convert(tmp_path / "src", tmp_path / "tars", "wds", on_error="skip")
    assert [name for name, _ in members_of(tmp_path / "tars")] == ["a.cls", "b.cls"]
    assert len(done.problems) == 1
    assert "img.12" in done.problems[0]


@pytest.mark.parametrize(("encoding", "key", "shown"), [("str", "img.12", "img.12"), ("int", 7, "7")])
def test_keys_that_no_tar_could_have_are_shown_and_exported(tmp_path, encoding, key, shown):
    write_mds(tmp_path / "src", {KEY: encoding, "n": "int"}, [{KEY: key, "n": 1}])
    shards = open_shards(str(tmp_path / "src"))
    assert shards.keys(np.array([0])) == [shown]
    assert previews(shards, np.array([0]))[0].key == shown


def test_columns_of_which_one_is_called_like_a_reserved_field_can_be_left_out_or_renamed(tmp_path):
    write_mds(tmp_path / "src", {MEMBERS: "int", "n": "int"}, [{MEMBERS: 5, "n": 1}])
    with pytest.raises(ConfigError, match=r"--column NAME=__members__"):
        convert(tmp_path / "src", tmp_path / "out", "wds")
    for columns in ({"n": "n"}, {"n": "n", "other": MEMBERS}):
        convert(tmp_path / "src", tmp_path / "out", "mds", columns=columns, overwrite=True)
        assert list(raw_mds(tmp_path / "out")[0]) == list(columns)
