"""A run that is told to end, by the system or by Ctrl-C: what was recorded is in the store, nothing else stays."""

import random
import signal
from itertools import chain

import numpy as np
import pytest
from support.ddp import victims
from support.ddp.children import Child, members, shared_memory, until
from support.ddp.victims import FORKED, losses

from infobatch_stream import ScoreStore

SIZE = 4_000  # of which an epoch takes 500 steps, long enough to be hit in
PERSISTENT = {**FORKED, "persistent_workers": True}

# How the run is written, its options, the signal, whether its workers get it too (as from Ctrl-C), the exit code.
ENDS = {
    "SIGTERM": ("plain", FORKED, signal.SIGTERM, False, -signal.SIGTERM),
    "SIGTERM to all": ("with", PERSISTENT, signal.SIGTERM, True, -signal.SIGTERM),
    "SIGTERM with a handler": ("handler", PERSISTENT, signal.SIGTERM, False, 3),
    "Ctrl-C": ("plain", PERSISTENT, signal.SIGINT, True, 1),
    "Ctrl-C in a with": ("with", FORKED, signal.SIGINT, True, 1),
    "SIGINT without workers": ("with", {}, signal.SIGINT, False, 1),
    "SIGINT with threads": ("with", {"num_threads": 2}, signal.SIGINT, False, 1),
    "SIGTERM with threads": ("plain", {"num_threads": 2}, signal.SIGTERM, False, -signal.SIGTERM),
    "SIGKILL": ("with", PERSISTENT, signal.SIGKILL, False, -signal.SIGKILL),
    "SIGHUP": ("plain", {}, signal.SIGHUP, True, -signal.SIGHUP),
}


def listen(run, steps):
    """The words of so many steps; -> (those, the processes of the run)."""
    words, pids = [], []
    while sum(kind == "done" for kind, _ in words) < steps:
        words.append(run.hears())
        pids += (words[-1][1] or []) if words[-1][0] == "done" else []
    return words, pids


def check_pending(path, words):
    """Every loss of the steps that were updated is there; of the one under way, each is or is not."""
    done = sum(kind == "done" for kind, _ in words)
    begun = [index for kind, index in words if kind == "begin"]
    assert len(begun) - done in (0, 1)
    store = ScoreStore.open(path, "r")
    assert store.epoch == 0
    assert np.isnan(store.scores).all()
    updated = np.array([*chain(*begun[:done])], np.int64)
    pending = np.array(store.pending)
    assert np.array_equal(pending[updated], losses(0, updated))
    pending[updated] = np.nan
    under_way = np.array([*chain(*begun[done:])], np.int64)
    left = pending[under_way]
    assert np.all(np.isnan(left) | (left == losses(0, under_way)))
    pending[under_way] = np.nan
    assert np.isnan(pending).all()
    return updated.size, int(np.isfinite(left).sum())


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """All the runs at once, each hit at a random moment: by name (path, words, exit code, its processes)."""
    folder = tmp_path_factory.mktemp("signals")
    moments = random.Random(7)
    found, runs = {}, {}
    try:
        for name, (within, options, *_) in ENDS.items():
            path = folder / name / "scores.zarr"
            runs[name] = path, Child(victims.long_epoch, path, SIZE, within, options)
        for name, (_, _, number, group, _) in ENDS.items():
            path, run = runs[name]
            words, pids = listen(run, moments.randint(1, 150))
            run.signal(number, group=group)
            words += run.heard()
            found[name] = path, words, run.ends(20), [run.pid, *pids]
            until(lambda run=run: not members(run.pid), 30)  # torch's workers look for their parent every five seconds
    finally:
        for _, run in runs.values():
            run.__exit__()
    return found


@pytest.mark.parametrize("name", ENDS)
def test_a_run_that_is_told_to_end_does_so_soon_with_its_losses_kept_and_can_be_continued(ended, name):
    path, words, code, pids = ended[name]
    assert code == ENDS[name][-1]
    assert len(pids) == 1 + (ENDS[name][1].get("num_workers", 0) + 1)
    assert shared_memory(pids) == []
    updated, under_way = check_pending(path, words)
    assert 0 < updated < SIZE
    with Child(victims.go_on, path, {"size": SIZE, "epochs": 1}) as run:
        assert run.result() == (0, updated + under_way)
    store = ScoreStore.open(path, "r")
    assert store.epoch == 1
    assert np.array_equal(store.scores, losses(0, SIZE))
