"""Examples, run as a user runs them."""

import subprocess
import sys

import torch

from support.ddp.launch import environment
from support.paths import ROOT

EXAMPLES = ROOT / "examples"


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


SECONDS = 400


def command(*options, processes=1, script=EXAMPLES / "cifar.py"):
    run = [*TORCHRUN, processes, script] if processes > 1 else [script]
    return [str(part) for part in (sys.executable, *run, *options)]


def run(options, cwd, processes=1, script=EXAMPLES / "cifar.py"):
    """What it prints."""
    done = subprocess.run(
        command(*options, processes=processes, script=script),
        cwd=cwd, env=environment(), capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)
