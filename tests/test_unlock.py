"""A killed run's local folders are freed by ``unlock``, and those of living runs are not."""

import os
import signal
import subprocess
import sys
from multiprocessing import get_context

import pytest
from ddp_scripts.launch import environment
from streaming import StreamingDataset
from typer.testing import CliRunner

from infobatch_stream import ConfigError, InfoBatchLoader
from infobatch_stream.sources.mds_stale import remove_stale_memory
from infobatch_stream.tools.cli import app

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
    done = CliRunner().invoke(app, ["unlock"])
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
    removed, kept = remove_stale_memory(tmp_path)
    assert [state.folders for state in removed] == [()]
    assert kept == []
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(names)


def test_where_nothing_tells_what_is_in_use_nothing_is_removed(tmp_path):
    with pytest.raises(ConfigError, match="clean_stale_shared_memory"):
        remove_stale_memory(tmp_path / "none")
