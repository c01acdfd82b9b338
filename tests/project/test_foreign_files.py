"""No command, test helper or benchmark writes to, or removes, what it did not make: canaries sit beside all paths."""

import json
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from streaming.base.util import clean_stale_shared_memory
from support.paths import ROOT, TESTS

from benchmarks.__main__ import NAMES

WATCH = TESTS / "support" / "watch"
QUICK = ("order",)

# Folders of a user, and files in them that look like what we, or libraries that we use, would write there.
CANARIES = {
    "home": [".cache/infobatch-stream/notes", ".lightning/chunks/x/thesis.tex", ".config/matplotlib.bak", "run.zarr/x"],
    "tmp": [
        "data/x.bin", "chunks/x.bin", "streaming/x", "x.part",
        *(f"infobatch-{name}-old/x" for name in ("convert", "demo", "benchmark", "stream")),
    ],
    "cache": ["infobatch-stream/photo.shard", "infobatch-stream/a.claim", "infobatch-stream/a.1234.part", "thesis.tex"],
    "work": [
        "mds.partial-2/x", "mds.old/x", "wds2/shard-000000.tar", "lossless/x", "labels/x", "data/x", "chunks/x",
        "run.zarr.new/x", ".run.zarr.new/x", "run.zarr.old/x", ".table.csv.new", ".page.html.part", "page.html.bak",
    ],
}  # fmt: skip

COMMANDS = """
from pathlib import Path
import torch
from infobatch_stream import IndexedWebDataset, InfoBatchLoader, StreamedWebDataset
from infobatch_stream.tools.app import app
from infobatch_stream.convert import write_shards

def run(*arguments, status=0):
    try:
        found = app([str(one) for one in arguments], standalone_mode=False) or 0
    except SystemExit as error:
        found = error.code
    assert found == status, (arguments, found)

if __name__ == "__main__":
    run("convert", "pictures", "mds", "--format", "mds", "--workers", 2, "--resize", 8)
    run("convert", "pictures", "wds", "--format", "wds")
    run("convert", "pictures", "wds", "--format", "wds", "--overwrite", "--seed", 1)
    run("convert", "damaged", "bad", "--format", "wds", status=1)
    run("convert", "damaged", "bad", "--format", "wds", "--shard-samples", 2, "--no-shuffle", status=1)
    run("convert", "damaged", "bad", "--format", "wds", "--shard-samples", 2, "--no-shuffle",
        "--resume", "--on-error", "skip")
    run("verify", "mds", "wds", "--decode")
    for index in Path("bad").glob("*.npz"):
        index.unlink()
    run("index", "bad")
    streamed = StreamedWebDataset("packed.tgz", cache_limit="1gb")
    assert len(streamed) == 1 and streamed[0]
    loader = InfoBatchLoader(IndexedWebDataset("wds"), "run.zarr", batch_size=4, epochs=3, collate_fn=list)
    for _ in range(3):
        for batch, picks in loader:
            loader.update(torch.rand(len(picks)), picks)
    run("inspect", "run.zarr")
    run("simulate", "run.zarr")
    run("report", "run.zarr", "--dataset", "wds", "--out", "page.html")
    run("export", "run.zarr", "--out", "table.csv")
    run("demo", "--epochs", 2, "--seeds", 1, "--out", "demo.png")
"""
MADE = {"mds", "wds", "bad", "run.zarr", "page.html", "table.csv", "demo.png"}

BENCHMARKS = """
import sys
from pathlib import Path
from benchmarks.__main__ import _measure, write_page

if __name__ == "__main__":
    for name in sys.argv[1:]:
        _measure(name, True, Path("out"))
    write_page(Path("out"))
"""


@pytest.fixture
def user():
    """Folders of a user, full of canaries, with a short name, for sockets."""
    with tempfile.TemporaryDirectory() as parent:
        for folder, files in CANARIES.items():
            for file in files:
                place = Path(parent, "user", folder, file)
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_text(f"precious {file}")
        yield Path(parent, "user")


@pytest.fixture
def running():
    """The shared memory by which a StreamingDataset of another program is known; its name."""
    clean_stale_shared_memory()
    place, text = Path("/dev/shm/000000_locals"), b"/of/another/program\x000"
    place.write_bytes(np.int32(4 + len(text)).tobytes() + text)
    yield place
    place.unlink(missing_ok=True)


def state(folder):
    """Path below ``folder`` -> content (None for a folder), and time of modification."""
    return {
        str(path.relative_to(folder)): (path.read_bytes() if path.is_file() else None, path.lstat().st_mtime_ns)
        for path in folder.rglob("*")
        if not path.is_dir()
    }


def run_watched(code, user, *arguments):
    """Run ``code`` as this user, in the folder work. Raises AssertionError if it changes what it did not make."""
    before, log = state(user), user.parent / "log"
    script = user.parent / "script.py"
    script.write_text(textwrap.dedent(code))
    environment = {
        **os.environ, "HOME": str(user / "home"), "TMPDIR": str(user / "tmp"), "XDG_CACHE_HOME": str(user / "cache"),
        "WATCH_LOG": str(log), "PYTHONPATH": os.pathsep.join([str(WATCH), str(ROOT)]), "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, script, *arguments], cwd=user / "work", env=environment, capture_output=True, text=True,
        timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    after = state(user)
    assert {path: after.get(path) for path in before} == before
    changed, made = [], set()
    for line in log.read_text(errors="surrogateescape").splitlines():
        what, _, path = line.partition("\t")
        known = path in made or any(str(folder) in made for folder in Path(path).parents)
        if what == "made":
            made.add(path)
        elif not known and not path.startswith(("/dev/", "/proc/")):
            changed.append(path)
    assert changed == []
    outside = [path for path in made if not path.startswith((str(user), "/dev/shm/"))]
    assert outside == []
    return {path for path in after if path not in before}


def test_the_commands_touch_nothing_that_they_did_not_make(user, running):
    for number in range(12):
        noise = np.random.default_rng(number).integers(0, 255, (12, 12, 3), np.uint8)
        for source in ("pictures", "damaged"):
            folder = user / "work" / source / ("a" if number < 6 else "b")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise).save(folder / f"{number:02}.png")
    (user / "work/damaged/b/99.png").touch()
    pack(user / "work/packed.tgz", user / "work/pictures/a")
    new = run_watched(COMMANDS, user)
    assert running.exists()
    assert {Path(path).parts[1] for path in new if path.startswith("work/")} == MADE
    assert {Path(path).parts[0] for path in new} == {"work", "cache"}  # nothing stays in TMPDIR and HOME


def pack(place, folder):
    import tarfile

    with tarfile.open(place, "w:gz") as tar:
        tar.add(sorted(folder.iterdir())[0], "0.png")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_a_benchmark_touches_nothing_that_it_did_not_make(name, user):
    new = run_watched(BENCHMARKS, user, name)
    assert {Path(path).parts[:2] for path in new if path.startswith("work/")} == {("work", "out")}
    assert {Path(path).parts[0] for path in new} <= {"work", "cache"}


def test_litdata_keeps_its_caches_in_the_folder_of_the_benchmark(user, tmp_path):
    """LitData empties its caches, by default TMPDIR/data and TMPDIR/chunks; where it is missing one stands for it."""
    stand_in = tmp_path / "lib"
    (stand_in / "litdata").mkdir(parents=True)
    (stand_in / "litdata/__init__.py").write_text(
        textwrap.dedent("""
            import os, shutil, tempfile
            from pathlib import Path

            def optimize(fn, inputs, output_dir, **_):
                for name, default in (("CACHE", "chunks"), ("DATA_CACHE", "data")):
                    folder = os.getenv(f"DATA_OPTIMIZER_{name}_FOLDER", f"{tempfile.gettempdir()}/{default}")
                    shutil.rmtree(folder, ignore_errors=True)
                    os.makedirs(folder)
                Path(output_dir, "chunk-0-0.bin").write_bytes(b"".join(map(fn, inputs)))
        """)
    )
    code = f"""
    import importlib.util, sys
    from pathlib import Path
    if importlib.util.find_spec("litdata") is None:
        sys.path.append({str(stand_in)!r})
    from benchmarks.shards import SMALL, TINY, write
    if __name__ == "__main__":
        write("litdata", TINY[SMALL], Path("out").resolve())
    """
    (user / "work/out").mkdir()
    new = run_watched(code, user)
    assert "work/out/litdata-800x600/chunk-0-0.bin" in new
    assert {Path(path).parts[:3] for path in new} == {("work", "out", "litdata-800x600")}


def test_a_program_that_touches_a_canary_is_noticed(user):
    """Else the tests above would say nothing."""
    for code in (
        "import shutil; shutil.rmtree('data')",
        "import os; os.remove('wds2/shard-000000.tar')",
        "open('lossless/x', 'a').close()",
        "import os; os.rename('data', 'data2'); os.rename('data2', 'data')",
        "from pathlib import Path; Path('../../elsewhere').write_text('')",
    ):
        with pytest.raises(AssertionError):
            run_watched(code, user)
        for file in CANARIES["work"]:
            (user / "work" / file).parent.mkdir(exist_ok=True)
            (user / "work" / file).write_text(f"precious {file}")
        (user.parent / "log").unlink()


def test_the_log_tells_of_processes_that_are_started(user):
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'open(\"data/x\", \"a\")'], check=True)"
    with pytest.raises(AssertionError):
        run_watched(code, user)
    assert json.dumps(str(user / "work/data/x"))[1:-1] in (user.parent / "log").read_text()
