"""Two runs on one store: the second is refused, as long as any process of the first lives, and no longer."""

import code
import errno
import fcntl
import gc
import io
import json
import os
import signal
import socket
from contextlib import ExitStack, redirect_stderr

import numpy as np
import pytest
import torch
from support.ddp import victims
from support.ddp.children import Child, members
from support.ddp.victims import FORKED, N, finish, loader_of, train

from infobatch_stream import ScoreStore, StoreError
from infobatch_stream._platform import kernel
from infobatch_stream.store.run_lock import RunLock

LATER = [{"existing": "continue"}, {"existing": "overwrite"}, {}]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "scores.zarr"


def refusal(path, **options):
    with pytest.raises(StoreError, match="is in use") as caught:
        iter(loader_of(path, **options))
    return str(caught.value)


def goes_on(path):
    """Whether another process may train on the store now."""
    loader = loader_of(path, existing="continue")
    train(loader, loader.step + 1)
    return loader.step > 0


# ---- the second run


def test_a_second_run_is_refused_with_host_and_pid_of_the_first_and_changes_nothing(path):
    with Child(victims.hold, path, {}) as first:
        first.hears()
        before = np.array(ScoreStore.open(path, "r").pending)
        for options in LATER:
            text = refusal(path, **options)
            assert f"process {first.pid} on {socket.gethostname()} trains with it since 20" in text
            assert "give this one a store of its own, or end that one" in text
        state = loader_of(path.with_name("other.zarr")).state_dict()
        with pytest.raises(StoreError, match=f"process {first.pid} on"):
            loader_of(path).load_state_dict(state)
        assert np.array_equal(ScoreStore.open(path, "r").pending, before, equal_nan=True)
        first.tell()
        assert first.result() is None
    assert goes_on(path)


def test_a_run_that_was_killed_holds_nothing_even_if_its_workers_live(path):
    with Child(victims.hold, path, {**FORKED, "persistent_workers": True}) as first:
        workers = [pid for pid in first.hears() if pid != first.pid]
        assert len(workers) == 2
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)  # so that they do live when it is gone
        assert "is in use" in refusal(path)
        first.signal(signal.SIGKILL)
        assert first.ends() == -signal.SIGKILL
        assert set(workers) <= set(members(first.pid))
        assert goes_on(path)


@pytest.mark.parametrize("how", ["fork", "subprocess"])
def test_what_a_script_starts_and_leaves_behind_does_not_hold_the_store(path, how):
    with Child(victims.hold_with_a_child, path, how) as first:
        other = first.hears()
        assert "is in use" in refusal(path)
        first.signal(signal.SIGKILL)
        first.ends()
        assert other in members(first.pid)
        assert goes_on(path)


def test_a_forked_process_with_a_loader_of_its_own_is_another_run(path):
    with Child(victims.fork_and_use, path) as first:
        error, text, _ = first.hears()
        assert error == "StoreError"
        assert f"process {first.pid} on" in text
        first.result()


def two_ranks(act, *arguments):
    ranks = Child(act, arguments[0], 0, *arguments[1:]), Child(act, arguments[0], 1, *arguments[1:])
    ranks[1].tell(ranks[0].hears())
    return ranks


def test_another_rank_of_a_dead_run_that_still_lives_holds_the_store_and_is_told_of(path):
    first, second = two_ranks(victims.hold_by_two, path)
    with first, second:
        for rank in (first, second):
            assert rank.hears() == "holds"
        assert f"process {first.pid} on" in refusal(path)
        first.signal(signal.SIGKILL)
        first.ends()
        text = refusal(path, existing="continue")
        assert f"process {first.pid} on {socket.gethostname()}, which began at" in text
        assert "is gone, but other processes of its run are still there" in text
        assert "end that one (all of its processes)" in text
        second.signal(signal.SIGKILL)
        second.ends()
        assert goes_on(path)


# ---- the same run


@pytest.mark.parametrize("existing", ["continue", "overwrite"])
def test_a_cell_that_is_run_again_gets_the_store_while_the_old_loader_lives(path, existing):
    old = loader_of(path)
    train(old)
    train(old, 1)
    new = loader_of(path, existing=existing)
    assert new.epoch == (existing == "continue")
    finish(new)
    assert new.epoch == 5
    with pytest.raises(StoreError, match=r"another loader of this process|replaced by another program"):
        old.commit()
    del old
    gc.collect()
    assert "is in use" in error_of_another(path)  # the new loader's hold is its own


def error_of_another(path):
    with Child(victims.go_on, path, {}) as other:
        return other.hears()[1][1]


@pytest.mark.parametrize("existing", ["continue", "overwrite"])
def test_under_ddp_a_second_loader_gets_the_store_while_one_rank_has_the_first(path, existing):
    ranks = two_ranks(victims.two_loaders, path, existing)
    with ranks[0], ranks[1]:
        (began, epoch, _), (_, _, old) = [rank.result() for rank in ranks]
    assert began == (1 if existing == "continue" else None)
    assert epoch == 5
    assert (old is None) == (existing == "continue")  # its scores are those of a file that is gone
    assert ScoreStore.open(path).epoch == 5


# ---- two loaders of one process


def test_a_loader_is_refused_while_another_of_the_process_is_in_an_epoch_with_the_store(path):
    first = loader_of(path)
    batches = iter(first)
    _, picks = next(batches)
    first.update(torch.ones(8), picks)
    for options in LATER:
        with pytest.raises(StoreError, match="in use: another loader of this process is in the midst of an epoch"):
            iter(loader_of(path, **options))
    for _, picks in batches:
        first.update(torch.ones(8), picks)
    first.commit()
    assert np.isfinite(ScoreStore.open(path, "r").scores).all()


def test_an_iterator_that_is_kept_when_its_epoch_is_committed_is_in_nobodys_way(path):
    first = loader_of(path)
    batches = iter(first)
    for _ in range(len(first)):
        _, picks = next(batches)  # never asked for one more
        first.update(torch.ones(8), picks)
    first.commit()
    finish(loader_of(path, existing="continue"))


def test_after_an_error_in_a_notebook_the_same_lines_work_the_second_time(path):
    console = code.InteractiveConsole({"loader_of": loader_of, "path": path})
    with redirect_stderr(io.StringIO()) as said:
        for line in (
            "def train(loader):\n    batches = iter(loader)\n    next(batches)\n    raise MemoryError\n",
            "train(loader_of(path))",
            "loader = loader_of(path, existing='overwrite'); first = iter(loader)",
            "loader = loader_of(path, existing='overwrite'); second = iter(loader)",
        ):
            console.push(line) if "\n" not in line else console.runsource(line, symbol="exec")
    assert "MemoryError" in said.getvalue()
    assert "there run this again" in said.getvalue()
    assert "second" in console.locals


def test_a_loader_whose_store_another_of_the_process_has_taken_over_is_refused_at_its_next_start_and_update(path):
    first = loader_of(path)
    for _, last in first:
        first.update(torch.ones(8), last)
    second = loader_of(path, existing="continue")
    for start in (lambda: iter(first), lambda: first.update(torch.zeros(8), last), first.commit, first.state_dict):
        with pytest.raises(
            StoreError, match=r"another loader of this process has begun .* give each a store of its own"
        ):
            start()
    assert (second.store.pending == 1).all()
    finish(second)


def test_a_state_is_loaded_in_the_midst_of_an_epoch(path):
    loader = loader_of(path)
    batches = iter(loader)
    next(batches)
    loader.load_state_dict(loader_of(path.with_name("other.zarr")).state_dict())
    finish(loader)
    assert loader.epoch == 5


@pytest.mark.parametrize("options", [{}, {"existing": "continue"}, {"existing": "overwrite"}], ids=str)
def test_of_runs_that_begin_at_the_same_moment_one_trains_and_the_others_hear_who_uses_the_store(path, options):
    rounds = 12
    with ExitStack() as stack:
        runs = [stack.enter_context(Child(victims.race, path, rounds, options)) for _ in range(6)]
        for run in runs:
            assert run.hears() == "ready"
        for _ in range(rounds):
            for run in runs:
                run.tell()
            said = [run.hears() for run in runs]
            assert sorted(text == "" for text in said) == [False] * 5 + [True], said
            assert all(" is in use: " in text for text in said if text), said
            for run in runs:
                run.tell()
            for run in runs:
                assert run.hears() == "left"
        for run in runs:
            run.result()
    left = {entry.name for entry in path.parent.iterdir()}
    assert left == {f"{path.name}-{number}" for number in range(rounds)}


# ---- what is written in the file of the lock


def facts(**changes):
    found = {"run": "a", "pid": os.getpid(), "host": "far-away", "boot": "other", "since": "1970-01-01T00:00:00+00:00"}
    return json.dumps({**found, **changes}).encode()


STALE = {
    "empty": b"",
    "garbage": b"\xff\x00{]",
    "huge": b"[" * 5_000_000,
    "no object": b"[1, 2]",
    "null": facts(pid=None, host=None, boot=None, since=None),
    "other types": facts(pid="x" * 400, host=7, boot=[], since={}),
    "a path": facts(pid="../../etc", boot=kernel()),
    "other host": facts(),
    "pid reused": facts(host=socket.gethostname(), boot=kernel()),  # this very process has it
    "pid gone": facts(pid=2**22 + 1, host=socket.gethostname(), boot=kernel()),
    "digits": facts(pid=10**300, boot=kernel()),
}


@pytest.mark.parametrize("name", STALE)
def test_whatever_a_run_that_ended_left_in_the_file_is_no_obstacle(path, name):
    finish(loader_of(path, epochs=1))
    gc.collect()
    (path / "pending" / "owner.json").write_bytes(STALE[name])
    loader = loader_of(path, existing="continue")
    assert loader.epoch == 1
    found = json.loads((path / "pending" / "owner.json").read_bytes())
    assert (found["pid"], found["host"]) == (os.getpid(), socket.gethostname())


@pytest.mark.parametrize("name", STALE)
def test_whatever_is_in_the_file_a_lock_on_it_is_respected(path, name):
    ScoreStore.create(path, N)
    file = path / "pending" / "owner.json"
    file.write_bytes(STALE[name])
    with file.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        with pytest.raises(StoreError, match=r"is in use: .{10,200}\. Two runs on one store"):
            RunLock.acquire(path, "b")
    RunLock.acquire(path, "b")


def test_a_missing_file_is_made(path):
    finish(loader_of(path, epochs=1))
    gc.collect()
    (path / "pending" / "owner.json").unlink()
    assert goes_on(path)


def test_a_run_that_is_quicker_between_the_two_locks_wins(path, monkeypatch):
    """From exclusive to shared, flock lets go for a moment."""
    ScoreStore.create(path, N)
    flock = fcntl.flock
    thieves = []

    def steal(file, kind):
        if kind & fcntl.LOCK_SH and not thieves:
            flock(file, fcntl.LOCK_UN)
            thieves.append((path / "pending" / "owner.json").open("rb"))
            flock(thieves[0], fcntl.LOCK_EX)
        flock(file, kind)

    monkeypatch.setattr(fcntl, "flock", steal)
    with pytest.raises(StoreError, match="is in use"):
        RunLock.acquire(path, "a")
    thieves[0].close()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_on_a_file_system_without_locks_a_run_is_warned_and_trains(path, monkeypatch, code):
    def none(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.warns(RuntimeWarning, match=r"file system without locks .*See to it that there is none"):
        finish(loader_of(path))
    loader = loader_of(path, existing="overwrite")
    with pytest.warns(RuntimeWarning, match="without locks"):
        finish(loader)
    assert loader.epoch == 5
    assert sorted(file.name for file in path.parent.iterdir()) == ["scores.zarr"]


def test_readers_are_never_refused(path):
    with Child(victims.hold, path, {}) as first:
        first.hears()
        assert np.isfinite(ScoreStore.open(path, "r").pending).sum() == 16
        first.tell()
        first.result()


def test_the_hold_ends_with_the_loader(path):
    loader = loader_of(path)
    train(loader, 1)
    del loader
    gc.collect()
    with Child(victims.go_on, path, {}) as other:
        assert other.result() == (0, 8)
