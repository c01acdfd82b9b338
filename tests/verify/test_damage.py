"""verify finds each way of damaging a set, and says nothing of sound ones, whoever wrote them."""

import io
import json
import os
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from streaming import MDSWriter
from streaming.base.compression import compress
from webdataset.writer import ShardWriter, TarWriter

from infobatch_stream.convert import convert, write_shards
from infobatch_stream.formats.schema import Column
from infobatch_stream.sources.webdataset.index_cache import load_index
from infobatch_stream.verify.verify import Report, verify

IMAGES, PER_SHARD = 24, 4


def picture(k: int, format: str = "JPEG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(k).integers(0, 256, (6, 7, 3), dtype=np.uint8)).save(out, format)
    return out.getvalue()


def tar(path: Path, samples, index: bool = True) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    with TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)
    if index:
        load_index(path, checksum=True)
    return path


def pair(k: int, kind: str = "jpg") -> dict:
    return {"__key__": f"k{k:03d}", kind: picture(k, "PNG" if kind == "png" else "JPEG"), "cls": b"%d" % (k % 2)}


def index_all(folder: Path) -> Path:
    for path in folder.rglob("*.tar"):
        load_index(path, checksum=True)
    return folder


def found(report: Report) -> list[str]:
    return [str(problem) for problem in report.problems]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The same pictures as convert writes them: tars, MDS, compressed MDS, and by webdataset's ShardWriter."""
    folder = tmp_path_factory.mktemp("made")
    for k in range(IMAGES):
        kind = "png" if k % 5 == 4 else "jpg"
        (folder / "src" / "ab"[k % 2]).mkdir(parents=True, exist_ok=True)
        (folder / "src" / "ab"[k % 2] / f"{k}.{kind}").write_bytes(picture(k, "PNG" if kind == "png" else "JPEG"))
    for name, format, compression in (("wds", "wds", None), ("mds", "mds", None), ("packed", "mds", "zstd:7")):
        convert(folder / "src", folder / name, format, shard_samples=PER_SHARD, compression=compression)
    (folder / "foreign").mkdir()
    with ShardWriter(str(folder / "foreign/x-%04d.tar"), maxcount=PER_SHARD, verbose=0) as writer:
        for k in range(IMAGES):
            writer.write(pair(k))
    index_all(folder / "foreign")
    return folder


@pytest.fixture
def copy_of(made, tmp_path):
    return lambda name: Path(shutil.copytree(made / name, tmp_path / name))


def change(place: Path, edit) -> None:
    told = json.loads(place.read_text())
    edited = edit(told)
    place.write_text(json.dumps(told if edited is None else edited))


def remove(*names):
    return lambda f: [(f / name).unlink() for name in names]


def again(number: int, edit, keep_time: bool = False):
    """Write tar ``number`` again with other members: ``edit`` changes the list of (TarInfo, data)."""

    def damage(folder: Path) -> None:
        path = sorted(folder.glob("*.tar"))[number]
        with tarfile.open(path) as old:
            members = [(info, old.extractfile(info).read()) for info in old.getmembers()]
        edit(members)
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as new:
            for info, data in members:
                info.size, info.pax_headers = len(data), {}
                new.addfile(info, io.BytesIO(data))
        (folder / "shards.json").unlink(missing_ok=True)
        load_index(path, checksum=True)

    return damage


def without(extension: str, row: int):
    def edit(members) -> None:
        del members[[n for n, (info, _) in enumerate(members) if info.name.endswith(extension)][row]]

    return edit


def linked(kind: bytes):
    def edit(members) -> None:
        info = members[0][0]
        members[0] = (info, b"")
        info.type, info.linkname = kind, "nothing.jpg"

    return edit


def dotted(members) -> None:
    for n, (info, _) in enumerate(members):
        info.name = f"img.{n}.{info.name.rpartition('.')[2]}"
    members[:] = [one for one in members if one[0].name.endswith("jpg")]


def renamed(members) -> None:
    for info, _ in members:
        info.name = info.name.replace(".", "_")


def wids(folder: Path, **changes) -> None:
    tars = sorted(folder.glob("*.tar"))
    listed = [{"url": path.name, "nsamples": PER_SHARD, "filesize": path.stat().st_size} for path in tars]
    listed[0] |= changes
    told = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": listed}
    (folder / "index.json").write_text(json.dumps(told))


def swapped(folder: Path, *names: str) -> None:
    first, second = (folder / name for name in names)
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)


def exchanged(told) -> None:
    told["image"]["mds"], told["label"]["mds"] = told["label"]["mds"], told["image"]["mds"]


TARS = {
    "the first is gone, with its index": (
        "wds", remove("shard-000000.tar", "shard-000000.tar.index.npz"), "1 of the 6"
    ),
    "the last is gone, with its index": ("wds", remove("shard-000005.tar", "shard-000005.tar.index.npz"), "1 of the 6"),
    "one in the middle is gone": (
        "foreign", remove("x-0002.tar", "x-0002.tar.index.npz"), "1 missing between .*x-0002.tar"
    ),
    "the first is gone": ("foreign", remove("x-0000.tar"), "index was left behind: x-0000.tar"),
    "the last is gone": ("foreign", remove("x-0005.tar"), "index was left behind: x-0005.tar"),
    "the first two are gone, with their indexes": (
        "foreign", remove(*[f"x-000{k}.tar{end}" for k in (0, 1) for end in ("", ".index.npz")]), "begin at 2, not at 0"
    ),
    "the first is gone, with its index, of a stranger's": (
        "foreign", remove("x-0000.tar", "x-0000.tar.index.npz"), "begin at 1, not at 0: is x-0000.tar missing"
    ),
    "one of so many as the names say is gone": (
        "foreign", lambda f: [(f / f"x-000{k}.tar").rename(f / f"x-0000{k}-of-00007.tar") for k in range(6)],
        "1 of the 7 shards that the names speak of are missing: x-00006-of-00007.tar",
    ),
    "all after the first are gone, with their indexes": (
        "wds", lambda f: [path.unlink() for path in f.glob("*00[1-9].tar*")], "5 of the 6 shards that shards.json lists"
    ),
    "a tar without samples": ("foreign", lambda f: tar(f / "x-0006.tar", []), "it holds no sample"),
    "tars without samples": (
        "foreign", lambda f: [tar(path, []) for path in f.glob("*.tar")], "error: .*there is no sample in"
    ),
    "names without extensions": ("foreign", again(1, renamed), "8 of its members are in no sample"),
    "a hard link to nothing": ("foreign", again(1, linked(tarfile.LNKTYPE)), "1 of its members are links"),
    "a symbolic link to nothing": ("foreign", again(1, linked(tarfile.SYMTYPE)), "1 of its members are links"),
    "a sample without its label": (
        "foreign", again(5, without("cls", 1)), r"x-0005.tar, row 1, key 'k021': 1 of 24 samples has no 'cls'"
    ),
    "a sample without its picture": ("wds", again(0, without("cls", 0)), "1 of 24 samples has no 'cls'"),
    "labels of a whole tar": (
        "foreign", again(2, lambda members: members.__delitem__(slice(1, None, 2))), "x-0002.tar, row 0, .* 4 of 24"
    ),
    "a key with dots": (
        "foreign", again(3, dotted), "note: .*row 0, key 'img': it has members that few others have"
    ),
    "samples fewer than listed": ("wds", again(0, lambda members: members.clear()), "holds no sample"),
    "another tar in its place": (
        "wds", lambda f: shutil.copy(f / "shard-000000.tar", f / "shard-000001.tar"),
        "its index is stale|shards.json says"
    ),
    "a tar twice": ("foreign", lambda f: shutil.copy(f / "x-0000.tar", f / "x-0006.tar"), "the same key in"),
    "a columns.json that is damaged": (
        "wds", lambda f: (f / "columns.json").write_text("{"), "columns.json is damaged"
    ),
    "a columns.json of other members": (
        "wds", lambda f: change(f / "columns.json", lambda told: told["label"].update(wds="id")),
        "no column for .*'cls'"
    ),
    "a columns.json with a column too many": (
        "wds", lambda f: change(f / "columns.json", lambda told: told.update(more={"mds": "int", "wds": "idx"})),
        r"the columns 'more' \(idx\), which no sample has",
    ),
    "a columns.json with other encodings": (
        "wds", lambda f: change(f / "columns.json", lambda told: told["label"].update(mds="ndarray")),
        "its 'cls' is no ndarray, as columns.json says",
    ),
    "a columns.json in which two are exchanged": (
        "wds", lambda f: change(f / "columns.json", exchanged), "its 'cls' is no jpeg, as columns.json says"
    ),
    "a shards.json that is damaged": ("wds", lambda f: (f / "shards.json").write_text("[]"), "is no list of tars"),
    "a shards.json that counts otherwise": (
        "wds", lambda f: change(f / "shards.json", lambda told: told["shardlist"][2].update(nsamples=5)),
        "000002.tar: it has 4 samples, shards.json says 5",
    ),
    "a shard that wids lists is gone": (
        "foreign", lambda f: (wids(f), remove("x-0005.tar", "x-0005.tar.index.npz")(f)),
        "1 of the 6 .* index.json lists"
    ),
    "a shard of another size than wids says": ("foreign", lambda f: wids(f, filesize=9), "bytes, index.json says 9"),
    "an index.json that is neither": (
        "foreign", lambda f: (f / "index.json").write_text("{}"), "index.json is no list"
    ),
    "a tar that is in no list": ("wds", lambda f: tar(f / "shard-000006.tar", [pair(99)]), "is not in shards.json"),
    "a half-written tar": ("foreign", lambda f: (f / ".x-0006.tar.part").touch(), "broken off"),
    "a classes.json with too few": ("wds", lambda f: (f / "classes.json").write_text('["a"]'), "names 1 classes"),
}  # fmt: skip


def shards_of(edit):
    return lambda f: change(f / "index.json", lambda told: edit(told["shards"]))


def dropped(number: int):
    def damage(folder: Path) -> None:
        (folder / f"shard.0000{number}.mds").unlink()
        shards_of(lambda shards: shards.__delitem__(number))(folder)

    return damage


def other_encoding(shards) -> None:
    shards[3]["column_encodings"][0] = "png"


def other_zip(folder: Path) -> None:
    """The compressed bytes of another shard, whose hash and size index.json gives."""
    data = compress("zstd:7", b"x" * 500)
    (folder / "shard.00001.mds.zstd").write_bytes(data)
    shards_of(lambda shards: shards[1]["zip_data"].update(bytes=len(data), hashes={}))(folder)


def emptied(folder: Path) -> None:
    with MDSWriter(columns={"image": "jpeg", "label": "int"}, out=str(folder / "new")) as writer:
        writer.write({"image": Image.new("RGB", (2, 2)), "label": 1})
    path = folder / "new/shard.00000.mds"
    data = bytearray(path.read_bytes())
    begin = int.from_bytes(data[4:8], "little")
    data[begin : begin + 4], data[begin + 4 : -8] = bytes(4), b""
    data[8:12] = len(data).to_bytes(4, "little")
    path.write_bytes(data)
    told = {"bytes": len(data), "hashes": {}}
    change(folder / "new/index.json", lambda index: index["shards"][0]["raw_data"].update(told))
    for file in (folder / "new").iterdir():
        file.replace(folder / file.name)


MDS = {
    "a shard is gone": ("mds", remove("shard.00003.mds"), "shard.00003.mds is missing"),
    "the last is gone": ("mds", remove("shard.00005.mds"), "shard.00005.mds is missing"),
    "the first is gone from the index too": ("mds", dropped(0), "begin at 1, not at 0: is shard.00000.mds missing"),
    "one is gone from the index too": ("mds", dropped(2), "1 missing between .*shard.00002.mds"),
    "one that the index does not name": (
        "mds", shards_of(lambda shards: shards.pop()), "warning: .*shard.00005.mds is named by no index.json"
    ),
    "an index without shards": ("mds", shards_of(lambda shards: shards.clear()), "names no shards"),
    "another count": ("mds", shards_of(lambda shards: shards[1].update(samples=3)), "holds 4 samples, .* says 3"),
    "shards exchanged": (
        "mds", lambda f: swapped(f, "shard.00000.mds", "shard.00001.mds"), "has the xxh64|has .* bytes"
    ),
    "other columns in one shard": ("mds", shards_of(other_encoding), "have different columns"),
    "a column twice": (
        "mds", shards_of(lambda shards: shards[0]["column_names"].__setitem__(0, "label")), "two columns of one name"
    ),
    "a compression that is not named": (
        "packed", shards_of(lambda shards: shards[0].update(compression=None)), "no compression is named"
    ),
    "another compression": (
        "packed", shards_of(lambda shards: shards[0].update(compression="gz")), "cannot be decompressed|cannot be read"
    ),
    "other compressed data": ("packed", other_zip, "expected|decompresse"),
    "a compressed shard is gone": ("packed", remove("shard.00002.mds.zstd"), "is missing"),
    "a flipped bit in the compressed": (
        "packed", lambda f: flip(f / "shard.00002.mds.zstd", 100), "has the xxh64|cannot be decompressed"
    ),
    "a flipped bit": ("mds", lambda f: flip(f / "shard.00002.mds", 500), "has the xxh64"),
    "a cut shard": ("mds", lambda f: os.truncate(f / "shard.00002.mds", 400), "cut off"),
    "an empty picture": ("mds", emptied, "column 'image' is empty, and no image"),
    "a columns.json that is damaged": (
        "mds", lambda f: (f / "columns.json").write_text("[]"), "columns.json is damaged"
    ),
    "a columns.json of other shards": (
        "mds", lambda f: change(f / "columns.json", lambda told: told["label"].update(mds="str")), "columns.json says"
    ),
    "a classes.json with too few": ("mds", lambda f: (f / "classes.json").write_text('["a"]'), "names 1 classes"),
    "a foreign file": ("mds", lambda f: (f / "notes.md").touch(), "note: .*notes.md is named by no index.json"),
}  # fmt: skip


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("case", [f"tars: {name}" for name in TARS] + [f"MDS: {name}" for name in MDS])
def test_each_way_of_damaging_a_set_is_found(copy_of, case):
    kind, _, name = case.partition(": ")
    source, damage, text = (TARS if kind == "tars" else MDS)[name]
    folder = copy_of(source)
    damage(folder)
    problems = found(verify([folder], decode="classes" in name))
    assert any(re.search(text, problem) for problem in problems), problems
    assert not all(problem.startswith("note") for problem in problems) or name in NOTES, problems


NOTES = (
    "a key with dots",
    "names without extensions",
    "a foreign file",
    "the first is gone, with its index, of a stranger's",
)


def gnu(folder: Path, samples) -> None:
    """As ``tar cf x.tar .`` writes it: folders, and names that begin with ``./``."""
    folder.mkdir()
    with tarfile.open(folder / "all.tar", "w", format=tarfile.GNU_FORMAT) as writer:
        for name in (".", "./sub"):
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE
            writer.addfile(info)
        for sample in samples:
            for kind in ("jpg", "cls"):
                info = tarfile.TarInfo(f"./sub/{sample['__key__']}.{kind}")
                info.size = len(sample[kind])
                writer.addfile(info, io.BytesIO(sample[kind]))


def texts(folder: Path) -> None:
    columns = {"text": Column("str", "txt"), "label": Column("int", "cls"), "score": Column("float64", "score.txt")}
    write_shards(
        ({"text": f"né {k}", "label": k % 2, "score": k / 7} for k in range(9)), folder, "wds", columns=columns
    )


def ragged(folder: Path) -> None:
    samples = ({**pair(k), **({"json": b"{}"} if k % 4 else {})} for k in range(16))
    tar(folder / "one/x.tar", samples)
    convert(folder / "one", folder / "two", "mds")
    convert(folder / "two", folder / "three", "wds", shard_samples=5)
    shutil.rmtree(folder / "one")  # of which verify says that some samples lack what most have


def masks(folder: Path) -> None:
    for n in range(3):
        samples = (
            {**pair(k), **({"seg.png": picture(k, "PNG")} if k % 4 == 0 else {})} for k in range(4 * n, 4 * n + 4)
        )
        tar(folder / f"x-{n}.tar", samples)


def cameras(folder: Path) -> None:
    for n, count in enumerate((4, 4, 1)):
        sides = {f"cam{side}.jpg": picture(side) for side in range(6)}
        tar(folder / f"x-{n}.tar", ({"__key__": f"{n}-{k}", **sides, "cls": b"1"} for k in range(count)))


def two_sets(folder: Path) -> None:
    for n in range(3):
        tar(folder / f"train-{n:05d}-of-00003.tar", (pair(k) for k in range(4 * n, 4 * n + 4)))
    tar(folder / "test-00000-of-00001.tar", ({"__key__": f"t{k}", "jpg": picture(k)} for k in range(4)))


def mixed(folder: Path) -> None:
    tar(folder / "train.tar", (pair(k, "png" if k % 4 == 0 else "jpg") for k in range(12)))
    tar(folder / "cifar10.tar", (pair(k) for k in range(20, 23)))


def by_mds_writer(folder: Path) -> None:
    columns = {"image": "jpeg", "label": "int", "text": "str"}
    for name, compression in (("plain", None), ("gz", "gz")):
        with MDSWriter(columns=columns, out=str(folder / name), compression=compression, size_limit=2000) as writer:
            for k in range(12):
                writer.write({"image": Image.fromarray(np.full((4, 4, 3), k, np.uint8)), "label": k, "text": "x"})


def listed_by_wids(folder: Path) -> None:
    for n in range(2):
        tar(folder / f"x-{n}.tar", (pair(k) for k in range(PER_SHARD * n, PER_SHARD * n + PER_SHARD)))
    wids(folder)


SOUND = [
    texts, ragged, masks, cameras, two_sets, mixed, by_mds_writer, listed_by_wids, lambda f: gnu(f, map(pair, range(5)))
]  # fmt: skip


@pytest.mark.parametrize("make", SOUND, ids=lambda make: make.__name__)
def test_nothing_is_said_of_sound_sets(tmp_path, make):
    make(tmp_path / "set")
    index_all(tmp_path)
    folders = {path.parent for kind in ("*.tar", "index.json") for path in tmp_path.rglob(kind)}
    assert folders
    for folder in folders:
        report = verify([folder], decode=True)
        assert report.samples
        assert not [problem for problem in found(report) if not (problem.startswith("note") and make is ragged)]


def test_nothing_is_said_of_what_convert_and_webdataset_write(made):
    for name in ("wds", "mds", "packed", "foreign"):
        report = verify([made / name], decode=True, duplicates=True, columns=[] if name == "foreign" else ["image"])
        assert (report.samples, report.problems) == (IMAGES, ())


def test_some_of_the_shards_may_be_asked_for_by_name(made):
    for item in ("foreign/x-{0002..0003}.tar", "wds/shard-000001.tar", "wds/shard-00000[2-4].tar"):
        assert verify([made / item]).problems == ()


def test_columns_of_tars_are_those_of_columns_json_or_extensions(made):
    """The pictures are jpg and png, which columns.json says are one column."""
    assert verify([made / "wds"], columns=["image", "label", "name", "cls", "jpg;png"]).problems == ()
    assert verify([made / "wds"], columns=["jpg"]).errors > 0
    assert verify([made / "wds"], columns=["label", "caption"]).errors == IMAGES // PER_SHARD


@pytest.mark.parametrize("format", ["mds", "wds"])
@pytest.mark.parametrize("labels", [(3, 5), ("cat", "dog")])
def test_one_picture_under_two_labels_is_reported_first(tmp_path, format, labels):
    names = ("x", "y", "z", "u", "v")
    chosen = (picture(0), picture(1), picture(0), picture(1), picture(2))
    kinds = (labels[0], labels[0], labels[1], labels[0], labels[1])
    samples = [
        {"image": np.frombuffer(data, np.uint8), "label": label, "name": name}
        for data, label, name in zip(chosen, kinds, names, strict=True)
    ]
    columns = {"image": "jpeg", "label": "int" if labels == (3, 5) else "str", "name": "str"}
    if format == "mds":
        with MDSWriter(columns=columns, out=str(tmp_path / "set"), hashes=["sha1"]) as writer:
            for sample in samples:
                writer.write({**sample, "image": Image.open(io.BytesIO(sample["image"].tobytes()))})
    else:
        tar(
            tmp_path / "set/a.tar",
            ({"__key__": s["name"], "jpg": s["image"].tobytes(), "cls": str(s["label"]).encode()} for s in samples),
        )
    first, second, note = found(verify([tmp_path / "set"], duplicates=True))
    assert re.search(r"row 0: the same content under different labels: here .*, and .* row 2", first)
    assert ("(label 3)" in first) == ("(label 5)" in first) == (labels == (3, 5))
    assert re.search(r"row 1: the same content in .* row 3$", second)
    assert "2 samples have the content of an earlier one" in note
