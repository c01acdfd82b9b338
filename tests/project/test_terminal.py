"""No command prints what a name or a file holds such that it moves the cursor, or colours the terminal."""

import io
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from support.commands import run
from support.histories import loader, losses, train

from infobatch_stream import ScoreStore

EVIL = "a\x1b[2J\x07\u202e\rb"


def harmless(*arguments) -> str:
    """What a command prints."""
    _, out, err = run(*arguments)
    assert out + err
    assert all(c.isprintable() or c == "\n" for c in out + err), (out, err)
    return out + err


@pytest.fixture
def store(tmp_path):
    place = tmp_path / f"{EVIL}.zarr"
    ScoreStore.create(place, 3, f"wds:{EVIL}", scores=np.array([1, 2, 3], np.float32), epoch=1)
    return place


def write_tar(place, *names):
    place.parent.mkdir(exist_ok=True)
    with tarfile.open(place, "w", format=tarfile.PAX_FORMAT) as writer:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 1
            writer.addfile(info, io.BytesIO(b"1"))


def test_commands_about_a_store(tmp_path, store, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "\\x1b[2J" in harmless("inspect", store)
    harmless("inspect", store, "--json")
    harmless("export", store, "-o", f"{EVIL}.csv")
    harmless("report", store, "-o", f"{EVIL}.html")
    harmless("simulate", store, "--epochs", 3)
    harmless("export", store, "-o", f"{EVIL}.txt")
    write_tar(tmp_path / EVIL / f"{EVIL}.tar", f"{EVIL}.cls")
    for command in ("report", "export"):
        assert "other shards" in harmless(command, store, "--dataset", tmp_path / EVIL)
    for command in ("inspect", "simulate", "export", "report"):
        harmless(command, tmp_path / f"{EVIL}-none")


def test_commands_about_shards(tmp_path):
    folder = tmp_path / f"{EVIL} set"
    write_tar(folder / f"{EVIL}-0.tar", f"{EVIL}.cls", f"{EVIL}", f"x.{EVIL}")
    write_tar(folder / f"{EVIL}-2.tar", f"{EVIL}.cls")
    (folder / f"{EVIL}-3.tar").write_bytes(b"x" * 999)
    (folder / "columns.json").write_text(f'{{"{EVIL.encode("unicode_escape").decode()[:1]}": 1}}')
    assert "\\x1b[2J" in harmless("verify", folder, "--columns", EVIL, "--decode", "--duplicates", "--workers", 1)
    assert "\\x1b[2J" in harmless("index", folder, "--workers", 1)
    harmless("verify", folder / f"{EVIL}.tar")
    for name in ("one", "two"):
        (tmp_path / "images" / EVIL / name).mkdir(parents=True)
        (tmp_path / "images" / EVIL / name / f"{EVIL}.png").write_bytes(b"")
    for source in (tmp_path / "images" / EVIL, folder, tmp_path / f"{EVIL}-none"):
        harmless("convert", source, tmp_path / f"{EVIL} out", "--format", "mds")


def test_warnings(tmp_path):
    """As those of a history that cannot be read, in the command as it is installed."""
    text = "import sys, warnings; from infobatch_stream.tools import app, __main__ as m\n"
    text += "app.app = lambda: warnings.warn(sys.argv[1]); m.main()"
    done = subprocess.run([sys.executable, "-P", "-c", text, EVIL], capture_output=True, text=True, env={**os.environ})
    assert done.stderr == "warning: a\\x1b[2J\\x07\\u202e\\rb\n"


def test_no_quantile_is_below_0_where_no_score_is(tmp_path):
    """A quantile stands for the scores about it: that of -0.0 was shown as -4.59e-41."""
    train(loader(tmp_path / "s.zarr", 2))
    ScoreStore.create(tmp_path / "z.zarr", 4, scores=np.array([-0.0, -0.0, 0, 1], np.float32), epoch=1)
    text = run("inspect", tmp_path / "z.zarr")[1]
    assert "5 % below 0, 50 % below 0, 95 % below 1" in " ".join(text.split())
    assert "e-41" not in text + run("inspect", tmp_path / "z.zarr", "--json")[1]


def test_inspect_says_of_which_scores_its_means_are(tmp_path):
    """A row has the mean that its epoch left; the stats of an epoch, the mean that it began with."""
    begun = []
    run_ = loader(tmp_path / "s.zarr", 3)
    for epoch in range(3):
        for (x, _), picks in run_:
            run_.update(losses(x, epoch), picks)
        begun.append(run_.stats["mean_score"])
    text = run("inspect", tmp_path / "s.zarr")[1]
    rows = [line.split() for line in text.splitlines() if line.split()[:1] in (["0"], ["1"], ["2"])]
    means = [row[-4] for row in rows]  # before median, 95 %, and seconds
    assert means[0] != means[1]
    assert means[:2] == [f"{mean:.4g}" for mean in begun[1:]]
    assert "loader.stats['mean_score']" in " ".join(text.split())
