"""Readers of a store that is trained on, clocks that jump, processes that die while they make a store."""

import datetime
import os
import time

import numpy as np
import pytest
import torch
from support.ddp import victims
from support.ddp.children import Child
from support.ddp.data import loss_of, wds, write_wds
from support.ddp.victims import N, finish, loader_of, losses, train
from support.late_device import LateDevice

from infobatch_stream import InfoBatchLoader, ScoreStore, StoreError
from infobatch_stream.pinned_ring import PinnedRing
from infobatch_stream.store.header import read_header

YEARS = 50 * 365 * 86_400


# ---- a reader while training


def test_a_reader_sees_plausible_scores_always_and_exactly_an_epochs_between_commits(tmp_path):
    path, size, epochs = tmp_path / "scores.zarr", 4096, 150
    everything = np.stack([np.full(size, np.nan), *(losses(epoch, size) for epoch in range(epochs))]).astype(np.float32)
    possible = np.unique(everything)
    seen, whole = set(), 0
    with Child(victims.many_commits, path, size, epochs) as run:
        assert run.hears() == "ready"
        while len(seen) < epochs // 2:  # whatever the pace of the two
            before = read_header(path)
            store = ScoreStore.open(path, "r")
            scores, pending = np.array(store.scores), np.array(store.pending)
            after = read_header(path)
            for found in (scores, pending):
                assert np.isin(found[~np.isnan(found)], possible).all()
            assert before.epoch <= store.epoch <= after.epoch + 1  # a commit under way may show as finished
            assert store.epoch == 0 or not np.isnan(scores).any()
            if before == after and before.state == "ready":
                assert np.array_equal(scores, everything[before.epoch], equal_nan=True)
                seen.add(before.epoch)
                whole += 1
            if before.epoch == epochs:
                break
        assert run.result() == epochs
    assert whole
    assert seen <= set(range(epochs + 1))
    assert np.array_equal(ScoreStore.open(path, "r").scores, everything[epochs])


# ---- clocks


def run_of(folder, store):
    """Train on the shards in ``folder``; -> every step's picks, and the scores."""
    dataset = wds(folder)
    loader = InfoBatchLoader(dataset, store, batch_size=8, epochs=4, delta=1, shuffle_window=16)
    steps = []
    for epoch in range(loader.epochs):
        for _, picks in loader:
            loader.update(loss_of(picks.index, epoch), picks)
            steps.append((epoch, picks.index.tolist(), picks.weight.tolist()))
    loader.commit()
    return steps, np.array(loader.store.scores)


@pytest.fixture
def jumping_clock(monkeypatch):
    """The wall clock jumps by up to 50 years, back and forth, whenever it is read."""
    jumps = np.random.default_rng(0)
    real = time.time

    class Jumping(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime.fromtimestamp(jumping(), tz)

    def jumping():
        return max(0.0, real() + jumps.integers(-YEARS, YEARS))

    monkeypatch.setattr(time, "time", jumping)
    monkeypatch.setattr(time, "time_ns", lambda: int(jumping() * 1e9))
    monkeypatch.setattr(datetime, "datetime", Jumping)


def test_a_clock_that_jumps_changes_neither_picks_nor_scores(tmp_path, request):
    folder = write_wds(tmp_path / "shards")
    wanted = run_of(folder, tmp_path / "a.zarr")
    request.getfixturevalue("jumping_clock")
    found = run_of(folder, tmp_path / "b.zarr")
    assert found[0] == wanted[0]
    assert np.array_equal(found[1], wanted[1])
    assert loader_of(tmp_path / "c.zarr", epochs=1).epoch == 0


@pytest.mark.parametrize("shift", [-YEARS, YEARS])
@pytest.mark.parametrize("of", ["shards", "indexes", "store"])
def test_files_that_seem_to_be_of_the_past_or_the_future_are_taken_as_they_are(tmp_path, of, shift):
    folder, store = tmp_path / "shards", tmp_path / "scores.zarr"
    wanted = run_of(write_wds(folder), store)
    indexes = sorted(folder.glob("*.index.npz"))
    assert len(indexes) == 4
    files = {"shards": sorted(folder.glob("*.tar")), "indexes": indexes, "store": [*store.rglob("*"), store]}[of]
    for file in files:
        at = int(time.time()) + shift
        os.utime(file, (at, at))
    before = [file.stat().st_mtime_ns for file in indexes]
    loader = InfoBatchLoader(
        wds(folder), store, batch_size=8, epochs=5, delta=1, shuffle_window=16, existing="continue"
    )
    assert loader.epoch == 4
    assert np.array_equal(loader.store.scores, wanted[1])
    train(loader)
    del loader
    # An index is of its tar if that has the size and the time that it says; its own time says nothing.
    made_anew = [file.stat().st_mtime_ns for file in indexes] != before
    assert made_anew == (of == "shards")
    found = run_of(folder, tmp_path / "again.zarr")
    assert found[0] == wanted[0]


def test_a_tar_that_changed_is_indexed_anew_even_if_the_clock_went_back(tmp_path):
    folder = tmp_path / "shards"
    run_of(write_wds(folder), tmp_path / "a.zarr")
    write_wds(folder, samples=13)
    for file in folder.glob("*.tar"):
        os.utime(file, (0, 0))  # older than its index
    dataset = wds(folder)
    assert [dataset[i][0] for i in range(len(dataset))] == list(range(4 * 13))


# ---- a process that dies while it makes a store


def check_making(path, replace, every):
    path.mkdir()
    with Child(victims.die_making, path, replace, every) as run:
        found = run.result(600)
    before = [["old"]] if replace else [[]]
    for left, hidden, mended, stays, last in found:
        assert left in ([], *before, ["new"])
        assert all(name.startswith((".scores.zarr.new-", ".scores.zarr.old-")) for name in hidden)
        assert mended == 0
        assert stays == ["scores.zarr"]
        assert last == "last"
    assert any(hidden for _, hidden, *_ in found)
    assert [found[0][0], found[-1][0]] == [*before, ["new"]]


@pytest.mark.parametrize("replace", [False, True])
def test_a_process_killed_while_it_makes_a_store_leaves_one_or_none_and_the_next_removes_its_files(tmp_path, replace):
    check_making(tmp_path / "stores", replace, 61)


@pytest.mark.slow(
    short="test_a_process_killed_while_it_makes_a_store_leaves_one_or_none_and_the_next_removes_its_files"
)
@pytest.mark.parametrize("replace", [False, True])
def test_so_does_one_that_is_killed_at_any_other_line(tmp_path, replace):
    check_making(tmp_path / "stores", replace, 3)


# ---- a store that is changed for another


def record_late(loader):
    """Give the recorder a loss of 9 for each sample, on a device that is late."""
    recorder = loader._run.scores.recorder
    recorder.ring = PinnedRing(LateDevice())
    recorder.add(np.arange(N), np.ones(N, bool), torch.full((N,), 9.0))
    assert not np.any(loader.store.pending == 9)


def test_losses_under_way_when_a_state_is_loaded_are_dropped_with_the_store_that_they_were_for(tmp_path):
    loader = loader_of(tmp_path / "scores.zarr")
    train(loader, 1)
    state = loader.state_dict()
    record_late(loader)
    loader.load_state_dict(state)
    loader._run.scores.recorder.flush()
    assert np.isfinite(loader.store.pending).sum() == 8
    assert not np.any(loader.store.pending == 9)


def test_losses_under_way_reach_the_store_before_a_commit(tmp_path):
    loader = loader_of(tmp_path / "scores.zarr")
    train(loader, 1)
    record_late(loader)
    loader.commit()
    assert np.all(loader.store.scores == 9)


def test_a_run_whose_store_was_overwritten_by_hand_is_told_and_mended_by_a_state(tmp_path):
    loader = loader_of(tmp_path / "scores.zarr")
    train(loader, 2)
    state = loader.state_dict()
    ScoreStore.create(tmp_path / "scores.zarr", N, loader._run.source.fingerprint, replace=True)
    with pytest.raises(StoreError, match="replaced by another program"):
        iter(loader)
    loader.load_state_dict(state)
    finish(loader)
    assert loader.epoch == 5
