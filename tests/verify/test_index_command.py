"""index: every tar gets its index, by any number of processes, and what fails is told at the end."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import pytest
from support.commands import run
from webdataset.writer import TarWriter

from infobatch_stream import IndexedWebDataset
from infobatch_stream.errors import ConfigError, DataError
from infobatch_stream.formats.tar_index import TarIndex
from infobatch_stream.sources.webdataset.index_cache import is_fresh, load_index
from infobatch_stream.verify.build_indexes import Indexing, index_shards

SHARDS, ROWS = 3, 4


@pytest.fixture
def tars(tmp_path) -> Path:
    folder = tmp_path / "tars"
    folder.mkdir()
    for shard in range(SHARDS):
        with TarWriter(str(folder / f"shard-{shard:06d}.tar"), mtime=0) as writer:
            for row in range(ROWS):
                writer.write({"__key__": f"{shard}-{row}", "cls": b"%d" % row})
    return folder


@pytest.mark.parametrize("workers", [1, 2])
def test_indexes_are_built_once_and_again_when_stale(tars, workers):
    size = sum(path.stat().st_size for path in tars.glob("*.tar"))
    seen = []
    done = index_shards([tars], workers=workers, on_progress=lambda total, size: seen.append((total, size)))
    assert done == Indexing(SHARDS, 0, SHARDS * ROWS, size, ())
    assert seen == [(SHARDS, size // SHARDS)] * SHARDS
    assert all(is_fresh(path) for path in tars.glob("*.tar"))
    (tars / "shard-000000.tar.index.npz").unlink()
    os.utime(tars / "shard-000001.tar")
    again = [tars / "shard-{000000..000002}.tar", tars / "*.tar", f"file:{tars}/shard-000000.tar"]
    assert index_shards(again, workers=workers) == Indexing(2, 1, SHARDS * ROWS, size, ())
    assert index_shards(again, workers=workers) == Indexing(0, 3, SHARDS * ROWS, size, ())


def test_checksums_are_added_where_they_lack(tars):
    index_shards([tars])
    path = str(tars / "shard-000000.tar")
    assert load_index(path).checksum is None
    assert index_shards([tars], checksums=True).built == SHARDS
    assert load_index(path).checksum == TarIndex.build(path, checksum=True).checksum is not None
    assert index_shards([tars], checksums=True).fresh == SHARDS
    assert index_shards([tars]).fresh == SHARDS  # one with a checksum will do
    assert load_index(path).checksum is not None


@pytest.mark.parametrize("workers", [1, 2])
def test_failures_do_not_keep_the_others_from_being_indexed(tars, workers):
    (tars / "shard-000001.tar").write_bytes(b"damaged")
    paths = [tars / "missing.tar", tars]
    done = index_shards(paths, workers=workers)
    assert (done.built, done.fresh, len(done.failures)) == (2, 0, 2)
    assert "missing.tar cannot be read" in done.failures[0]
    assert "shard-000001.tar (7 bytes) is no tar" in done.failures[1]


def test_names_that_mean_no_tars(tars):
    for name, error, text in [
        (tars / "no*.tar", DataError, "There is no shard at"),
        (tars / "a{0.tar", ConfigError, "braces"),
        ("s3://bucket/a.tar", DataError, "is not on this machine"),
    ]:
        with pytest.raises(error, match=text):
            index_shards([name])


def test_command_index(tars):
    code, out, err = run("index", tars, "--workers", 1)
    assert (code, err) == (0, "")
    first, second = out.splitlines()
    assert first == "3 built, 0 already fresh, 12 samples in total"
    assert re.fullmatch(r"3 shards, 12 samples, 30\.7 kB in \d+\.\d s \(.*B/s\)", second)
    code, out, err = run("index", tars, "--json", "--checksums", "--workers", 1)
    assert (code, err) == (0, "")
    assert json.loads(out) == {"built": 3, "fresh": 0, "samples": 12, "size": 30720, "failures": []}
    (tars / "shard-000002.tar").write_bytes(b"damaged")
    code, out, err = run("index", tars, tars / "missing.tar", "--workers", 1)
    assert code == 1
    assert out.startswith("0 built, 2 already fresh, 8 samples in total\n")
    assert [line[:6] for line in err.splitlines()] == ["error:", "error:", "2 of 4"]
    code, out, _ = run("index", tars, "--workers", 1, "--json")
    assert (code, len(json.loads(out)["failures"])) == (1, 1)
    code, _, err = run("index", tars / "no*.tar")
    assert (code, err.count("\n")) == (1, 1)
    assert run("index")[0] == run("index", tars, "--workers", 0)[0] == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_at_once_and_leaves_nothing_half_written(tars, number):
    """The workers are held up in the middle of writing an index."""
    code = """
import sys
from infobatch_stream._pool import ordered_map
import slow
if __name__ == "__main__":
    import signal
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    list(ordered_map(slow.save, sys.argv[1:], 2))
"""
    slow = """
import time
from pathlib import Path
from infobatch_stream.formats.tar_index import (TarIndex)
def wait(temporary, place):
    temporary.with_suffix(".begun").touch()
    time.sleep(60)
def save(path):
    Path.replace = wait
    TarIndex.build(path).save(Path(path + ".index.npz"))
"""
    (tars.parent / "slow.py").write_text(slow)
    (tars.parent / "main.py").write_text(code)
    command = [sys.executable, tars.parent / "main.py", *sorted(tars.glob("*.tar"))]
    with subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while len(list(tars.glob(".*.begun"))) < 2 and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.02)
        assert len(list(tars.glob(".*.tmp"))) == 2
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        start = time.monotonic()
        assert process.wait(30) != 0
        assert time.monotonic() - start < 5
    assert not list(tars.glob(".*.tmp"))


def test_an_index_that_gives_other_places_is_not_believed(tars):
    """Its size, time and all else are right; some program wrote it, or somebody who means harm."""
    path = tars / "shard-000000.tar"
    place = path.with_name(f"{path.name}.index.npz")
    right = load_index(path)
    told = IndexedWebDataset(path)
    plain = [told[row]["cls"] for row in range(ROWS)]
    for name in ("offset", "length"):
        for member in range(ROWS):
            for step in (-512, -1, 1, 512, 1024):
                values = getattr(right, name).copy()
                values[member] = max(0, values[member] + step)
                dataclasses.replace(right, **{name: values}).save(place)
                dataset = IndexedWebDataset(path)
                with suppress(DataError):
                    assert [dataset[row]["cls"] for row in range(ROWS)] == plain
    values = right.length.copy()
    values[0] = 0
    dataclasses.replace(right, length=values).save(place)
    dataset = IndexedWebDataset(path)
    with pytest.raises(DataError, match=r"index of .*shard-000000.tar does not say where its members lie"):
        dataset[0]
    place.unlink()  # as the error says
    assert IndexedWebDataset(path)[0]["cls"] == plain[0]


def test_extended_headers_count_for_more_than_headers(tmp_path):
    """A tar in which the length stands in the extended header alone: as in large files, which Python writes so."""
    data = BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.PAX_FORMAT) as writer:
        info = tarfile.TarInfo("a.cls")
        info.size, info.pax_headers = 1, {"size": "1"}
        writer.addfile(info, BytesIO(b"7"))
    raw = bytearray(data.getvalue())
    header = raw[1024:1536]
    header[124:136] = b"00000000000\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    raw[1024:1536] = header
    (tmp_path / "a.tar").write_bytes(raw)
    assert IndexedWebDataset(tmp_path / "a.tar")[0]["cls"] == b"7"
