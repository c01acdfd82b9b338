"""verify: a healthy set has no problems, and each kind of damage is found, with its place."""

import hashlib
import io
import json
import os
import random
import re
import shutil
import sys
import tarfile
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from fuzz.run import memory_below
from fuzz.seeds import HOSTILE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from streaming import MDSWriter
from streaming.base.compression import compress, decompress
from streaming.base.format import reader_from_json
from support.commands import run
from webdataset.tariterators import group_by_keys, tar_file_expander
from webdataset.writer import TarWriter

from infobatch_stream.convert import convert
from infobatch_stream.errors import DataError, MissingExtraError
from infobatch_stream.formats.mds_encodings import fixed_size
from infobatch_stream.formats.shard_set import STATE
from infobatch_stream.sources.webdataset.index_cache import load_index
from infobatch_stream.verify.checksums import BLOCK, Stream, decompressed
from infobatch_stream.verify.diagnostics import Diagnostics, Problem, Severity
from infobatch_stream.verify.duplicates import digest, find_duplicates
from infobatch_stream.verify.validators import mds_check, tar_check
from infobatch_stream.verify.verify import Report, verify

COLUMNS = {
    "image": "jpeg", "label": "int", "text": "str", "meta": "json", "area": "ndarray:uint8:2,3", "free": "ndarray",
    "scans": "list[png]", "small": "uint16", "digits": "str_int", "secret": "pkl", "raw": "bytes",
}  # fmt: skip
SAMPLES, PER_TAR = 24, 8
COMPRESSIONS = ("gz", "bz2:5", "zstd:7", "br:3", "snappy")
CASES = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))


def jpeg(k: int, format: str = "JPEG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(k).integers(0, 256, (6, 7, 3), dtype=np.uint8)).save(out, format)
    return out.getvalue()


def mds_sample(k: int) -> dict:
    return {
        "image": jpeg(k), "label": k % 3, "text": f"né {k}", "meta": {"k": [k]}, "small": k, "digits": -k, "raw": b"",
        "area": np.full((2, 3), k, np.uint8), "free": np.arange(k + 1, dtype=np.float32), "secret": {k},
        "scans": [Image.fromarray(np.full((2, 2), k, np.uint8))],
    }  # fmt: skip


def write_mds(folder: Path, compression: str | None = None, hashes=("sha1", "xxh64"), samples=None) -> Path:
    columns = COLUMNS if samples is None else {"image": "jpeg", "label": "int"}
    options = {"compression": compression, "hashes": list(hashes), "size_limit": 1 << 13, "max_workers": 1}
    with MDSWriter(columns=columns, out=str(folder), **options) as writer:
        for sample in map(mds_sample, range(SAMPLES)) if samples is None else samples:
            writer.write(sample)
    (folder / "classes.json").write_text('["a", "b", "c"]')
    return folder


def write_tar(path: Path, samples, checksum=True, index=True) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    with TarWriter(str(path), mtime=0) as writer:
        for sample in samples:
            writer.write(sample)
    if index:
        load_index(path, checksum=checksum)
    return path


def tar_sample(k: int) -> dict:
    npy = io.BytesIO()
    np.save(npy, np.arange(k))
    data = {"jpg": jpeg(k), "cls": b"%d" % (k % 3), "json": b'{"k": %d}' % k, "a.npy": npy.getvalue(), "txt": b"x"}
    return {"__key__": f"s{k:03d}", **data}


def write_tars(folder: Path, checksum=True, index=True) -> Path:
    for shard in range(SAMPLES // PER_TAR):
        samples = map(tar_sample, range(shard * PER_TAR, shard * PER_TAR + PER_TAR))
        write_tar(folder / f"shard-{shard:06d}.tar", samples, checksum, index)
    (folder / "classes.json").write_text('["a", "b", "c"]')
    return folder


@pytest.fixture(scope="module")
def healthy_mds(tmp_path_factory) -> Path:
    return write_mds(tmp_path_factory.mktemp("healthy") / "mds")


@pytest.fixture(scope="module")
def healthy_packed(tmp_path_factory) -> Path:
    return write_mds(tmp_path_factory.mktemp("healthy") / "packed", "zstd:7")


@pytest.fixture(scope="module")
def healthy_tars(tmp_path_factory) -> Path:
    return write_tars(tmp_path_factory.mktemp("healthy") / "tars")


@pytest.fixture
def mds(healthy_mds, tmp_path) -> Path:
    """A copy that may be damaged, as the next two."""
    return Path(shutil.copytree(healthy_mds, tmp_path / "mds"))


@pytest.fixture
def packed(healthy_packed, tmp_path) -> Path:
    return Path(shutil.copytree(healthy_packed, tmp_path / "packed"))


@pytest.fixture
def tars(healthy_tars, tmp_path) -> Path:
    return Path(shutil.copytree(healthy_tars, tmp_path / "tars"))


def lines(report: Report) -> list[str]:
    return [str(problem) for problem in report.problems]


def the_one(report: Report, severity: Severity = Severity.ERROR) -> Problem:
    assert len(report.problems) == 1, lines(report)
    assert report.problems[0].severity == severity
    return report.problems[0]


def change_index(folder: Path, change) -> None:
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


def offset_table(path: Path) -> np.ndarray:
    data = path.read_bytes()
    return np.frombuffer(data, "<u4", int.from_bytes(data[:4], "little") + 1, 4).astype(int)


def patch(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def patch_in_time(path: Path, at: int, data: bytes) -> None:
    """Change bytes, and neither size nor time."""
    before = path.stat()
    patch(path, at, data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def without_hashes(folder: Path) -> None:
    def change(index):
        for shard in index["shards"]:
            shard["raw_data"]["hashes"] = {}

    change_index(folder, change)


@pytest.mark.parametrize("compression", [None, *COMPRESSIONS])
def test_a_healthy_mds_set_has_no_problems(tmp_path, compression):
    folder = write_mds(tmp_path / "mds", compression)
    files = [file for file in folder.iterdir() if ".mds" in file.name]
    report = verify([folder], columns=["image", "label"], duplicates=True, decode=True)
    size = sum(file.stat().st_size for file in files)
    assert report == Report(len(files), SAMPLES, size, errors=0, warnings=0, notes=0, problems=())
    if compression is not None:  # StreamingDataset leaves both, or what is decompressed
        for file in files:
            (folder / file.stem).write_bytes(decompress(compression, file.read_bytes()))
        assert verify([folder], decode=True).problems == ()
        files[0].unlink()
        assert verify([folder], decode=True).problems == ()


@pytest.mark.parametrize("checksum", [True, False])
def test_healthy_tars_have_no_problems(tmp_path, checksum):
    folder = write_tars(tmp_path / "tars", checksum)
    report = verify([folder], columns=["jpg", "cls"], duplicates=True, decode=True)
    size = sum(file.stat().st_size for file in folder.glob("*.tar"))
    assert report == Report(SAMPLES // PER_TAR, SAMPLES, size, errors=0, warnings=0, notes=0, problems=())
    assert verify([folder / "*.tar", folder / "shard-{000000..000002}.tar", f"file:{folder}"]) == verify([folder])


def test_nothing_is_written(mds, tars):
    (tars / "shard-000001.tar.index.npz").unlink()
    folder = tars.parent
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    verify([mds, tars], duplicates=True, decode=True)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_the_report_is_the_same_for_any_number_of_workers(mds, tars):
    patch(mds / "shard.00001.mds", 300, b"damaged")
    patch(tars / "shard-000001.tar", 0, b"damaged")
    shutil.copy(tars / "shard-000000.tar", tars / "shard-000004.tar")
    seen = []
    options = {"columns": ["image", "jpg"], "duplicates": True, "decode": True}
    one = verify([mds, tars], **options, on_progress=lambda total, size: seen.append((total, size)))
    assert one.errors > 3
    assert verify([mds, tars], **options, workers=2) == one
    assert len(seen) == one.shards == seen[0][0]
    assert sum(size for _, size in seen) == one.size


MDS_DAMAGE = {
    "a flipped byte": (lambda f: patch(f / "shard.00000.mds", 2000, b"\xff\0\xff"), "has the sha1 .*index.json says"),
    "a truncated shard": (lambda f: os.truncate(f / "shard.00000.mds", 999), "has 999 bytes, index.json .*cut off"),
    "a shard that is gone": (lambda f: (f / "shard.00000.mds").unlink(), "shard.00000.mds is missing"),
    "a folder in its place": (
        lambda f: ((f / "shard.00000.mds").unlink(), (f / "shard.00000.mds").mkdir()), "no regular file"
    ),
    "a pipe in its place": (
        lambda f: ((f / "shard.00000.mds").unlink(), os.mkfifo(f / "shard.00000.mds")), "no regular file"
    ),
    "another count": (lambda f: change_index(f, lambda i: i["shards"][0].update(samples=1)), r"samples, .*says 1$"),
    "another column": (
        lambda f: change_index(f, lambda i: i["shards"][0].update(column_names=list("abcdefghijk"))), "its columns are"
    ),
    "another size of values": (
        lambda f: change_index(f, lambda i: i["shards"][0]["column_sizes"].__setitem__(4, 4)), "values of 4 bytes"
    ),
    "a name outside": (
        lambda f: change_index(f, lambda i: i["shards"][0]["raw_data"].update(basename="../x")), "not in its folder"
    ),
    "a name twice": (
        lambda f: change_index(f, lambda i: i["shards"].append(i["shards"][0])), "names 'shard.00000.mds' twice"
    ),
    "no sizes": (
        lambda f: change_index(f, lambda i: i["shards"][0]["raw_data"].update(bytes=None)), "gives .* None bytes"
    ),
    "too many samples": (
        lambda f: change_index(f, lambda i: i["shards"][0].update(samples=10**9)), "1000000000 samples in"
    ),
    "a shard of another format": (
        lambda f: change_index(f, lambda i: i["shards"][0].update(format="csv")), "format 'csv'"
    ),
    "an unknown key": (lambda f: change_index(f, lambda i: i["shards"][0].update(more=1)), "it has the keys"),
    "an entry that is none": (lambda f: change_index(f, lambda i: i["shards"].append(3)), "shard .* is not described"),
    "hashes that are none": (
        lambda f: change_index(f, lambda i: i["shards"][0]["raw_data"].update(hashes=[1])), "not described"
    ),
    "an index of another version": (lambda f: change_index(f, lambda i: i.update(version=1)), "its version is 1"),
    "an index that is no JSON": (lambda f: (f / "index.json").write_text("{"), "no index of MDS shards"),
    "an index that is a list": (lambda f: (f / "index.json").write_text("[]"), "no index of MDS shards"),
    "an index of deep lists": (lambda f: (f / "index.json").write_text("[" * 10**6), "no index of MDS shards"),
    "no index": (lambda f: (f / "index.json").unlink(), "index.json cannot be read"),
    "classes that are no list": (lambda f: (f / "classes.json").write_text("{}"), "is no JSON list"),
    "classes that are no names": (lambda f: (f / "classes.json").write_text("[1]"), "is no JSON list"),
    "classes that are no JSON": (lambda f: (f / "classes.json").write_text("["), "classes.json is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", MDS_DAMAGE)
def test_damage_of_mds_is_found(mds, case):
    damage, text = MDS_DAMAGE[case]
    damage(mds)
    report = verify([mds])
    errors = [problem for problem in report.problems if problem.severity == Severity.ERROR]
    assert report.errors == len(errors) > 0
    assert any(re.search(text, problem.what) for problem in errors), lines(report)
    assert all(problem.file.startswith(str(mds)) for problem in errors)


def test_damage_within_an_mds_shard_is_found_with_its_row(mds):
    without_hashes(mds)  # so that nothing else tells
    shard = mds / "shard.00000.mds"
    good, table = shard.read_bytes(), offset_table(shard)
    variable = 9  # columns, in the order of their names: image and the following
    sizes = np.frombuffer(good, "<u4", variable, table[1])
    for at, data, row, text in [
        (table[1], (int(sizes[0]) + 1).to_bytes(4, "little"), 1, "a sample of .* has values of"),
        (4 + 4 * 2, int(table[1]).to_bytes(4, "little"), 1, f"a sample has the bytes {table[1]:,} to {table[1]:,}"),
        (4 + 4 * (len(table) - 1), b"\xff" * 4, None, "its samples end at byte 4,294,967,295"),
        (4, b"\0" * 4, None, "its samples begin at byte 0"),
        (0, b"\xff" * 4, None, "it holds 4,294,967,295 samples"),
        (4 * (len(table) + 1), b"\xff", None, "the description of its columns is damaged"),
        (good.index("né 1".encode()), b"\xff", 1, "column 'text' is no str"),
        (good.index(b'{"k": [1]}'), b"(", 1, "column 'meta' is no json"),
    ]:  # fmt: skip
        patch(shard, at, data)
        problem = the_one(verify([mds]))
        assert (problem.file, problem.row) == (str(shard), row)
        assert re.search(text, problem.what), problem.what
        shard.write_bytes(good)
    patch(shard, good.index(jpeg(2)), b"none")
    assert verify([mds]).problems == ()
    problem = the_one(verify([mds], decode=True))
    assert (problem.row, problem.what[:26]) == (2, "column 'image' is no jpeg ")


def test_labels_are_compared_with_the_classes(mds, tars):
    for folder in (mds, tars):
        (folder / "classes.json").write_text('["a", "b"]')
    assert verify([tars]).errors == 0
    for report in (verify([mds]), verify([tars], decode=True)):
        assert report.errors == len(range(2, SAMPLES, 3))
        assert re.search("2, classes.json names 2 classes", report.problems[0].what)
        assert report.problems[0].row == 2


@pytest.mark.parametrize("damage", ["cut", "garbage", "swapped", "foreign", "compression"])
def test_damage_of_compressed_mds_is_found(packed, damage):
    first, second = sorted(packed.glob("*.zstd"))[:2]
    if damage == "cut":
        os.truncate(first, first.stat().st_size - 5)
    elif damage == "garbage":
        patch(first, 100, b"\0" * 50)
    elif damage == "swapped":
        first.write_bytes(second.read_bytes())
    elif damage == "foreign":
        without_hashes(packed)
        data = compress("zstd:7", bytes(1 << 26))  # as if it were all right

        def change(index):
            index["shards"][0]["zip_data"].update(bytes=len(data), hashes={})

        change_index(packed, change)
        first.write_bytes(data)
    else:
        change_index(packed, lambda index: index["shards"][0].update(compression="zip"))
    with memory_below(1 << 25):
        report = verify([packed])
    assert report.errors
    assert {problem.file for problem in report.problems} == {str(first.with_suffix(""))}


def test_required_columns_unknown_encodings_and_hashes(mds):
    report = verify([mds], columns=["image", "caption"])
    assert report.errors == report.shards
    assert re.search("no column 'caption', but 'area', ", report.problems[0].what)

    def change(index):
        index["shards"][0]["raw_data"]["hashes"]["crc"] = "0"

    change_index(mds, change)
    assert "its hash 'crc' is not known" in the_one(verify([mds]), Severity.WARNING).what
    shard = mds / "shard.00000.mds"
    data = shard.read_bytes()
    shard.write_bytes(data.replace(b'"bytes"', b'"mine!"', 1))
    without_hashes(mds)
    change_index(mds, lambda index: index["shards"][0]["column_encodings"].__setitem__(6, "mine!"))
    (_, one), (_, other) = the_one_of(verify([mds]), Severity.WARNING)
    assert "have different columns ('raw')" in one
    assert "encoding 'mine!', which is not streaming's" in other


def test_good_data_is_not_called_left_over(tmp_path, tars):
    write_tar(tmp_path / "parts/data.part-0000.tar", [{"__key__": "a", "cls": "1"}])
    write_tar(tmp_path / "parts/data.part-0001.tar", [{"__key__": "b", "cls": "1"}])
    assert lines(verify([tmp_path / "parts"])) == []
    (tars / "out.partial" / STATE).mkdir(parents=True)
    (tars / "x.partial").mkdir()
    assert lines(verify([tars])) == [
        f"warning: {tars}: x.partial was left by something that was broken off; remove it",
        f"note: {tars}: out.partial holds a conversion that was broken off or is running, and can be resumed (convert "
        "--resume)",
    ]


def test_images_of_one_column_may_be_of_different_kinds(tmp_path):
    kinds = ["PNG", "PNG", "JPEG", "GIF", "WEBP"] * 4
    rows = [{"img": jpeg(k, kind), "second": jpeg(k + 50, kind), "n": k} for k, kind in enumerate(kinds)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    convert(tmp_path / "t.parquet", tmp_path / "out", "wds")
    assert lines(verify([tmp_path / "out"])) == []


def test_files_that_nobody_reads_are_noted(mds, tars):
    (mds / "shard.00009.mds").write_bytes(b"x")
    (mds / "sub").mkdir()
    (mds / "sub" / "notes.txt").write_text("x")
    (mds / "shard.00003.mds.tmp").write_text("x")
    (tars / ".0123456789abcdef.index.tmp").write_text("x")
    (tars / "notes.txt").write_text("x")
    assert lines(verify([mds, tars])) == [
        f"warning: {mds}: shard.00003.mds.tmp was left by something that was broken off; remove it",
        f"warning: {mds}: shard.00009.mds is named by no index.json, so nothing reads it",
        f"warning: {tars}: .0123456789abcdef.index.tmp was left by something that was broken off; remove it",
        f"note: {mds}: sub/notes.txt is named by no index.json, so nothing reads it",
    ]


def test_duplicates_are_found_across_shards_and_formats_of_names(tmp_path):
    images = [jpeg(k) for k in (0, 1, 2, 1, 3, 0, 1)]
    mds = write_mds(tmp_path / "mds", samples=[{"image": image, "label": k % 2} for k, image in enumerate(images)])
    assert verify([mds]).problems == ()
    report = verify([mds], duplicates=True, columns=["image", "label"])
    assert the_one_of(report, Severity.WARNING) == [(1, f"the same content in {mds}/shard.00000.mds row 3")]
    for columns in ((), ("image",)):
        report = verify([mds], duplicates=True, columns=columns)
        assert [row for row, _ in the_one_of(report, Severity.WARNING)] == [0, 1]
        assert "row 3 (label 1), " in report.problems[1].what
        assert report.problems[2].what == "3 samples have the content of an earlier one"
    write_tar(
        tmp_path / "tars/a-0.tar",
        [{"__key__": "x", "jpg": b"abc", "cls": b"1"}, {"__key__": "y", "jpg": b"d", "cls": b"1"}],
    )
    write_tar(tmp_path / "tars/a-1.tar", [{"__key__": "z", "cls": b"1", "jpg": b"abc"}])
    report = verify([tmp_path / "tars"], duplicates=True)
    assert the_one_of(report, Severity.WARNING) == [(0, f"the same content in {tmp_path}/tars/a-1.tar row 0")]


@pytest.mark.parametrize("format", ["mds", "wds"])
def test_names_do_not_tell_duplicates_apart_nor_does_what_is_missing_make_some(tmp_path, format):
    for name, k in (("1", 0), ("2", 0), ("3", 1)):
        (tmp_path / "src/a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "src/a" / f"{name}.jpg").write_bytes(jpeg(k))
    convert(tmp_path / "src", tmp_path / "out", format)
    report = verify([tmp_path / "out"], duplicates=True)
    assert [problem.severity for problem in report.problems] == [Severity.WARNING, Severity.NOTE]
    missing = verify([tmp_path / "out"], duplicates=True, columns=["png", "label" if format == "mds" else "cls"])
    assert {problem.severity for problem in missing.problems} == {Severity.ERROR}


def the_one_of(report: Report, severity: Severity) -> list:
    return [(problem.row, problem.what) for problem in report.problems if problem.severity == severity]


TAR_DAMAGE = {
    "a cut tar": (lambda f: os.truncate(f, f.stat().st_size - 11_000), "ends beyond the end of the file|cut off"),
    "a tar cut between members": (lambda f: os.truncate(f, end_of(f)), "it has no end: .* at byte"),
    "one record at the end": (lambda f: os.truncate(f, end_of(f) + 512), "it has no end: .* at byte"),
    "joined tars": (lambda f: f.write_bytes(f.read_bytes() * 2), "behind its end, in the .* another tar"),
    "garbage behind": (lambda f: patch(f, f.stat().st_size, b"x"), "behind its end"),
    "a damaged header": (lambda f: patch(f, 100, b"x"), "there is no member header at byte 0"),
    "a damaged second header": (lambda f: patch(f, second_header(f), b"x"), "no member header at byte"),
    "a gzip": (lambda f: f.write_bytes(compress("gz", f.read_bytes())), r"is compressed \(gzip\)"),
    "an empty file": (lambda f: f.write_bytes(b""), "ends at byte 0"),
    "no tar": (lambda f: f.write_bytes(b"x" * 2000), "no member header at byte 0"),
    "no file": (lambda f: f.unlink(), "cannot be read"),
    "a folder": (lambda f: (f.unlink(), f.mkdir()), "cannot be read|There is no shard"),
    "another time": (os.utime, "its index is stale or damaged"),
    "a damaged index": (lambda f: patch(f.with_name(f.name + ".index.npz"), 200, b"damaged"), "stale or damaged"),
    "a changed byte": (lambda f: patch_in_time(f, 600, b"\xff"), r"what was indexed \(its CRC-32"),
    "a changed name": (lambda f: rename_first(f), r"not what was indexed \(.*extension_text differ"),
}  # fmt: skip


def end_of(path: Path) -> int:
    with tarfile.open(path) as tar:
        return max(-(-(m.offset_data + m.size) // 512) * 512 for m in tar.getmembers())


def second_header(path: Path) -> int:
    with tarfile.open(path) as tar:
        return tar.getmembers()[1].offset


def rename_first(path: Path) -> None:
    with tarfile.open(path) as tar:
        member = tar.getmembers()[0]
    member.name = member.name[:-3] + "jpe"
    patch_in_time(path, 0, member.tobuf(tarfile.GNU_FORMAT))


@pytest.mark.parametrize("case", TAR_DAMAGE)
def test_damage_of_tars_is_found(tars, case):
    damage, text = TAR_DAMAGE[case]
    path = tars / "shard-000001.tar"
    damage(path)
    report = verify(tars / f"shard-{number:06d}.tar" for number in range(3))
    errors = [problem for problem in report.problems if problem.severity == Severity.ERROR]
    assert report.errors == len(errors) > 0
    assert any(re.search(text, problem.what) for problem in errors), lines(report)
    assert {problem.file for problem in errors} == {str(path)}


def test_damage_of_samples_in_tars_is_found_with_row_and_key(tmp_path):
    samples = [tar_sample(k) for k in range(4)]
    samples[0]["cls"] = b"one"
    samples[1]["jpg"] = samples[1]["jpg"][:300]
    samples[1]["json"] = b"{"
    samples[2]["txt"] = b"\xff"
    samples[2]["obj.npy"] = (
        b"\x93NUMPY\1\0\x76\0{'descr': '<f8', 'fortran_order': False, 'shape': (9999999999,), }".ljust(128)
    )
    samples[3]["o.npy"] = io.BytesIO()
    np.save(samples[3]["o.npy"], np.array([{}], object), allow_pickle=True)
    samples[3]["o.npy"] = samples[3]["o.npy"].getvalue()
    samples[3]["pyd"] = b"cos\nsystem\n(S'false'\ntR."
    del samples[3]["cls"]
    samples.append({**tar_sample(4), "txt": b""})
    path = write_tar(tmp_path / "a.tar", samples)
    with memory_below(1 << 24):
        report = verify([path], columns=["jpg", "cls"], decode=True)
    found = [
        (problem.severity.value, problem.row, problem.key, problem.what.split(" (")[0]) for problem in report.problems
    ]
    assert found == [
        ("error", 3, "s003", "it has no 'cls'"),
        ("error", 0, "s000", "its 'cls' cannot be decoded"),
        ("error", 1, "s001", "its 'jpg' cannot be decoded"),
        ("error", 1, "s001", "its 'json' cannot be decoded"),
        ("error", 2, "s002", "its 'obj.npy' cannot be decoded"),
        ("error", 2, "s002", "its 'txt' cannot be decoded"),
        ("error", 3, "s003", "its 'o.npy' cannot be decoded"),
        ("warning", 4, "s004", "a member of it is empty"),
    ]


def test_sets_of_tars(tmp_path):
    write_tar(tmp_path / "a/x-0001.tar", [{"__key__": key, "txt": b"1"} for key in ("k", "l", "k")], index=False)
    write_tar(tmp_path / "a/x-0004.tar", [{"__key__": key, "txt": b"1"} for key in ("m", "l")], index=False)
    write_tar(tmp_path / "b/2020.tar", [{"__key__": "k", "txt": b"1"}])  # another set, with keys of its own
    write_tar(tmp_path / "b/2099.tar", [{"__key__": "l", "txt": b"1"}])  # no numbers of shards
    first, last = tmp_path / "a/x-0001.tar", tmp_path / "a/x-0004.tar"
    assert lines(verify([tmp_path / "a", tmp_path / "b"])) == [
        f"warning: {tmp_path}/a: 2 missing between the shards 1 and 4: x-0002.tar, x-0003.tar",
        f"warning: {first}: it has no index, and 1 other tars have none; the first use makes it, or "
        "infobatch-stream index",
        f"warning: {first}, row 0, key 'k': the same key in {first} row 2",
        f"warning: {first}, row 1, key 'l': the same key in {last} row 1",
        f"note: {tmp_path}/a: the numbers of its shards begin at 1, not at 0: is x-0000.tar missing?",
        "note: 2 samples have the key of an earlier one",
    ]


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_tars_are_checked_at_once_in_little_memory(tmp_path, case):
    path = tmp_path / "s.tar"
    path.write_bytes(HOSTILE[case])
    with memory_below(2**23 + 8 * len(HOSTILE[case])):
        report = verify([path], duplicates=True, decode=True)
    assert report.errors + report.warnings > 0


def test_names_that_mean_no_shards(tmp_path):
    (tmp_path / "x.tar.gz").touch()
    (tmp_path / "empty").mkdir()
    for item, text in {
        tmp_path / "none.tar": "cannot be read",
        tmp_path / "no*.tar": "There is no shard at",
        tmp_path / "empty": "There is no shard at",
        tmp_path / "x.tar.gz": "is compressed",
        "s3://bucket/x.tar": "not on this machine",
        "pipe:cat x.tar": "output of a command",
        "n" * 5000: "Shard nnn",
    }.items():
        assert text in the_one(verify([item])).what


def read_mds(folder: Path) -> list:
    """All that streaming reads from the shards, undecoded."""
    samples = []
    index = json.loads((folder / "index.json").read_text())
    assert index["version"] == 2
    for entry in index["shards"]:
        reader = reader_from_json(str(folder), None, entry)
        raw, packed = folder / reader.raw_data.basename, reader.zip_data
        if packed is not None and not raw.exists():
            raw.write_bytes(decompress(reader.compression, (folder / packed.basename).read_bytes()))
        columns = (reader.column_names, reader.column_encodings, reader.column_sizes)
        samples += [(columns, reader.get_sample_data(row)) for row in range(reader.samples)]
        if packed is not None:
            raw.unlink()
    return samples


def read_tars(folder: Path) -> list:
    samples = []
    for path in sorted(folder.glob("*.tar")):
        with path.open("rb") as stream:
            files = tar_file_expander([{"url": "", "stream": stream}])
            samples += [
                {k: v for k, v in sample.items() if k[:2] != "__" or k == "__key__"} for sample in group_by_keys(files)
            ]
    return samples


def damage(draw, folder: Path, kinds: str) -> None:
    """Change one file, or exchange two, so that sizes and times do not tell."""
    files = sorted(path for path in folder.glob("*") if path.suffix in kinds.split())
    path = files[draw(st.integers(0, len(files) - 1))]
    data, stat = bytearray(path.read_bytes()), path.stat()
    kind = draw(st.sampled_from(["flip", "flip", "flip", "set", "cut", "extend", "swap", "copy", "zeros"]))
    at = draw(st.integers(0, len(data) - 1)) if data else 0
    if kind == "flip" and data:
        data[at] ^= 1 << draw(st.integers(0, 7))
    elif kind == "set":
        data[at : at + 8] = draw(st.binary(min_size=1, max_size=8))
    elif kind == "cut":
        del data[at:]
    elif kind == "extend":
        data += draw(st.binary(min_size=1, max_size=2000)) if draw(st.booleans()) else bytes(1024)
    elif kind == "copy" and data:
        to = draw(st.integers(0, len(data) - 1))
        data[to : to + 512] = data[at : at + 512]
    elif kind == "zeros":
        data[at : at + 512] = bytes(len(data[at : at + 512]))
    elif kind == "swap":
        other = files[draw(st.integers(0, len(files) - 1))]
        data, theirs = bytearray(other.read_bytes()), data
        patch_whole(other, theirs)
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def patch_whole(path: Path, data: bytes) -> None:
    before = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def found_or_the_same(healthy: Path, read, draw, kinds: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(shutil.copytree(healthy, Path(place, "set")))
        damage(draw, folder, kinds)
        report = verify([folder], decode=draw(st.booleans()), duplicates=draw(st.booleans()))
        assert sum((report.errors, report.warnings, report.notes)) or read(folder) == read(healthy)


@CASES
@given(data=st.data())
def test_damaged_mds_is_reported_or_reads_the_same(healthy_mds, data):
    found_or_the_same(healthy_mds, read_mds, data.draw, ".mds .json")


@CASES
@given(data=st.data())
def test_damaged_compressed_mds_is_reported_or_reads_the_same(healthy_packed, data):
    found_or_the_same(healthy_packed, read_mds, data.draw, ".zstd .json")


@CASES
@given(data=st.data())
def test_damaged_tars_are_reported_or_read_the_same(healthy_tars, data):
    found_or_the_same(healthy_tars, read_tars, data.draw, ".tar .npz .json")


@CASES
@given(data=st.data())
def test_damage_without_hashes_never_crashes(healthy_mds, data):
    with tempfile.TemporaryDirectory() as place:
        folder = Path(shutil.copytree(healthy_mds, Path(place, "set")))
        without_hashes(folder)
        for _ in range(3):
            damage(data.draw, folder, ".mds")
        verify([folder], decode=True, duplicates=True)


@CASES
@given(st.lists(st.lists(st.integers(0, 40), max_size=30), max_size=6), st.sampled_from([8, 16]), st.integers(1, 50))
def test_duplicates_are_those_of_a_plain_search(shards, width, most):
    found = find_duplicates([b"".join(digest([(n, [])])[:width] for n in rows) for rows in shards], width, most)
    groups: dict[int, list] = {}
    for shard, rows in enumerate(shards):
        for row, number in enumerate(rows):
            groups.setdefault(number, []).append((shard, row))
    several = [places for places in groups.values() if len(places) > 1]
    assert (found.groups, found.copies) == (len(several), sum(len(places) - 1 for places in several))
    assert found.first == tuple((len(places), tuple(places[:most])) for places in several[:most])


def test_duplicates_take_little_memory_for_each_sample():
    count = 400_000
    digests = [random.Random(k).randbytes(16 * count // 8) for k in range(8)]
    with memory_below(6 * count):
        assert find_duplicates(digests, 16, 20).groups == 0


@CASES
@given(st.sampled_from(COMPRESSIONS), st.binary(max_size=300), st.integers(1, 3 * BLOCK // 300), st.data())
def test_what_is_decompressed_in_steps_is_what_was_compressed(kind, text, times, data):
    plain = text * times
    packed = compress(kind, plain)
    step = data.draw(st.integers(1, len(packed)))

    def blocks():
        return (packed[at : at + step] for at in range(0, len(packed), step))

    pieces = list(decompressed(kind, blocks() if len(packed) < 1000 * step else iter([packed]), len(plain)))
    assert b"".join(pieces) == plain
    assert kind in ("zstd:7", "snappy") or max(map(len, pieces), default=0) <= 2 * BLOCK
    packed = packed[: data.draw(st.integers(0, len(packed) - 1))]
    try:
        rest = b"".join(decompressed(kind, iter([packed] if packed else []), len(plain)))
    except DataError:
        return
    assert plain.startswith(rest)
    assert kind == "snappy" or len(rest) < len(plain) or not plain


@CASES
@given(st.sampled_from([*COMPRESSIONS, "zip"]), st.binary(max_size=200), st.integers(0, 300))
def test_garbage_is_not_decompressed(kind, garbage, size):
    with suppress(DataError):
        b"".join(decompressed(kind, iter([garbage]), size))


def test_a_bomb_stops_where_it_is_larger_than_it_should_be():
    for kind in COMPRESSIONS:
        packed = compress(kind, bytes(1 << 28))
        with memory_below(len(packed) + (1 << 23)), pytest.raises(DataError, match=r"more than the 1,000|expected"):
            Stream(decompressed(kind, iter([packed]), 1000), [], 1000).finish()


@CASES
@given(st.binary(max_size=3000), st.lists(st.integers(0, 400)), st.integers(1, 500))
def test_a_stream_reads_as_a_file_does(data, lengths, step):
    stream = Stream((data[at : at + step] for at in range(0, len(data), step)), ["md5"], len(data))
    file = io.BytesIO(data)
    for length in lengths:
        assert stream.read(length) == file.read(length)
    assert stream.finish() == {"md5": hashlib.md5(data).hexdigest()}
    assert stream.size == len(data)


def test_fixed_sizes_are_streamings():
    from streaming.base.format.mds.encodings import get_mds_encoded_size, get_mds_encodings

    for name in [*get_mds_encodings(), "ndarray:uint8", "ndarray:float16:3,4"]:
        assert fixed_size(name) == get_mds_encoded_size(name), name
        assert "pkl" not in name or mds_check(name, decode=True) is None
    for bad in ("ndarray:object:2", "ndarray:uint8:0", "ndarray:uint8:x"):
        with pytest.raises(ValueError, match=r"."):
            fixed_size(bad)
    assert not any(tar_check(name) for name in ("pyd", "pickle", "pth", "bin", "seg.pkl"))


def test_many_problems_of_a_shard_are_counted_and_a_few_listed():
    diagnostics = Diagnostics("f")
    diagnostics.add_rows(Severity.ERROR, range(1000), "x", str)
    assert diagnostics.counts == {Severity.ERROR: 1000}
    assert len(diagnostics.problems()) == 11
    assert str(diagnostics.problems()[-1]) == "error: f: 990 more errors, which are not listed"


def test_what_a_file_holds_cannot_move_the_cursor():
    text = str(Problem(Severity.ERROR, "f\n", "\x1b[2J né \udcff", 0, "k\r"))
    assert text == "error: f\\n, row 0, key 'k\\r': \\x1b[2J né \\udcff"


def test_without_pillow_it_is_named(tars, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    verify([tars])
    with pytest.raises(MissingExtraError, match=r"pillow.*infobatch-stream\[tools\]"):
        verify([tars], decode=True)


def test_command_verify(mds, tars):
    code, out, err = run("verify", mds, tars, "--columns", "image", "--workers", "1")
    assert (code, err) == (1, "")  # tars have jpg
    assert re.search(
        r"^error: .*shard-000000.tar: none of its 8 samples has 'image', but 'a.npy', 'cls', 'jpg'", out, re.MULTILINE
    )
    assert re.search(
        r"^\d+ shards, 48 samples, .* kB in .* s \(.*B/s\): 3 errors, 0 warnings, 0 notes$", out, re.MULTILINE
    )
    (tars / "shard-000000.tar.index.npz").unlink()
    assert run("verify", tars, "--columns", "jpg, cls", "--decode", "--workers", "1")[0] == 0
    code, out, err = run("verify", tars, "--json", "--workers", "1", "--duplicates")
    report = json.loads(out)
    assert (code, err, report["errors"], report["warnings"]) == (0, "", 0, 1)
    assert report["problems"][0]["severity"] == "warning"
    assert report["problems"][0]["file"] == str(tars / "shard-000000.tar")
    assert run("verify")[0] == 2
    assert run("verify", tars, "--workers", "0")[0] == 2
