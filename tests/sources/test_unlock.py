"""A killed run's local folders are freed by ``unlock``, and those of living runs are not."""

import mmap
import os
import signal
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path

import pytest
from streaming import StreamingDataset
from streaming.base.shared.prefix import _pack_locals
from support.ddp.launch import environment
from typer.testing import CliRunner

from infobatch_stream import ConfigError, InfoBatchLoader
from infobatch_stream.sources.mds import stale_memory as mds_stale
from infobatch_stream.sources.mds.stale_memory import remove_stale_memory
from infobatch_stream.tools.app import app

pytestmark = [
    pytest.mark.usefixtures("no_stale_shared_memory", "few_open_files"),
    # Python's own warning that forking a process with threads is risky
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]
RUN = """
import sys, time
from streaming import StreamingDataset
dataset = StreamingDataset(remote=sys.argv[1], local=sys.argv[2])
print("begun", flush=True)
time.sleep(600)
"""


@pytest.fixture
def run(shards, tmp_path):
    """A process with a dataset in the folder "cache", of which all shards are there."""
    subprocess.run(["cp", "-r", shards, tmp_path / "cache"], check=True)
    with subprocess.Popen(
        [sys.executable, "-c", RUN, shards, tmp_path / "cache"],
        env=environment(),
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        assert process.stdout.readline() == b"begun\n"
        yield process
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def unlock(folder):
    """What the command says of ``folder``."""
    done = CliRunner().invoke(app, ["unlock", "--not-shared"])  # the tests themselves may be in a container
    assert done.exit_code == 0
    return [line for line in done.stdout.splitlines() if str(folder) in line]


def fails(shards, folder):
    """In a process of its own, which else would have the memory open from then on: streaming opens what it looks at."""

    def make():
        with pytest.raises(ValueError, match="Reused local directory"):
            StreamingDataset(remote=shards, local=str(folder))
        os._exit(7)

    child = get_context("fork").Process(target=make)
    child.start()
    child.join(60)
    return child.exitcode == 7


def test_the_folder_of_a_killed_run_is_freed_but_not_that_of_a_living_one(run, shards, tmp_path):
    folder = tmp_path / "cache"
    [line] = unlock(folder)
    assert line.startswith(f"in use: {folder}, by process {run.pid} ({sys.executable} -c")
    assert fails(shards, folder)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert fails(shards, folder)  # what a user meets
    assert unlock(folder) == [f"free: {folder}"]
    assert unlock(folder) == []
    loader = InfoBatchLoader(
        StreamingDataset(remote=shards, local=str(folder)), tmp_path / "scores.zarr", batch_size=8, epochs=1
    )
    assert len(list(loader)) == 6
    [line] = unlock(folder)
    assert line.startswith(f"in use: {folder}, by process {os.getpid()} ")
    (tmp_path / "link").symlink_to(folder)
    assert len(StreamingDataset(remote=shards, local=str(tmp_path / "link"))) == 48  # the other way out


def test_other_shared_memory_stays(tmp_path):
    names = ["psm_0a1b2c", "000000_mine", "00000_locals", "000000_locals.bak", "torch_1_2_3"]
    for name in [*names, "000007_locals", "000007_shard_states"]:
        (tmp_path / name).write_bytes(b"\4\0\0\0")
    removed, kept = remove_stale_memory(tmp_path, not_shared=True)
    assert [state.folders for state in removed] == [()]
    assert kept == []
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(names)


def test_where_nothing_tells_what_is_in_use_nothing_is_removed(tmp_path):
    with pytest.raises(ConfigError, match="clean_stale_shared_memory"):
        remove_stale_memory(tmp_path / "none")


# ---- containers

IN_A_CONTAINER = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
UNLOCK = """
import sys
from pathlib import Path
from infobatch_stream.sources.mds.stale_memory import remove_stale_memory
print(remove_stale_memory(Path(sys.argv[1]), not_shared=len(sys.argv) > 2))
"""


@pytest.fixture
def used_elsewhere(tmp_path):
    """A folder of shared memory that this process has open, and others may see."""
    folder = tmp_path / "shm"
    folder.mkdir()
    (folder / "123456_locals").write_bytes(_pack_locals(["/cache"], 123456))
    with (folder / "123456_locals").open("r+b") as file, mmap.mmap(file.fileno(), 0):
        yield folder


def test_in_a_container_nothing_is_removed_that_others_may_use(used_elsewhere):
    if subprocess.run([*IN_A_CONTAINER, "true"], check=False, capture_output=True).returncode:
        pytest.skip("namespaces are not permitted here")

    def unlock_in_a_container(*arguments):
        return subprocess.run(
            [*IN_A_CONTAINER, sys.executable, "-c", UNLOCK, used_elsewhere, *arguments],
            check=False,
            capture_output=True,
            text=True,
            env=environment(),
        )

    done = unlock_in_a_container()
    assert "ConfigError: this process is in a container" in done.stderr
    assert "No process in here uses /cache." in done.stderr
    assert list(used_elsewhere.iterdir())
    assert unlock_in_a_container("not shared").returncode == 0
    assert not list(used_elsewhere.iterdir())


def test_in_a_container_too_what_is_in_use_is_told(used_elsewhere, monkeypatch):
    monkeypatch.setattr(mds_stale, "_sees_all", lambda processes: False)
    removed, [state] = remove_stale_memory(used_elsewhere)
    assert (removed, state.folders, state.processes) == ([], ("/cache",), (os.getpid(),))


def test_the_command_tells_of_the_option(run, tmp_path, monkeypatch):
    monkeypatch.setattr(mds_stale, "_sees_all", lambda processes: False)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    done = CliRunner().invoke(app, ["unlock"])
    assert done.exit_code == 1
    assert "infobatch-stream unlock --not-shared" in " ".join(done.output.split())
    assert unlock(tmp_path / "cache") == [f"free: {tmp_path / 'cache'}"]


def test_memory_that_vanishes_meanwhile_is_passed_over(tmp_path, monkeypatch):
    for name in ("000007_locals", "000008_locals", "000008_barrier"):
        (tmp_path / name).write_bytes(b"\4\0\0\0")
    listed = sorted(tmp_path.iterdir())
    (tmp_path / "000007_locals").unlink()
    (tmp_path / "000008_barrier").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(
            Path, "iterdir", lambda path, original=Path.iterdir: listed if path == tmp_path else original(path)
        )
        removed, kept = remove_stale_memory(tmp_path, not_shared=True)
    assert (len(removed), kept, list(tmp_path.iterdir())) == (1, [], [])
