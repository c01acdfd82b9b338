"""What can be converted: sources of every kind, written by the libraries that users write them with."""

import datetime
import gc
import gzip
import io
import json
import multiprocessing
import os
import pickle
import shutil
import tarfile
import warnings
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from support.commands import members_of, raw_mds

from infobatch_stream.convert import convert
from infobatch_stream.convert.readers import MdsSet, TableSet, TarSet, read_images, read_source
from infobatch_stream.errors import ConfigError, DataError
from infobatch_stream.formats.extensions import image_extension, without_clashes
from infobatch_stream.formats.mds_encodings import fit, from_mds, parse_npy, save_npy
from infobatch_stream.formats.schema import KEY, MEMBERS, Column, Encoded, EncodedImage

FEW = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


def image(kind: str = "JPEG", color: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (5, 4), (color, 7, 9)).save(stream, kind)
    return stream.getvalue()


def write_tar(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for key, members in samples:
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def write_mds(folder: Path, columns: dict[str, str], samples: list[dict], **options) -> Path:
    from streaming import MDSWriter

    with MDSWriter(columns=columns, out=str(folder), **options) as writer:
        for sample in samples:
            writer.write(sample)
    return folder


def one(src, **options):
    (found,) = read_source(src, **options)
    return found


def all_of(source) -> list[dict]:
    """All samples, which are the same from a copy that went to another process."""
    samples = [source[number] for number in range(len(source))]
    copy = pickle.loads(pickle.dumps(source))
    for number in reversed(range(len(source))):
        assert plain(copy[number]) == plain(samples[number])
    assert all(list(sample) == list(source.columns) or sample.keys() == source.columns.keys() for sample in samples)
    return samples


def plain(sample) -> dict:
    """``sample`` with values that can be compared."""
    return {
        name: (value.dtype.str, value.shape, value.tobytes())
        if isinstance(value, np.ndarray)
        else repr(value)
        if isinstance(value, float)
        else value
        for name, value in sample.items()
    }


def payload(sample) -> int:
    """Bytes of a sample's fields."""
    return sum(
        len(value.data)
        if isinstance(value, Encoded)
        else value.nbytes
        if isinstance(value, np.ndarray)
        else len(str(value).encode())
        for value in sample.values()
    )


# ---- images


def test_a_tree_tells_sizes_and_is_found_again_by_names_and_sizes(tmp_path):
    for name in ("b/2.jpg", "a/x/1.PNG", "a/é.jpeg"):
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name).write_bytes(b"x" * len(name))
    tree = one(tmp_path / "src")
    samples = all_of(tree)
    assert [sample["name"] for sample in samples] == ["a/x/1.PNG", "a/é.jpeg", "b/2.jpg"]
    assert [sample["label"] for sample in samples] == [0, 0, 1]
    assert [sample["image"].extension for sample in samples] == ["png", "jpeg", "jpg"]
    assert all(0 <= size - payload(sample) <= 8 for size, sample in zip(tree.sizes(), samples, strict=True))
    assert one(tmp_path / "src").fingerprint == tree.fingerprint
    (tmp_path / "src/b/2.jpg").write_bytes(b"other")
    assert one(tmp_path / "src").fingerprint != tree.fingerprint
    assert not tree.is_shards
    (tmp_path / "src/b/2.jpg").symlink_to("nowhere") if (tmp_path / "src/b/2.jpg").unlink() is None else None
    with pytest.raises(FileNotFoundError):
        one(tmp_path / "src")[2]


def test_names_that_are_no_utf8_are_read(tmp_path):
    (tmp_path / "c").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path / "c") + b"/\xff.jpg")).write_bytes(b"x")
    (sample,) = all_of(read_images(tmp_path)[0])
    assert (sample["name"], sample["image"].data) == ("c/\ufffd.jpg", b"x")


def test_columns_of_any_source_are_chosen_renamed_and_stored_as_told(tmp_path):
    (tmp_path / "src/c").mkdir(parents=True)
    (tmp_path / "src/c/a.jpg").write_bytes(b"x")
    tree = one(
        tmp_path / "src",
        columns={"picture": "image", "target": "label"},
        encodings={"target": "uint8", "picture": "bytes"},
        extensions={"target": "id"},
    )
    assert tree.columns == {"picture": Column("bytes", "jpg"), "target": Column("uint8", "id")}
    assert all_of(tree) == [{"picture": EncodedImage(b"x", "jpg"), "target": 0}]
    assert one(tmp_path / "src", encodings={"label": "str"})[0]["label"] == "0"
    for options, text in [
        ({"columns": {"a": "no"}}, "no column 'no'; it has 'image', 'label', 'name'"),
        ({"columns": {KEY: "name"}}, "cannot be called '__key__'"),
        ({"encodings": {"no": "int"}}, "no column 'no'"),
        ({"encodings": {"label": "int7"}}, "'int7' is no MDS encoding; choose among bytes, str"),
        ({"encodings": {"label": "ndarray:object"}}, "no MDS encoding"),
        ({"extensions": {"label": "../x"}}, "no extension"),
        ({"extensions": {"label": "txt"}}, "'label' and 'name' .* both have the extension 'txt'"),
    ]:
        with pytest.raises(ConfigError, match=text):
            read_source(tmp_path / "src", **options)
    with pytest.raises(DataError, match=r"a\.jpg: the column 'image' is stored as 'int', .*--encoding image=bytes"):
        one(tmp_path / "src", encodings={"image": "int"})[0]


# ---- tars


def test_webdatasets_own_tars_are_read_as_they_are(tmp_path):
    from webdataset import TarWriter

    array = np.arange(6, dtype=np.int16).reshape(2, 3)
    for shard in range(2):
        with TarWriter(str(tmp_path / f"x-{shard}.tar")) as tar:
            for number in range(3):
                tar.write({
                    "__key__": f"a/{shard}{number}", "jpg": image(), "cls": number, "txt": "é", "json": {"n": number},
                    "npy": array, "seg.png": image("PNG"), "pth": b"\x80raw", "webp": image("WEBP"),
                })  # fmt: skip
    for src in (tmp_path, str(tmp_path / "x-{0..1}.tar"), f"{tmp_path}/x-*.tar"):
        source = one(src)
        assert source.columns == {
            KEY: Column("str", "txt"), "cls": Column("int", "cls"), "jpg": Column("jpeg", "jpg"),
            "json": Column("json", "json"), "npy": Column("ndarray", "npy"), "pth": Column("bytes", "pth"),
            "seg.png": Column("png", "seg.png"), "txt": Column("str", "txt"), "webp": Column("png", "webp"),
        }  # fmt: skip
        samples = all_of(source)
        assert [sample[KEY] for sample in samples] == ["a/00", "a/01", "a/02", "a/10", "a/11", "a/12"]
        assert plain(samples[4]) == plain({
            KEY: "a/11", "cls": 1, "jpg": EncodedImage(image(), "jpg"), "json": Encoded(b'{"n": 1}'), "npy": array,
            "pth": Encoded(b"\x80raw"), "seg.png": EncodedImage(image("PNG"), "seg.png"),
            "txt": Encoded("é".encode()), "webp": EncodedImage(image("WEBP"), "webp"),
        })  # fmt: skip
        assert source.is_shards
        assert all(0 <= size - payload(s) <= 160 for size, s in zip(source.sizes(), samples, strict=True))
    assert one(tmp_path / "x-0.tar").fingerprint != one(tmp_path / "x-1.tar").fingerprint or True
    assert len(one(tmp_path / "x-0.tar")) == 3


def test_members_are_chosen_by_extension_with_alternatives(tmp_path):
    write_tar(
        tmp_path / "x.tar",
        [("0", {"jpg": b"j", "cls": b"1", "json": b"{}"}), ("1", {"png": b"p", "cls": b"2"}), ("2", {"cls": b"3"})],
    )
    source = one(tmp_path, columns={"label": "cls"})
    assert source.columns == {KEY: Column("str", "txt"), "label": Column("int", "cls")}
    assert [sample["label"] for sample in all_of(source)] == [1, 2, 3]
    source = one(tmp_path, columns={"image": "jpg;jpeg;png", "label": "cls"}, extensions={"label": "id"})
    assert source.columns["image"] == Column("bytes", "jpg;png")  # the last sample has none, and no library decodes it
    samples = all_of(source)
    assert [sample["image"] for sample in samples] == [
        EncodedImage(b"j", "jpg"),
        EncodedImage(b"p", "png"),
        Encoded(b""),
    ]
    assert [sample[MEMBERS] for sample in samples] == ['["jpg", "id"]', '["png", "id"]', '["id"]']
    with pytest.raises(ConfigError, match="no column 'tif'; it has 'jpg', 'cls', 'json', 'png'"):
        read_source(tmp_path, columns={"image": "tif"})
    with pytest.raises(ConfigError, match="'a' and 'b' both take the members 'jpg'"):
        read_source(tmp_path, columns={"a": "jpg", "b": "jpg;png"})
    with pytest.raises(DataError, match="sample '2': none of the members"):
        read_source(tmp_path, columns={"image": "jpg;png"})
    with pytest.raises(DataError, match=r"sample '1'.*'json' is stored as 'ndarray'.*no member json"):
        one(tmp_path, encodings={"json": "ndarray"}, columns={"json": "json", "label": "cls"})[1]


@pytest.mark.parametrize(
    ("extension", "good", "bad", "encoding"),
    [
        ("cls", b"7", b"07", "int"),
        ("cls", b"7", b"9223372036854775808", "int"),
        ("id", b"-9223372036854775808", b"1.0", "int"),
        ("index", b"0", b"-0", "int"),
        ("txt", b"text", b"\xff", "str"),
        ("json", b"{}", b"{", "json"),
        ("npy", save_npy(np.ones(3, np.float16)), save_npy(np.ones((2, 2)))[:-1], "ndarray"),
        ("npy", save_npy(np.ones(3, np.float16)), save_npy(np.asfortranarray(np.eye(3))), "ndarray"),
        ("npy", save_npy(np.ones(3, np.float16)), save_npy(np.array(["text"])), "ndarray"),
    ],
)
def test_a_member_that_is_none_of_its_kind_is_met_at_the_start_or_where_it_is_read(
    tmp_path, extension, good, bad, encoding
):
    samples = [(f"{number}", {extension: good}) for number in range(5000)]
    assert one(write_tar(tmp_path / "good.tar", samples)).columns[extension].mds == encoding
    rare = [*samples[:4002], ("bad", {extension: bad}), *samples[4002:4500]]  # where nobody looks
    source = one(write_tar(tmp_path / "rare.tar", rare))
    assert source.columns[extension].mds == encoding
    with pytest.raises(DataError, match=rf"rare\.tar: sample 'bad', member {extension}.*--encoding {extension}=bytes"):
        source[4002]
    source = one(tmp_path / "rare.tar", encodings={extension: "bytes"})
    assert source[4002][extension] == Encoded(bad)
    if encoding != "str":
        often = [("bad", {extension: bad}), *samples]
        assert one(write_tar(tmp_path / "often.tar", often)).columns[extension].mds == "bytes"


def test_numbers_are_read_as_people_write_them_where_that_is_asked_for(tmp_path):
    write_tar(tmp_path / "x.tar", [("0", {"cls": b" 07\n", "txt": b"1e3\n"}), ("1", {"cls": b"+8", "txt": b"nan"})])
    source = one(tmp_path)
    assert (source.columns["cls"].mds, source[0]["cls"]) == ("bytes", Encoded(b" 07\n"))
    samples = all_of(one(tmp_path, encodings={"cls": "int16", "txt": "float32"}))
    assert [sample["cls"] for sample in samples] == [7, 8]
    assert samples[0]["txt"] == 1000.0
    assert np.isnan(samples[1]["txt"])


def test_tars_whose_names_are_no_columns_are_refused(tmp_path):
    write_tar(tmp_path / "a.tar", [("x", {"jpg": b"x", "a b": b"x"})])
    with pytest.raises(ConfigError, match=r"extension 'a b', which cannot be a column.*--column"):
        read_source(tmp_path / "a.tar")
    assert one(tmp_path / "a.tar", columns={"image": "jpg"})[0]["image"].data == b"x"
    write_tar(tmp_path / "b.tar", [("x", {MEMBERS: b"x"})])
    with pytest.raises(ConfigError, match="cannot be called '__members__'"):
        read_source(tmp_path / "b.tar")
    write_tar(tmp_path / "c.tar", [(f"v1.{number}", {"jpg": b"x"}) for number in range(300)])
    with pytest.raises(ConfigError, match=r"300 different extensions \(0\.jpg, .*--column image=jpg"):
        read_source(tmp_path / "c.tar")
    write_tar(tmp_path / "d.tar", [("\udcff", {"jpg": b"x"})])
    with pytest.raises(DataError, match="is no UTF-8"):
        one(tmp_path / "d.tar")[0]


NAMES = st.text(st.characters(categories=["Ll", "Lo", "Nd"]), min_size=1, max_size=4).filter(
    lambda text: text.lower() == text
)
EXTENSIONS = st.one_of(
    st.sampled_from(["jpg", "jpeg", "png", "cls", "txt", "json", "npy", "id", "seg.png", "bin", "a.txt", "b.c.d"]),
    NAMES,
)
CONTENTS = {
    "cls": st.integers(-(2**63), 2**63 - 1).map(lambda n: str(n).encode()),
    "txt": st.text(max_size=5).map(str.encode),
    "json": st.dictionaries(st.text(max_size=2), st.integers(), max_size=2).map(lambda d: json.dumps(d).encode()),
    "npy": st.sampled_from([np.ones((2, 3), np.uint8), np.array([np.nan, np.inf], ">f4"), np.zeros(0)]).map(save_npy),
}
KEY_PARTS = st.text(st.characters(categories=["L", "N", "Zs"], include_characters="-_'\\\"{}*"), min_size=1, max_size=4)
KEYS = st.lists(KEY_PARTS | st.just("k" * 120), min_size=1, max_size=3).map("/".join)


@st.composite
def tar_samples(draw) -> list[tuple[str, dict[str, bytes]]]:
    """Samples with or without the same members, in the same order or not, of which some are empty or odd."""
    extensions = draw(st.lists(EXTENSIONS, min_size=1, max_size=5, unique=True))
    odd, loose = draw(st.booleans()), draw(st.booleans())
    samples = []
    for key in draw(st.lists(KEYS, min_size=1, max_size=6, unique=True)):
        names = draw(st.lists(st.sampled_from(extensions), min_size=1, unique=True)) if loose else extensions
        contents = {
            name: draw(
                st.binary(max_size=6)
                if odd and not name.endswith("txt")
                else CONTENTS.get(name.rpartition(".")[2], st.binary(max_size=6))
            )
            for name in names
        }
        samples.append((key, contents))
    return samples


@FEW
@given(samples=tar_samples(), cuts=st.integers(1, 3), chosen=st.booleans())
def test_tars_come_back_from_mds_byte_for_byte(tmp_path_factory, samples, cuts, chosen):
    folder = tmp_path_factory.mktemp("trip")
    for number in range(0, len(samples), cuts):
        write_tar(folder / "src" / f"{number:03}.tar", samples[number : number + cuts])
    columns = None
    if chosen:  # all of them, but images and texts of several kinds in one column
        there = list(dict.fromkeys(name for _, members in samples for name in members))
        groups = [("image", {"jpg", "jpeg", "png"}), ("text", {"txt", "a.txt"})]
        kept = samples
        columns = {
            group: ";".join(name for name in there if name in names) for group, names in groups if names & set(there)
        }
        if any(len(names & set(members)) > 1 for _, names in groups for _, members in kept):
            columns = None
        else:
            taken = {"jpg", "jpeg", "png", "txt", "a.txt"}
            columns |= {f"x-{name}": name for name in there if name not in taken}
    convert(folder / "src", folder / "mds", "mds", columns=columns)
    encodings, _ = raw_mds(folder / "mds")
    assert KEY in encodings
    assert (MEMBERS in encodings) == (len({tuple(members) for _, members in samples}) > 1)
    convert(folder / "mds", folder / "tars", "wds")
    assert members_of(folder / "tars") == members_of(folder / "src")
    convert(folder / "tars", folder / "again", "mds")
    assert raw_mds(folder / "again") == raw_mds(folder / "mds")
    convert(folder / "src", folder / "copy", "wds", columns=columns)
    assert members_of(folder / "copy") == members_of(folder / "src")
    shutil.rmtree(folder)


# ---- MDS

FLOATS = {
    name: st.floats(width=bits, allow_nan=False).map(np.dtype(name).type) | st.just(np.dtype(name).type("nan"))
    for name, bits in (("float16", 16), ("float32", 32), ("float64", 64))
}
INTS = {
    name: st.integers(int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    for name, dtype in {
        "int": "int64",
        **{n: n for n in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")},
    }.items()
}
ARRAYS = st.sampled_from([np.arange(4, dtype=np.int16).reshape(2, 2), np.array([np.nan, np.inf], np.float16)])
VALUES = {
    **FLOATS,
    **INTS,
    "bytes": st.binary(max_size=6),
    "str": st.text(max_size=6),
    "json": st.lists(st.integers() | st.text(max_size=3), max_size=3),
    "str_int": st.integers(),
    "str_float": st.floats(allow_nan=False),
    "str_decimal": st.decimals(allow_nan=False),
    "pkl": st.tuples(st.integers()),
    "jpeg": st.just(Image.new("RGB", (3, 2))),
    "png": st.just(Image.new("RGB", (3, 2))),
    "pil": st.just(Image.new("L", (3, 2))),
    "ndarray": ARRAYS,
    "ndarray:int16": st.just(np.arange(300, dtype=np.int16)[:, None]),
    "ndarray:uint8:2,3": st.binary(min_size=6, max_size=6).map(lambda b: np.frombuffer(b, np.uint8).reshape(2, 3)),
}
COLUMN_NAMES = st.text(min_size=1, max_size=4).filter(lambda name: name not in (KEY, MEMBERS))


@FEW
@given(data=st.data())
def test_mds_comes_back_from_tars_byte_for_byte(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("trip")
    columns = data.draw(st.dictionaries(COLUMN_NAMES, st.sampled_from(sorted(VALUES)), min_size=1, max_size=5))
    count = data.draw(st.integers(1, 5))
    samples = [{name: data.draw(VALUES[encoding]) for name, encoding in columns.items()} for _ in range(count)]
    compression = data.draw(st.sampled_from([None, "zstd:3", "gz"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_mds(folder / "src", columns, samples, compression=compression, size_limit=200)
    source = one(folder / "src")
    for sample in all_of(source):
        assert all(not isinstance(value, tuple) for value in sample.values())  # nothing was unpickled
    convert(folder / "src", folder / "tars", "wds")
    convert(folder / "tars", folder / "mds", "mds")
    convert(folder / "src", folder / "copy", "mds")
    if compression is None:
        assert raw_mds(folder / "mds") == raw_mds(folder / "src")
    assert raw_mds(folder / "mds") == raw_mds(folder / "copy")
    shutil.rmtree(folder)


def test_mds_values_extensions_and_sizes(tmp_path):
    columns = {
        "b": "bytes",
        "c": "bytes",
        "f": "float32",
        "n": "int32",
        "pic": "jpeg",
        "t": "str",
        "p": "pkl",
        "a": "ndarray",
    }
    samples = [
        {"b": b"1", "c": b"", "f": 0.1, "n": n, "pic": Image.new("L", (2, 2)), "t": "é", "p": {1}, "a": np.ones(3)}
        for n in range(4)
    ]
    write_mds(tmp_path / "src", columns, samples, size_limit=2000)
    source = one(tmp_path / "src")
    assert {name: column.wds for name, column in source.columns.items()} == {
        "a": "npy", "b": "b.bin", "c": "c.bin", "f": "f.txt", "n": "cls", "p": "pkl", "pic": "jpg", "t": "t.txt",
    }  # fmt: skip
    assert source.is_shards
    found = all_of(source)
    assert [sample["n"] for sample in found] == [0, 1, 2, 3]
    assert found[0]["f"] == float(np.float32(0.1))
    assert found[0]["p"] == Encoded(pickle.dumps({1}))
    assert all(abs(size - payload(sample)) <= 160 for size, sample in zip(source.sizes(), found, strict=True))
    source = one(tmp_path / "src", columns={"label": "n", "text": "t"}, encodings={"label": "int8"})
    assert source.columns == {"label": Column("int8", "cls"), "text": Column("str", "t.txt")}
    assert all_of(source)[3] == {"label": 3, "text": Encoded("é".encode())}
    (tmp_path / "src/classes.json").write_text('["a", "b"]')
    assert one(tmp_path / "src").classes == ["a", "b"]


def damage_index(change):
    def damage(folder: Path) -> None:
        index = json.loads((folder / "index.json").read_text())
        change(index["shards"][0])
        (folder / "index.json").write_text(json.dumps(index))

    return damage


def cut_shard(folder: Path) -> None:
    path = folder / "shard.00000.mds"
    path.write_bytes(path.read_bytes()[:-1])


def wild_offsets(folder: Path) -> None:
    path = folder / "shard.00000.mds"
    data = bytearray(path.read_bytes())
    data[4:12] = b"\xff" * 8
    path.write_bytes(data)


def wild_sizes(folder: Path) -> None:
    path = folder / "shard.00000.mds"
    data = bytearray(path.read_bytes())
    begin = int.from_bytes(data[4:8], "little")
    data[begin : begin + 4] = b"\xff" * 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda folder: (folder / "index.json").write_text("[1]"), "no index of MDS shards"),
        (lambda folder: (folder / "index.json").write_text('{"shards": [], "version": 2}'), "names no shards"),
        (damage_index(lambda shard: shard.update(samples=10**9)), "1000000000 samples in"),
        (damage_index(lambda shard: shard["raw_data"].update(basename="../x.mds")), "not in its folder"),
        (damage_index(lambda shard: shard["raw_data"].update(basename="gone.mds")), "gone.mds is missing"),
        (damage_index(lambda shard: shard.update(column_sizes=[None, None])), "column 'n' has the encoding"),
        (damage_index(lambda shard: shard.update(version=3)), "version 3"),
        (damage_index(lambda shard: shard.pop("samples")), "it has the keys"),
        (cut_shard, "has .* bytes, its index.json says"),
        (wild_offsets, "has the bytes 4,294,967,295 to"),
        (wild_sizes, "values of 4,"),
        (lambda folder: (folder / "columns.json").write_text("{"), "columns.json is damaged"),
        (
            lambda folder: (folder / "columns.json").write_text('{"n": {"mds": "int", "wds": "../x"}}'),
            "extension '../x'",
        ),
        (lambda folder: (folder / "columns.json").write_text('{"n": {"mds": "int", "wds": "cls"}}'), "other columns"),
        (lambda folder: (folder / "columns.json").write_text('{"n": 1}'), "of the column 'n' it says 1"),
        (lambda folder: (folder / "classes.json").write_text("{}"), "no JSON list"),
    ],
)
def test_damaged_mds_is_refused(tmp_path, damage, text):
    write_mds(tmp_path / "src", {"n": "int", "t": "str"}, [{"n": 1, "t": "x"}] * 3)
    damage(tmp_path / "src")
    with pytest.raises(DataError, match=text):
        one(tmp_path / "src")[0]


@pytest.mark.parametrize(
    ("key", "members", "text"),
    [
        ("a", "[1]", "no JSON list"),
        ("a", "", "no JSON list"),
        ("a", '["t", "t"]', "member 't'"),
        ("a", '["x"]', "no column for it"),
        ("a", '["txt"]', "no column for it"),  # what the key's extension is called, which is none
    ],
)
def test_members_that_no_tar_could_have_are_refused(tmp_path, key, members, text):
    write_mds(tmp_path / "src", {KEY: "str", MEMBERS: "str", "t": "str"}, [{KEY: key, MEMBERS: members, "t": "x"}])
    (tmp_path / "src/columns.json").write_text(
        json.dumps({name: {"mds": "str", "wds": "t" if name == "t" else "txt"} for name in (KEY, MEMBERS, "t")})
    )
    with pytest.raises(DataError, match=text):
        one(tmp_path / "src")[0]


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=40), encoding=st.sampled_from(["ndarray", "ndarray:int16", "ndarray:int8:2,3", "int8"]))
def test_values_are_read_from_mds_or_refused(data, encoding):
    from streaming.base.format.mds.encodings import mds_encode

    try:
        value = from_mds(data, encoding)
    except ValueError:
        return
    assert isinstance(value, int) or value.dtype.itemsize * value.size <= len(data)
    assert encoding == "ndarray" or encoding == "ndarray:int16" or mds_encode(encoding, value) == data


@settings(max_examples=300, deadline=None)
@given(
    data=st.binary(max_size=40), header=st.text("(),0123456789' :{}<f8shapedescrfortran_orderTrueFalse", max_size=80)
)
def test_arrays_are_read_from_npy_or_refused(data, header):
    text = header.encode()
    for npy in (data, b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data):
        with pytest.raises(ValueError, match="array"):
            raise ValueError(f"an array of {parse_npy(npy).nbytes}")


def test_an_npy_allocates_nothing_that_it_does_not_hold():
    good = save_npy(np.zeros((3, 4), np.float32))
    lying = good.replace(b"(3, 4), }" + b" " * 12, b"(3000000000, 4), }   ")
    assert lying != good
    for data in (
        lying,
        good[:-1],
        good + b"x",
        save_npy(np.array(["a"])),
        save_npy(np.zeros(0)),
        save_npy(np.array(1)),
    ):
        with pytest.raises(ValueError, match="array"):
            parse_npy(data)
    np.testing.assert_array_equal(parse_npy(save_npy(np.array([[1, 2], [3, 4]], ">i4", order="F"))), [[1, 2], [3, 4]])
    assert fit(Encoded(good), "ndarray:float32:3,4").shape == (3, 4)
    for encoding in ("ndarray:float64", "ndarray:float32:4,3"):
        with pytest.raises(ValueError, match="and not of"):
            fit(Encoded(good), encoding)


def test_images_through_both_formats_and_columns_json_of_other_shards(tmp_path):
    for name, data in {"a/0.jpg": image(), "a/1.png": image("PNG"), "b/2.jpeg": image(color=3)}.items():
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name).write_bytes(data)
    convert(tmp_path / "src", tmp_path / "tars", "wds", shuffle=False)
    source = one(tmp_path / "tars")  # columns.json knows jpg only
    assert source.columns["image"] == Column("jpeg", "jpg;png;jpeg")
    assert KEY not in source.columns  # the keys are numbers that the writer made up
    assert source.classes == ["a", "b"]
    assert [sample["label"] for sample in all_of(source)] == [0, 0, 1]
    convert(tmp_path / "tars", tmp_path / "mds", "mds")
    convert(tmp_path / "mds", tmp_path / "back", "wds")
    assert members_of(tmp_path / "back") == members_of(tmp_path / "tars")
    assert (tmp_path / "back/classes.json").read_text() == (tmp_path / "tars/classes.json").read_text()
    write_tar(tmp_path / "tars/z.tar", [("0", {"mp3": b"x"})])
    with pytest.raises(DataError, match="no column for the extension 'mp3'"):
        read_source(tmp_path / "tars")


# ---- tables


def features_and_rows() -> tuple:
    import datasets

    features = datasets.Features({
        "image": datasets.Image(), "label": datasets.ClassLabel(names=["ham", "spam"]),
        "text": datasets.Value("string"),
        "matrix": datasets.Array2D((2, 3), "float32"), "tokens": datasets.List(datasets.Value("int32")),
        "score": datasets.Value("float32"), "flag": datasets.Value("bool"), "meta": {"a": datasets.Value("int64")},
        "tags": datasets.List(datasets.Value("string")), "raw": datasets.Value("binary"),
    })  # fmt: skip
    rows = {
        "image": [{"bytes": image(color=n) if n % 2 else image("PNG", n), "path": None} for n in range(7)],
        "label": [n % 2 for n in range(7)],
        "text": [f"é{n}" for n in range(7)],
        "matrix": [np.full((2, 3), n, np.float32).tolist() for n in range(7)],
        "tokens": [list(range(n + 1)) for n in range(7)],
        "score": [n / 3 for n in range(7)],
        "flag": [n > 3 for n in range(7)],
        "meta": [{"a": n} for n in range(7)],
        "tags": [["x"] * n for n in range(7)],
        "raw": [bytes([n]) for n in range(7)],
    }
    return features, rows


def check_rows(source, rows) -> None:
    assert source.columns == {
        "image": Column("jpeg", "png"), "label": Column("int", "label.cls"), "text": Column("str", "text.txt"),
        "matrix": Column("ndarray:float32:2,3", "matrix.npy"), "tokens": Column("ndarray:int32", "tokens.npy"),
        "score": Column("float32", "score.txt"), "flag": Column("int", "flag.cls"), "meta": Column("json", "meta.json"),
        "tags": Column("json", "tags.json"), "raw": Column("bytes", "bin"),
    }  # fmt: skip
    assert source.classes == ["ham", "spam"]
    samples = all_of(source)
    for number, sample in enumerate(samples):
        assert plain(sample) == plain({
            "image": EncodedImage(rows["image"][number]["bytes"], "jpg" if number % 2 else "png"),
            "label": number % 2, "text": f"é{number}", "matrix": np.full((2, 3), number, np.float32),
            "tokens": np.arange(number + 1, dtype=np.int32), "score": float(np.float32(number / 3)),
            "flag": int(number > 3), "meta": Encoded(b'{"a": %d}' % number),
            "tags": Encoded(json.dumps(["x"] * number).encode()), "raw": Encoded(bytes([number])),
        })  # fmt: skip
    assert all(0 <= size - payload(s) <= 400 for size, s in zip(source.sizes(), samples, strict=True))


def test_hugging_face_datasets_are_read_without_the_library(tmp_path):
    import datasets

    features, rows = features_and_rows()
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.save_to_disk(str(tmp_path / "one"), num_shards=2)
    datasets.DatasetDict({"train": dataset, "test": dataset.select([4, 1])}).save_to_disk(str(tmp_path / "dict"))
    dataset.to_parquet(str(tmp_path / "x.parquet"))
    (tmp_path / "folder").mkdir()
    for number, indices in enumerate([range(4), range(4, 7)]):
        dataset.select(indices).to_parquet(str(tmp_path / f"folder/train-{number:05}-of-00002.parquet"))
    for src in ("one", "x.parquet", "folder"):
        check_rows(one(tmp_path / src), rows)
    train, test = read_source(tmp_path / "dict")
    assert (train.name, test.name) == ("train", "test")
    check_rows(train, rows)
    assert [sample["text"] for sample in all_of(test)] == ["é4", "é1"]
    dataset.select([2]).to_parquet(str(tmp_path / "folder/test-00000-of-00001.parquet"))
    assert [(found.name, len(found)) for found in read_source(tmp_path / "folder")] == [("test", 1), ("train", 7)]


@pytest.mark.parametrize("format", ["mds", "wds"])
def test_tables_are_converted_and_come_back_by_the_names_of_their_columns(tmp_path, format):
    import datasets

    features, rows = features_and_rows()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "x.parquet"))
    convert(tmp_path / "x.parquet", tmp_path / "a", format, shuffle=False, workers=2)
    convert(tmp_path / "a", tmp_path / "b", "wds" if format == "mds" else "mds")
    table = one(tmp_path / "x.parquet")
    for folder in ("a", "b"):
        source = one(tmp_path / folder)
        assert set(source.columns) - {MEMBERS} == set(table.columns)
        assert {n: c.mds for n, c in source.columns.items() if n != MEMBERS} == {
            n: c.mds for n, c in table.columns.items()
        }
        for number, sample in enumerate(all_of(source)):
            for name, value in plain(table[number]).items():
                found = plain(sample)[name]
                if isinstance(value, Encoded):
                    assert found.data == value.data
                else:
                    assert (found.data.decode() if isinstance(found, Encoded) else found) == value
    assert one(tmp_path / "b").classes == ["ham", "spam"]


def test_csv_files_are_read_as_people_write_them(tmp_path):
    (tmp_path / "a.csv").write_text(
        'id,text,score,when,empty\n1,"two\nlines, ""quoted""",0.5,2020-01-02,\n2,NA,1,2020-01-03,\n'
    )
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(b"id,text,score,when,empty\n3,,nan,2020-01-04,x\n"))
    source = one(tmp_path)
    assert source.columns == {
        "id": Column("int", "cls"), "text": Column("str", "text.txt"), "score": Column("float64", "score.txt"),
        "when": Column("str", "when.txt"), "empty": Column("str", "empty.txt"),
    }  # fmt: skip
    samples = all_of(source)
    assert [sample["id"] for sample in samples] == [1, 2, 3]
    assert [sample["text"] for sample in samples] == ['two\nlines, "quoted"', "NA", ""]
    assert samples[1]["score"] == 1.0
    assert [sample["when"] for sample in samples] == ["2020-01-02", "2020-01-03", "2020-01-04"]
    assert [sample["empty"] for sample in samples] == ["", "", "x"]
    source = one(str(tmp_path / "*.csv"), columns={"name": "id"}, encodings={"name": "str"}, extensions={"name": "key"})
    assert (source.columns, source[1]) == ({"name": Column("str", "key")}, {"name": "2"})


@pytest.mark.parametrize(
    ("column", "expected", "value"),
    [
        (
            pa.array([[1, 2], [3, 4]], pa.list_(pa.uint8(), 2)),
            Column("ndarray:uint8:2", "npy"),
            np.array([3, 4], np.uint8),
        ),
        (
            pa.array([[1.5], [3, 4]], pa.large_list(pa.float64())),
            Column("ndarray:float64", "npy"),
            np.array([3.0, 4.0]),
        ),
        (pa.array([[[1], [2]], [[3], [4]]]), Column("ndarray:int64:2,1", "npy"), np.array([[3], [4]])),
        (pa.array([[[1], [2, 3]], [[3], [4]]]), Column("json", "json"), Encoded(b"[[3], [4]]")),
        (pa.array(["a", "b"]).dictionary_encode(), Column("str", "txt"), "b"),
        (pa.array(["a", "b"], pa.string_view()), Column("str", "txt"), "b"),
        (pa.array([b"a", b"b"], pa.large_binary()), Column("bytes", "bin"), Encoded(b"b")),
        (pa.array([b"ab", b"cd"], pa.binary(2)), Column("bytes", "bin"), Encoded(b"cd")),
        (pa.array([image(), image("PNG")]), Column("jpeg", "jpg"), EncodedImage(image("PNG"), "png")),
        (pa.array([image("WEBP"), image("GIF")]), Column("png", "webp"), EncodedImage(image("GIF"), "gif")),
        (
            pa.array([{"bytes": b"x", "path": "a.flac"}, {"bytes": b"y", "path": "b.flac"}]),
            Column("bytes", "flac"),
            EncodedImage(b"y", "flac"),
        ),
        (pa.array([True, False]), Column("int", "cls"), 0),
        (pa.array([1, 2**64 - 1], pa.uint64()), Column("uint64", "cls"), 2**64 - 1),
        (pa.array(np.array([0.1, 0.5], np.float16)), Column("float16", "txt"), 0.5),
        (pa.array([Decimal("1.10"), Decimal("2.50")]), Column("json", "json"), Encoded(b'"2.50"')),
        (pa.array([datetime.date(2020, 1, 2)] * 2), Column("json", "json"), Encoded(b'"2020-01-02"')),
        (pa.array([0, 1], pa.timestamp("ns")), Column("json", "json"), Encoded(b'"1970-01-01 00:00:00.000000001"')),
        (
            pa.array([{"when": datetime.date(2020, 1, 2)}] * 2),
            Column("json", "json"),
            Encoded(b'{"when": "2020-01-02"}'),
        ),
        (pa.array([["a"], ["b", None]]), Column("json", "json"), Encoded(b'["b", null]')),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_every_type_of_a_table_has_a_form(tmp_path, column, expected, value):
    pa.parquet.write_table(pa.table({"x": column}), tmp_path / "a.parquet")
    source = one(tmp_path / "a.parquet")
    assert source.columns == {"x": expected}
    assert plain(all_of(source)[1]) == plain({"x": value})
    assert source.sizes().dtype == np.int64
    assert all(0 <= size - payload(source[n]) <= 140 for n, size in enumerate(source.sizes()))


def test_what_has_no_form_in_a_sample_is_refused(tmp_path):
    for column in (pa.array([[b"x"]]), pa.nulls(1), pa.array([{"a": b"x"}])):
        pa.parquet.write_table(pa.table({"x": column, "y": [1]}), tmp_path / "a.parquet")
        with pytest.raises(ConfigError, match=r"the column 'x' .*--column"):
            read_source(tmp_path / "a.parquet")
        assert one(tmp_path / "a.parquet", columns={"n": "y"})[0] == {"n": 1}


def test_two_columns_of_images_never_share_an_extension(tmp_path):
    rows = {"front": [image(), image("PNG")], "back": [image("PNG"), image()]}
    pa.parquet.write_table(pa.table(rows), tmp_path / "a.parquet")
    source = one(tmp_path / "a.parquet")
    assert {name: column.wds for name, column in source.columns.items()} == {"front": "front.jpg", "back": "back.png"}
    assert all_of(source)[1] == {
        "front": EncodedImage(image("PNG"), "front.png"),
        "back": EncodedImage(image(), "back.jpg"),
    }
    source = one(tmp_path / "a.parquet", extensions={"front": "a", "back": "b.jpg"})
    assert [value.extension for value in source[1].values()] == ["a", "b.jpg"]
    convert(tmp_path / "a.parquet", tmp_path / "tars", "wds", shuffle=False)
    found = one(tmp_path / "tars")
    assert {name: column.wds for name, column in found.columns.items() if name != MEMBERS} == {
        "front": "front.jpg;front.png", "back": "back.png;back.jpg",
    }  # fmt: skip
    assert {name: all_of(found)[1][name] for name in rows} == one(tmp_path / "a.parquet")[1]


def test_images_are_read_from_files_below_the_table_and_from_no_others(tmp_path):
    (tmp_path / "src/images").mkdir(parents=True)
    (tmp_path / "src/images/a.jpg").write_bytes(image())
    (tmp_path / "secret.jpg").write_bytes(image(color=200))
    (tmp_path / "src/link.jpg").symlink_to(tmp_path / "secret.jpg")
    paths = [
        "images/a.jpg",
        str(tmp_path / "src/images/a.jpg"),
        "../secret.jpg",
        str(tmp_path / "secret.jpg"),
        "link.jpg",
    ]
    paths += ["images/none.jpg", "images"]
    table = pa.table({"image": pa.array([{"bytes": None, "path": path} for path in paths])})
    pa.parquet.write_table(table, tmp_path / "src/a.parquet")
    source = one(tmp_path / "src/a.parquet", skip=True)
    assert source[0]["image"] == source[1]["image"] == EncodedImage(image(), "jpg")
    assert source.sizes()[:2].tolist() == [len(image())] * 2
    for number in (2, 3, 4):
        with pytest.raises(DataError, match=rf"row {number} .*is not below"):
            source[number]
    with pytest.raises((DataError, OSError), match="none"):
        source[5]
    with pytest.raises(DataError, match="no regular file"):
        source[6]


def child(source, results) -> None:
    results.put(source[1])
    del source
    gc.collect()


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_the_spool_goes_with_the_set_in_the_process_that_made_it(tmp_path, monkeypatch, start):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    pa.parquet.write_table(pa.table({"x": [1, 2, 3]}), tmp_path / "a.parquet")
    source = one(tmp_path / "a.parquet")
    context = multiprocessing.get_context(start)
    results = context.Queue()
    process = context.Process(target=child, args=(source, results))
    process.start()
    assert results.get(timeout=60) == {"x": 2}
    process.join(60)
    copy = pickle.loads(pickle.dumps(source))
    del copy
    gc.collect()
    assert source[2] == {"x": 3}
    assert len(list((tmp_path / "temporary").iterdir())) == 1
    del source
    gc.collect()
    assert list((tmp_path / "temporary").iterdir()) == []
    (tmp_path / "a.parquet").write_bytes(b"PAR1 damaged PAR1")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read"):
        read_source(tmp_path / "a.parquet")
    gc.collect()
    assert list((tmp_path / "temporary").iterdir()) == []


def test_tables_that_do_not_belong_together_or_are_damaged_are_refused(tmp_path):
    pa.parquet.write_table(pa.table({"x": [1], "y": ["a"]}), tmp_path / "a.parquet")
    pa.parquet.write_table(pa.table({"x": [2.5], "y": ["b"]}), tmp_path / "b.parquet")
    assert [sample["x"] for sample in all_of(one(tmp_path))] == [1.0, 2.5]
    pa.parquet.write_table(pa.table({"x": ["2"], "y": ["b"]}), tmp_path / "b.parquet")
    with pytest.raises(ConfigError, match="'x' is not of one type"):
        read_source(tmp_path)
    pa.parquet.write_table(pa.table({"x": [2]}), tmp_path / "b.parquet")
    with pytest.raises(ConfigError, match=r"b\.parquet has the columns x, and .*a\.parquet has x, y"):
        read_source(tmp_path)
    with pytest.raises(ConfigError, match="no column 'z'; it has 'x', 'y'"):
        read_source(tmp_path / "a.parquet", columns={"a": "z"})
    pa.parquet.write_table(pa.table({"x": pa.array([], pa.int64())}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="has no rows"):
        read_source(tmp_path / "b.parquet")
    for data in (b"", b"PAR1", (tmp_path / "a.parquet").read_bytes()[:-9]):
        (tmp_path / "b.parquet").write_bytes(data)
        with pytest.raises(DataError, match=r"b\.parquet cannot be read"):
            read_source(tmp_path / "b.parquet")
    for data, text in [(b"", "Empty"), (b"a,b\n1\n", "Expected 2 columns")]:
        (tmp_path / "c.csv").write_bytes(data)
        with pytest.raises(DataError, match=text):
            one(tmp_path / "c.csv")[0]
    (tmp_path / "c.csv.gz").write_bytes(gzip.compress(b"a\n" + b"1\n" * 10**5)[:-40])
    with pytest.raises(DataError, match=r"c\.csv\.gz cannot be read"):
        read_source(tmp_path / "c.csv.gz")


def test_damaged_hugging_face_datasets_are_refused(tmp_path):
    import datasets

    dataset = datasets.Dataset.from_dict({"text": ["abc", "defg"]})

    def saved() -> Path:
        shutil.rmtree(tmp_path / "d", ignore_errors=True)
        datasets.DatasetDict({"train": dataset}).save_to_disk(str(tmp_path / "d"))
        return tmp_path / "d"

    arrow = "train/data-00000-of-00001.arrow"
    for name, content, text in [
        ("dataset_dict.json", b'{"splits": ["../x"]}', "names the splits"),
        ("dataset_dict.json", b"[]", "no description"),
        ("train/state.json", b'{"_data_files": [{"filename": "../../x.arrow"}]}', "names the files"),
        ("train/state.json", b"{", "no description"),
        ("train/state.json", b'{"_data_files": [{"filename": "gone.arrow"}]}', "gone.arrow is missing"),
        (arrow, b"", "no Arrow stream"),
        (arrow, b"\xff" * 100, "no Arrow stream"),
    ]:
        (saved() / name).write_bytes(content)
        with pytest.raises(DataError, match=text):
            read_source(tmp_path / "d")
    path = saved() / arrow
    offsets = np.array([0, 3, 7], np.int32).tobytes()
    data = path.read_bytes()
    assert data.count(offsets) == 1
    path.write_bytes(data.replace(offsets, np.array([0, 2**30, 7], np.int32).tobytes()))
    with pytest.raises(DataError, match="damaged"):
        read_source(tmp_path / "d")


# ---- which kind it is


def test_the_kind_of_a_source_is_found_or_said_to_be_unclear(tmp_path):
    def fresh(*names: str) -> Path:
        shutil.rmtree(tmp_path / "src", ignore_errors=True)
        for name in names:
            (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "src" / name).write_bytes(b"x")
        return tmp_path / "src"

    for names, text in [
        (("index.json", "a.tar"), r"MDS shards \(index.json\) and WebDataset tars \(a.tar\)"),
        (("a.csv", "c/a.jpg"), r"tables \(a.csv\) and class folders with images"),
        (("a.csv", "b.parquet", "state.json"), "tables .* and a saved Hugging Face dataset"),
        (("train/index.json", "test/index.json"), r"shards in its folders test, train; .*convert .*test DST/test"),
        (("a.mp4",), "holds no images; expected either class folders"),
    ]:
        with pytest.raises(ConfigError, match=text):
            read_source(fresh(*names))
    with pytest.raises(ConfigError, match=r"matches .*a\.mp4, which are no tars"):
        read_source(str(fresh("a.mp4") / "*"))
    with pytest.raises(ConfigError, match="does not exist; expected"):
        read_source(str(tmp_path / "no*.parquet"))
    write_tar(tmp_path / "x.tar", [("a", {"txt": b"x"})])
    assert isinstance(one(tmp_path / "x.tar"), TarSet)
    write_mds(tmp_path / "mds", {"x": "int"}, [{"x": 1}])
    assert isinstance(one(tmp_path / "mds"), MdsSet)
    pa.csv.write_csv(pa.table({"x": [1]}), tmp_path / "x.csv")
    assert isinstance(one(tmp_path / "x.csv"), TableSet)


@given(start=st.binary(max_size=16))
def test_the_kind_of_an_image_is_told_by_its_first_bytes(start):
    assert image_extension(start) is None or start[:2] in (
        b"\xff\xd8",
        b"\x89P",
        b"GI",
        b"RI",
        b"II",
        b"MM",
        b"BM",
        b"P6",
    )
    for kind, extension in [("JPEG", "jpg"), ("PNG", "png"), ("GIF", "gif"), ("WEBP", "webp"), ("TIFF", "tif")]:
        assert image_extension(image(kind)) == extension
    assert image_extension(image("BMP")) == "bmp"
    assert image_extension(image("PPM")) == "ppm"


@given(st.dictionaries(st.text(max_size=4), st.sampled_from(["txt", "cls", "a.txt"]), max_size=6))
def test_extensions_are_unique_and_such_as_tars_can_have(wanted):
    from infobatch_stream.formats.extensions import is_extension

    found = without_clashes(wanted)
    assert found.keys() == wanted.keys()
    assert len(set(found.values())) == len(found)
    assert all(is_extension(extension) and extension == extension.lower() for extension in found.values())
