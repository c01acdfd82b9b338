"""A conversion that stopped at data which cannot be read goes on, by each of the ways out that the error names."""

import json
import shutil

import numpy as np
import pytest
from support.conversions import contents, fetched
from support.servers import use_s3
from typer.testing import CliRunner

from infobatch_stream.convert import convert
from infobatch_stream.errors import ConfigError, DataError
from infobatch_stream.formats.shard_set import PLAN
from infobatch_stream.tools.app import app

OPTIONS = {"shard_bytes": 1 << 16}
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def src(tmp_path):
    """30 pictures of 10 kB in 3 classes; that which the seed has last of all is empty."""
    rng = np.random.default_rng(0)
    order = np.random.default_rng(0).permutation(30)
    paths = [tmp_path / "src" / f"class{number // 10}" / f"{number:02}.png" for number in range(30)]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PNG + rng.bytes(10_000))
    paths[order[-1]].write_bytes(b"")
    return tmp_path / "src"


def empty_of(src):
    (found,) = [path for path in src.rglob("*.png") if not path.stat().st_size]
    return found


def stopped(src, dst, format):
    with pytest.raises(DataError, match="is empty") as caught:
        convert(src, dst, format, **OPTIONS)
    assert "mend or remove what is named" in caught.value.__notes__[0]
    assert "--resume --on-error skip" in caught.value.__notes__[0]
    return empty_of(src)


@pytest.mark.parametrize("format", ["mds", "wds"])
def test_after_an_empty_file_it_goes_on_without_it_or_with_it_mended_or_removed(src, tmp_path, format):
    whole = tmp_path / "whole"
    convert(src, whole, format, on_error="skip", **OPTIONS)
    for way in ("skip", "removed", "mended"):
        dst, own = tmp_path / way, tmp_path / f"src-{way}"
        shutil.copytree(src, own)
        empty = stopped(own, dst, format)
        kept = {path.name: path.stat().st_ino for path in (tmp_path / f"{way}.partial").glob("shard*")}
        if way == "skip":
            done = convert(own, dst, format, resume=True, on_error="skip", **OPTIONS)
        elif way == "removed":
            empty.unlink()
            done = convert(own, dst, format, resume=True, **OPTIONS)
        else:
            empty.write_bytes(PNG + bytes(10_000))
            done = convert(own, dst, format, resume=True, **OPTIONS)
        name = str(empty.relative_to(own))
        assert (done.parts[0].samples, len(done.problems)) == ((30, 0) if way == "mended" else (29, 1))
        assert all(name in problem for problem in done.problems)
        assert kept
        assert {name: (dst / name).stat().st_ino for name in kept} == kept
        if way == "mended":
            convert(own, tmp_path / "fresh", format, **OPTIONS)  # of the size that its shard was meant for
            assert len(contents(dst)) == len(contents(tmp_path / "fresh"))
            same = [name for name, data in contents(dst).items() if contents(tmp_path / "fresh")[name] == data]
            assert len(same) >= len([name for name in kept if not name.endswith(".npz")])
        else:
            assert contents(dst) == contents(whole)


def test_in_a_bucket_too(src, s3, monkeypatch, tmp_path):
    use_s3(monkeypatch, s3.url)
    convert(src, tmp_path / "whole", "wds", on_error="skip", **OPTIONS)
    for way in ("skip", "removed"):
        url = f"s3://{s3.bucket}/{way}"
        empty = stopped(src, url, "wds")
        if way == "removed":
            empty.unlink()
        convert(src, url, "wds", resume=True, on_error="skip" if way == "skip" else "raise", **OPTIONS)
        assert fetched(url) == contents(tmp_path / "whole")


def test_the_command_goes_on_as_it_says(src, tmp_path):
    command = ["convert", str(src), str(tmp_path / "out"), "--format", "wds", "--shard-size", "64KB"]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 1
    assert "go on with --resume" in first.stderr
    then = CliRunner().invoke(app, [*command, "--resume", "--on-error", "skip", "--json"])
    assert then.exit_code == 0, then.stderr
    assert json.loads(then.stdout)["parts"][0]["samples"] == 29


def test_a_file_that_was_removed_is_missed_once_and_may_come_back_before_its_shard_is_made(src, tmp_path):
    empty = stopped(src, tmp_path / "out", "wds")
    order = np.random.default_rng(0).permutation(30)
    other = src / f"class{order[-2] // 10}" / f"{order[-2]:02}.png"  # of the last shard too
    other.rename(tmp_path / "aside")
    with pytest.raises(DataError, match="is empty"):
        convert(src, tmp_path / "out", "wds", resume=True, **OPTIONS)
    (tmp_path / "aside").rename(other)
    empty.unlink()
    done = convert(src, tmp_path / "out", "wds", resume=True, **OPTIONS)
    assert [empty.name in problem for problem in done.problems] == [True]


@pytest.mark.parametrize("what", ["changed", "removed", "added", "class"])
def test_what_would_make_other_shards_of_those_that_are_done_is_refused(src, tmp_path, what):
    stopped(src, tmp_path / "out", "wds")
    order = np.random.default_rng(0).permutation(30)
    first = src / f"class{order[0] // 10}" / f"{order[0]:02}.png"
    if what == "changed":
        first.write_bytes(PNG)
        text = f"{first.relative_to(src)} was changed or removed since its shard"
    elif what == "removed":
        first.unlink()
        text = f"{first.relative_to(src)} was changed or removed since its shard"
    elif what == "added":
        (src / "class0/a.png").write_bytes(PNG)
        text = r"another source: it did not have class0/a\.png"
    else:
        (src / "class0").rename(src / "class3")
        text = r"another source: its classes were \['class0', .*'class3'\]"
    before = contents(tmp_path / "out.partial")
    with pytest.raises(ConfigError, match=text):
        convert(src, tmp_path / "out", "wds", resume=True, on_error="skip", **OPTIONS)
    assert contents(tmp_path / "out.partial") == before


@pytest.mark.parametrize("damage", [b"", b"[]", b"[{}]", b'[{"name": "", "samples": 30, "bounds": [0, 31]}]', b"\xff"])
def test_a_plan_that_is_damaged_is_told_of(src, tmp_path, damage):
    stopped(src, tmp_path / "out", "wds")
    (tmp_path / "out.partial" / PLAN).write_bytes(damage)
    with pytest.raises(ConfigError, match=r"damaged|another source"):
        convert(src, tmp_path / "out", "wds", resume=True, on_error="skip", **OPTIONS)


def test_a_table_that_changed_is_another_source(tmp_path):
    (tmp_path / "t.csv").write_text("\n".join(["text,label", *(f"{'x' * 500},{number}" for number in range(2000))]))
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "t.csv", tmp_path / "out", "wds", on_progress=interrupt, shard_bytes=1 << 18)
    with (tmp_path / "t.csv").open("a") as file:
        file.write("\nx,1\n")
    with pytest.raises(ConfigError, match="another source: it was changed"):
        convert(tmp_path / "t.csv", tmp_path / "out", "wds", resume=True, shard_bytes=1 << 18)


def interrupt(_):
    raise KeyboardInterrupt


# ---- larger than a shard


@pytest.fixture
def huge(src):
    """``src``, with an image of 70 kB."""
    empty_of(src).write_bytes(PNG + bytes(70_000))
    return src


@pytest.mark.parametrize("format", ["mds", "wds"])
def test_an_image_larger_than_a_shard_is_told_of_before_anything_is_written_and_may_be_left_out(huge, tmp_path, format):
    seen = []
    with pytest.raises(ConfigError, match=r"\.png needs a shard of [0-9,]+ bytes, 65,536 are allowed") as caught:
        convert(huge, tmp_path / "out", format, on_progress=seen.append, **OPTIONS)
    assert "--on-error skip" in caught.value.__notes__[0]
    assert seen == []
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
    done = convert(huge, tmp_path / "out", format, on_error="skip", **OPTIONS)
    assert done.parts[0].samples == 29
    assert "needs a shard of" in done.problems[0]
    for file in (tmp_path / "out").glob("shard*[rs]"):
        assert file.stat().st_size <= 1 << 16
    needed = int(str(caught.value).split("shard of ")[1].split(" ")[0].replace(",", ""))
    assert convert(huge, tmp_path / "larger", format, shard_bytes=needed).parts[0].samples == 30


def test_an_image_that_is_not_taken_or_made_smaller_is_not_too_large(huge, tmp_path):
    from PIL import Image

    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8))
    for path in huge.rglob("*.png"):
        image.save(path)
    assert convert(huge, tmp_path / "labels", "wds", columns={"label": "label"}, **OPTIONS).parts[0].samples == 30
    assert convert(huge, tmp_path / "small", "wds", resize=20, **OPTIONS).parts[0].samples == 30


def test_a_row_larger_than_a_shard_is_told_of_before_anything_is_written(tmp_path):
    (tmp_path / "t.csv").write_text("\n".join(["text", *["x" * 9000] * 20, "y" * 70_000]))
    seen = []
    with pytest.raises(ConfigError, match=r"row 20 .*needs a shard of"):
        convert(tmp_path / "t.csv", tmp_path / "out", "wds", on_progress=seen.append, shuffle=False, **OPTIONS)
    assert seen == []
    done = convert(tmp_path / "t.csv", tmp_path / "out", "wds", on_error="skip", **OPTIONS)
    assert (done.parts[0].samples, len(done.problems)) == (20, 1)
