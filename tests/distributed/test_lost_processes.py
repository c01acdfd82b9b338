"""Ranks that leave or stop, and workers that the system kills: the others end with an error that says what to do."""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from support.ddp import victims
from support.ddp.children import Child, members
from support.ddp.launch import HERE, environment
from support.ddp.victims import finish, loader_of, losses

from infobatch_stream import InfoBatchLoader, ScoreStore

WAYS = ("raises", "exits", "killed", "stuck")
TIMEOUT = 6  # seconds that the process group waits
RUN = ["-m", "torch.distributed.run", "--standalone", "--max-restarts", "0", "--nproc-per-node", "2"]


def check_store(path, left=16):
    """Whole, with the scores of the first epoch, and what was recorded in the second; and it can be continued."""
    store = ScoreStore.open(path, "r")
    assert store.epoch == 1
    assert np.array_equal(store.scores, losses(0))
    seen = np.flatnonzero(np.isfinite(store.pending))
    assert seen.size >= left
    assert np.array_equal(store.pending[seen], losses(1, seen))
    loader = loader_of(path, existing="continue")
    assert loader.epoch == 1
    finish(loader)


# ---- ranks


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory):
    """By way in which the other rank went: the store, what the first rank raised, and after how many seconds."""
    folder = tmp_path_factory.mktemp("ranks")
    started, found = {}, {}
    try:
        for way in WAYS:
            path = folder / way / "scores.zarr"
            pair = [Child(victims.faulty_rank, path, rank, way, TIMEOUT) for rank in (0, 1)]
            started[way] = path, pair
            pair[1].tell(pair[0].hears())
        for way, (path, (first, second)) in started.items():
            error, seconds = first.result()
            if way == "stuck":
                assert second.hears() == "stuck"
                second.tell()
                assert second.result()[0] is not None
            second.ends()
            found[way] = path, error, seconds
    finally:
        for _, pair in started.values():
            for child in pair:
                child.__exit__()
    return found


@pytest.mark.parametrize("way", WAYS)
def test_when_one_rank_goes_the_other_ends_in_time_with_an_error_and_the_store_is_whole(left_alone, way):
    path, (error, text, _), seconds = left_alone[way]
    assert error == "LostRanksError"
    for words in ("the other ranks cannot be reached", "first error among them", "whose committed scores are whole"):
        assert words in text
    assert seconds < TIMEOUT + 20
    check_store(path)


def launch(path, way):
    """Under torchrun; -> (exit code, output, seconds). Nothing of it is left."""
    begin = time.monotonic()
    with subprocess.Popen(
        [sys.executable, *RUN, HERE / "victims.py", path, way],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**environment(), "TMPDIR": str(path.parent)},
        start_new_session=True,
    ) as agent:
        try:
            output, _ = agent.communicate(timeout=90)
            assert members(agent.pid) == []
        finally:
            if members(agent.pid):
                os.killpg(agent.pid, signal.SIGKILL)
    return agent.returncode, output, time.monotonic() - begin


@pytest.mark.ddp
def test_under_torchrun_a_rank_that_raises_ends_the_run(tmp_path):
    code, output, _ = launch(tmp_path / "scores.zarr", "raises")
    assert code == 1
    assert "KeyError: 'mine'" in output
    check_store(tmp_path / "scores.zarr")


@pytest.mark.ddp
@pytest.mark.slow(short="test_under_torchrun_a_rank_that_raises_ends_the_run")
def test_under_torchrun_a_rank_that_leaves_early_ends_the_run(tmp_path):
    code, output, _ = launch(tmp_path / "scores.zarr", "exits")
    assert code == 1
    assert "LostRanksError" in output
    check_store(tmp_path / "scores.zarr")


# ---- workers


LOSSES = [(where, persistent) for where in ("next batch", "user code") for persistent in (False, True)]


@pytest.fixture(scope="module")
def robbed(tmp_path_factory):
    """What `victims.lose_a_worker` found, by where it happened and whether workers persist."""
    folder = tmp_path_factory.mktemp("workers")
    runs = {}
    try:
        for where, persistent in LOSSES:
            path, options = folder / f"{where} {persistent}.zarr", {"persistent_workers": persistent}
            runs[where, persistent] = Child(victims.lose_a_worker, path, options, where)
        found = {case: run.result() for case, run in runs.items()}
        assert [members(run.pid) for run in runs.values()] == [[]] * len(LOSSES)
    finally:
        for run in runs.values():
            run.__exit__()
    return found


@pytest.mark.parametrize(("where", "persistent"), LOSSES)
def test_a_worker_that_is_killed_is_an_error_that_says_what_to_do_and_the_loader_goes_on(robbed, where, persistent):
    (error, text, notes), (epoch, step, committed), epochs = robbed[where, persistent]
    if error == "RuntimeError":  # torch's own
        assert re.match(r"DataLoader worker \(pid.*(killed by signal|exited unexpectedly)", text)
    else:  # of the batches that were under way
        assert where == "next batch"
        assert error in {"ConnectionResetError", "ConnectionRefusedError", "FileNotFoundError", "EOFError"}
    (note,) = notes
    for words in (
        "lack of memory (see dmesg)",
        "num_workers",
        "prefetch_factor",
        "state_dict()",
        "existing='continue'",
    ):
        assert words in note
    assert (epoch, committed) == (0, 0)
    assert step >= 3
    assert epochs == 2


class Unreadable(victims.Numbers):
    def __getitems__(self, indices):
        raise OSError("rotten")


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # Python's own
def test_an_error_of_the_dataset_is_not_taken_for_a_lost_worker(tmp_path):
    loader = InfoBatchLoader(Unreadable(8), tmp_path / "scores.zarr", batch_size=4, epochs=1, **victims.FORKED)
    with pytest.raises(OSError, match="rotten") as caught:
        next(iter(loader))
    assert not hasattr(caught.value, "__notes__")
