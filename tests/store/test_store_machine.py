"""The score store against two arrays and a number, through any sequence of moves; a process may die in each."""

import shutil
import signal
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import zarr
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from support.killed import in_a_fork, killed_at

from infobatch_stream.store import header, layout, mapped_array
from infobatch_stream.store import score_store as store
from infobatch_stream.store.header import read_header
from infobatch_stream.store.score_store import ScoreStore

SIZE = 7
TRACED = {module.__file__ for module in (header, layout, mapped_array, store)}
READS = {"_check_depth", "_once", "_whole", "_found_array", "_expected_array", "<listcomp>", "<dictcomp>", "<genexpr>"}
# Python's own warning that forking a process with threads is risky; the child here runs nothing but the store.
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

which = st.integers(0, 1)
batches = st.lists(st.tuples(st.integers(0, SIZE - 1), st.floats(width=32)), max_size=5)
# A commit runs through some 220 lines, an open that repairs through 550; beyond, the child comes to its end.
commit_lines, open_lines = st.integers(0, 250), st.integers(0, 600)


def same(one, two):
    np.testing.assert_array_equal(np.asarray(one), np.asarray(two))


def arrays(batch):
    return np.array([i for i, _ in batch], np.int64), np.array([loss for _, loss in batch], np.float32)


def die_at(line, act):
    """Run ``act`` in a forked child that is killed before its ``line``-th line of the store; -> whether it ended."""

    def child():
        mapped_array._BLOCK = 4  # so that there is a middle to die in
        killed_at(line, act, TRACED, READS)

    status = in_a_fork(child)
    assert status in (0, signal.SIGKILL)
    return status == 0


class Machine(RuleBasedStateMachine):
    """Two open stores on one path, as two ranks have them."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "scores.zarr"
        self.handles = [ScoreStore.create(self.path, SIZE), ScoreStore.open(self.path)]
        self.scores, self.pending = (np.full(SIZE, np.nan, np.float32) for _ in range(2))
        self.epoch = 0

    def model_record(self, batch):
        for i, loss in batch:
            if np.isfinite(loss):
                self.pending[i] = loss

    def model_commit(self):
        self.scores = np.where(np.isnan(self.pending), self.scores, self.pending)
        self.pending[:] = np.nan
        self.epoch += 1

    def open_again(self):
        self.handles = [ScoreStore.open(self.path) for _ in self.handles]

    @rule(which=which, batch=batches)
    def record(self, which, batch):
        index, losses = arrays(batch)
        assert self.handles[which].record(index, losses) == np.count_nonzero(~np.isfinite(losses))
        self.model_record(batch)

    @rule(which=which)
    def commit(self, which):
        self.handles[which].commit()
        self.handles[1 - which].refresh()
        self.model_commit()

    @rule(which=which, mode=st.sampled_from(["r", "r+"]))
    def reopen(self, which, mode):
        same(ScoreStore.open(self.path, mode).scores, self.scores)
        self.handles[which] = ScoreStore.open(self.path)

    @rule(which=which)
    def discard(self, which):
        self.handles[which].discard_pending()
        self.pending[:] = np.nan

    @rule(which=which, line=commit_lines, repairs=st.lists(open_lines, max_size=2))
    def die_in_a_commit_and_in_the_opens_that_repair_it(self, which, line, repairs):
        ended = die_at(line, self.handles[which].commit)
        for at in repairs:
            die_at(at, lambda: ScoreStore.open(self.path))
        self.open_again()
        assert self.handles[0].epoch in ([self.epoch + 1] if ended else [self.epoch, self.epoch + 1])
        if self.handles[0].epoch > self.epoch:
            self.model_commit()

    @rule(which=which, line=st.integers(0, 25), batch=batches)
    def die_in_a_record(self, which, line, batch):
        ended = die_at(line, lambda: self.handles[which].record(*arrays(batch)))
        before = self.pending.copy()
        self.model_record(batch)
        self.open_again()
        if not ended and np.array_equal(self.handles[0].pending, before, equal_nan=True):
            self.pending = before

    @rule(which=which, line=st.integers(0, 25))
    def die_in_a_discard(self, which, line):
        ended = die_at(line, self.handles[which].discard_pending)
        self.open_again()
        left = np.array(self.handles[0].pending)
        assert np.all(np.isnan(left) | (left == self.pending))  # as recorded, or forgotten
        assert not ended or np.isnan(left).all()
        self.pending = left

    @invariant()
    def both_show_the_model(self):
        for handle in self.handles:
            same(handle.scores, self.scores)
            same(handle.pending, self.pending)
            assert handle.epoch == self.epoch
        assert read_header(self.path).state == "ready"

    def teardown(self):
        group = zarr.open_group(self.path, mode="r", zarr_format=3)
        same(group["scores"][:], self.scores)
        same(group["pending"][:], self.pending)
        shutil.rmtree(self.folder)


TestMachine = forks(Machine.TestCase)
TestMachine.settings = settings(deadline=None, max_examples=20, stateful_step_count=12, derandomize=True)
