"""Starting processes from a test, and what each of them runs."""

import os
import subprocess
import sys
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch

HERE = Path(__file__).parent
SECONDS = 60  # after which a run is taken to hang


def environment():
    """This process's, with the tests importable and all warnings but those of other libraries shown."""
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}


def start(script, *args, seconds=SECONDS):
    """Run one process of ``script``."""
    _run([sys.executable, HERE / script, *map(str, args)], seconds)


def torchrun(script, *args, processes=2, seconds=SECONDS):
    """Run ``script`` in several processes."""
    run = ["-m", "torch.distributed.run", "--standalone", "--max-restarts", "0", "--nproc-per-node"]
    _run([sys.executable, *run, str(processes), HERE / script, *map(str, args)], seconds)


def _run(command, seconds):
    # In a session of their own, so that all are gone when one of them hangs.
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            output, _ = process.communicate()
            raise AssertionError(f"hung for {seconds} s:\n{output}") from None
    assert process.returncode == 0, output


@contextmanager
def process_group(seconds=30):
    """In a process that torchrun started: (rank, world size). Waiting for others ends with an error in time."""
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=seconds))
    yield torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.distributed.barrier()  # whoever is first would take the others' connections away
    torch.distributed.destroy_process_group()  # without it, gloo's threads may abort the process at its end
