"""Samples unlike the others, and shards that cannot be read: told of, and passed over where that is asked for."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from support.commands import members_of, run

from infobatch_stream.convert import convert, write_shards
from infobatch_stream.convert.readers import read_source
from infobatch_stream.errors import DataError
from infobatch_stream.formats.schema import KEY, MEMBERS


def picture() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (3, 2)).save(stream, "JPEG")
    return stream.getvalue()


PICTURE = picture()
COUNT = 200


def write_tar(path: Path, count: int = COUNT, odd: dict[int, dict[str, bytes]] | None = None) -> Path:
    """Samples of an image and a label, but for those that are ``odd``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            members = (odd or {}).get(number, {"jpg": PICTURE, "cls": str(number % 7).encode()})
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{path.stem}{number:06}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def types(source) -> dict[str, str]:
    return {name: column.mds for name, column in source.columns.items()}


@pytest.mark.parametrize(
    ("odd", "column", "mds", "why"),
    [
        ({"jpg": PICTURE}, "cls", "int", "it has none, or an empty one"),
        ({"cls": b"1"}, "jpg", "jpeg", "it has none, or an empty one"),
        ({"jpg": b"", "cls": b"1"}, "jpg", "jpeg", "it has none, or an empty one"),
        ({"jpg": PICTURE, "cls": b"1" * 30}, "cls", "int", "it is longer than a number"),
        ({"jpg": PICTURE, "cls": b"cat"}, "cls", "int", "no whole number"),
    ],
)
def test_one_odd_sample_changes_a_type_with_a_note_or_is_left_out(tmp_path, odd, column, mds, why):
    place = 0 if odd.get("cls") == b"cat" else 77  # the first is among those that are looked at
    write_tar(tmp_path / "src/x.tar", odd={place: odd})
    (source,) = read_source(tmp_path / "src")
    assert types(source)[column] == "bytes"
    (note,) = source.notes
    for text in (f"{column!r} is stored as bytes and not as {mds}", f"x{place:06}'", why, "1 of ", "--on-error skip"):
        assert text in note
    code, out, _ = run("convert", tmp_path / "src", tmp_path / "out", "--format", "wds")
    assert (code, note in out) == (0, True)
    assert members_of(tmp_path / "out") == members_of(tmp_path / "src")
    for number, options in enumerate(({}, {"encodings": {column: mds}})):  # the second is the remedy of the note
        done = convert(tmp_path / "src", tmp_path / f"kept{number}", "mds", on_error="skip", **options)
        assert json.loads((tmp_path / f"kept{number}/columns.json").read_text())[column]["mds"] == mds
        assert done.parts[0].samples == COUNT - 1
        assert f"x{place:06}'" in done.problems[0]
        assert (len(done.problems), done.notes) == (1, ())


@pytest.mark.parametrize("others", [{}, {0: {"jpg": PICTURE, "cls": b"cat"}}])
def test_numbers_that_are_written_in_another_way_are_stored_as_numbers_as_the_note_says(tmp_path, others):
    lines = {number: {"jpg": PICTURE, "cls": f"{number % 7}\n".encode()} for number in range(60)}
    write_tar(tmp_path / "src/x.tar", odd=lines | others)
    (note,) = convert(tmp_path / "src", tmp_path / "out", "mds").notes
    assert "--encoding cls=int stores them as numbers" in note
    assert (
        ("with --on-error skip leaves out those that are none" in note) == ("--on-error skip" in note) == bool(others)
    )
    mode = "skip" if others else "raise"
    done = convert(tmp_path / "src", tmp_path / "again", "mds", encodings={"cls": "int"}, on_error=mode)
    assert (done.parts[0].samples, len(done.problems), done.notes) == (COUNT - len(others), len(others), ())
    (back,) = read_source(tmp_path / "again")
    assert [back[k]["cls"] for k in range(len(back))] == [k % 7 for k in range(len(others), COUNT)]


def test_what_is_no_json_is_left_out_as_the_note_says(tmp_path):
    write_tar(tmp_path / "src/x.tar", odd={k: {"json": b"{" if k % 5 == 0 else b"{}"} for k in range(COUNT)})
    (note,) = convert(tmp_path / "src", tmp_path / "out", "mds").notes
    assert note.endswith("To leave such samples out instead: --encoding json=json --on-error skip")
    done = convert(tmp_path / "src", tmp_path / "again", "mds", encodings={"json": "json"}, on_error="skip")
    assert (done.parts[0].samples, len(done.problems), done.notes) == (COUNT * 4 // 5, COUNT // 5, ())


def test_samples_that_are_left_out_do_not_add_a_field_of_members(tmp_path):
    write_tar(tmp_path / "src/x.tar", odd={77: {"jpg": PICTURE}, 78: {"other": b"x"}})
    (source,) = read_source(tmp_path / "src", skip=True, columns={"image": "jpg", "label": "cls"})
    assert list(source.columns) == [KEY, "image", "label"]
    with pytest.raises(DataError, match=r"x000078': none of the members that are converted.*--on-error skip"):
        read_source(tmp_path / "src", columns={"image": "jpg", "label": "cls"})


def test_where_many_samples_lack_a_member_they_are_not_left_out_unless_the_type_is_given(tmp_path):
    write_tar(tmp_path / "src/x.tar", 100, odd={number: {"jpg": PICTURE} for number in range(0, 100, 3)})
    done = convert(tmp_path / "src", tmp_path / "all", "mds", on_error="skip")
    assert (done.parts[0].samples, len(done.notes)) == (100, 1)
    assert "34 of 100 samples" in done.notes[0]
    done = convert(tmp_path / "src", tmp_path / "some", "mds", on_error="skip", encodings={"cls": "int"})
    assert (done.parts[0].samples, len(done.problems)) == (66, 34)


def test_an_image_that_is_gone_from_tars_that_all_had_one_is_an_error(tmp_path):
    write_shards([{KEY: f"{k}", "n": k, "t": {"k": k}} for k in range(4)], tmp_path / "src", "wds")
    with tarfile.open(tmp_path / "src/shard-000000.tar") as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(tmp_path / "src/shard-000000.tar", "w") as tar:
        for member, data in members:
            if member.name != "2.json":
                tar.addfile(member, io.BytesIO(data))
    with pytest.raises(DataError, match=r"sample '2'.*no member json"):
        convert(tmp_path / "src", tmp_path / "out", "mds")
    assert MEMBERS in read_source(tmp_path / "src")[0].columns


@pytest.mark.parametrize("workers", [1, 2])
def test_a_tar_that_is_cut_short_is_passed_over_where_that_is_asked_for(tmp_path, workers):
    for name in "abcd":
        write_tar(tmp_path / f"src/{name}.tar", 5)
    data = (tmp_path / "src/b.tar").read_bytes()
    (tmp_path / "src/b.tar").write_bytes(data[:3000])
    arguments = ("convert", tmp_path / "src", tmp_path / "out", "--format", "mds", "--workers", workers)
    code, _, err = run(*arguments)
    assert (code, (tmp_path / "out").exists()) == (1, False)
    assert "b.tar" in err
    code, out, err = run(*arguments, "--on-error", "skip", "--json")
    assert code == 3
    found = json.loads(out)
    assert found["parts"][0]["samples"] == 15
    assert len(found["lost"]) == 1
    assert "src/b.tar" in found["lost"][0]
    code, out, err = run(*arguments, "--on-error", "skip", "--overwrite")
    assert (code, "skipped: " in err, "src/b.tar" in err) == (3, True, True)


def test_mds_shards_that_are_missing_or_cut_short_are_passed_over_likewise(tmp_path):
    write_shards([{"n": k, "b": bytes(8000)} for k in range(8)], tmp_path / "src", "mds", shard_bytes=1 << 14)
    shards = sorted((tmp_path / "src").glob("*.mds"))
    assert len(shards) > 3
    shards[0].unlink()
    shards[2].write_bytes(shards[2].read_bytes()[:-1])
    with pytest.raises(DataError, match="is missing"):
        convert(tmp_path / "src", tmp_path / "out", "wds")
    done = convert(tmp_path / "src", tmp_path / "out", "wds", on_error="skip")
    assert [name in text for name, text in zip((shards[0].name, shards[2].name), done.lost, strict=True)] == [
        True,
        True,
    ]
    assert done.parts[0].samples == 2 * (len(shards) - 2)
    for shard in shards:
        shard.unlink(missing_ok=True)
    with pytest.raises(DataError, match="is missing"):
        convert(tmp_path / "src", tmp_path / "again", "wds", on_error="skip")
    shutil.rmtree(tmp_path / "out")


def test_tars_that_wids_lists_in_an_index_json_are_tars(tmp_path):
    write_tar(tmp_path / "src/x-000.tar", 5)
    listed = {"wids_version": 1, "shardlist": [{"url": "x-000.tar", "nsamples": 5}]}
    (tmp_path / "src/index.json").write_text(json.dumps(listed))
    (source,) = read_source(tmp_path / "src")
    assert len(source) == 5
