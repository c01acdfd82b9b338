"""The history of a store: what became of every epoch, kept beside the scores, and never in their way."""

import gc
import json
import shutil
from contextlib import suppress

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from support.commands import run as command
from support.histories import COUNT, loader, losses, train

from infobatch_stream import BudgetPruning, ConfigError, FullData, ScoreStore, StoreError
from infobatch_stream.store import history_array
from infobatch_stream.store.header import read_header
from infobatch_stream.store.history import EDGES, SHARES, Epoch, History, epochs, training
from infobatch_stream.store.recorded_losses import scores_at
from infobatch_stream.store.staging import StagedStore


@pytest.mark.parametrize("constant", [False, True])
def test_each_epoch_has_a_row_that_says_what_its_plan_was_and_what_it_left(tmp_path, constant):
    path = tmp_path / "s.zarr"
    run, stats = loader(path, constant_steps=constant), []
    for epoch in range(run.epochs):
        for (x, _), picks in run:
            run.update(losses(x, epoch), picks)
        stats.append(run.stats)
        run.commit()
        (*_, row) = epochs(path)
        scores = run.store.scores
        assert (row.number, row.entries, row.kept, row.trained) == (epoch, COUNT, *[stats[-1]["kept"]] * 2)
        assert row.threshold == pytest.approx(stats[-1]["threshold"], nan_ok=True)
        assert row.mean == pytest.approx(scores.mean(), rel=1e-6)
        wanted = [np.sort(scores)[min(int(share * COUNT), COUNT - 1)] for share in SHARES]
        assert row.quantiles == pytest.approx(wanted, rel=0.01)
        bins = np.histogram(np.clip(scores, EDGES[0], np.nextafter(EDGES[-1], np.float32(0))), EDGES)[0]
        assert row.histogram.tolist() == bins.tolist()
        assert 0 < row.seconds < 60
    assert len(epochs(path)) == 6


def test_the_scores_that_any_epoch_left_can_be_read_again(tmp_path):
    left, _ = train(loader(tmp_path / "s.zarr"))
    store = ScoreStore.open(tmp_path / "s.zarr", "r")
    assert np.isnan(store.at(0)).all()
    for epoch, wanted in enumerate(left, 1):
        assert np.array_equal(store.at(epoch), wanted)
    with pytest.raises(StoreError, match="that 7 epochs left, but those of 0 to 6"):
        store.at(7)
    with pytest.raises(ConfigError, match="epoch"):
        store.at(-1)


def test_how_often_and_when_last_a_sample_was_trained_on_is_counted(tmp_path):
    _, seen = train(loader(tmp_path / "s.zarr", history=False))
    found = training(tmp_path / "s.zarr", 6)
    assert found.since == 0
    assert found.times.tolist() == np.bincount(np.concatenate(seen), minlength=COUNT).tolist()
    wanted = np.full(COUNT, -1)
    for epoch, index in enumerate(seen):
        wanted[index] = epoch
    assert found.last.tolist() == wanted.tolist()


def test_without_history_the_scores_of_epochs_are_not_kept_and_the_error_says_how_they_would_be(tmp_path):
    train(loader(tmp_path / "s.zarr", history=False))
    store = ScoreStore.open(tmp_path / "s.zarr", "r")
    with pytest.raises(StoreError, match=r"of 3 epochs left, but none.*history=True|3 epochs left, but none"):
        store.at(3)
    assert np.array_equal(store.at(6), store.scores)
    assert len(epochs(tmp_path / "s.zarr")) == 6


@pytest.mark.parametrize("keep_the_store", [True, False])
def test_a_run_that_is_resumed_has_the_history_of_one_that_was_not_as_far_as_it_is_on_this_machine(
    tmp_path, keep_the_store
):
    left, _ = train(loader(tmp_path / "whole.zarr"))
    whole, path = epochs(tmp_path / "whole.zarr"), tmp_path / "s.zarr"
    state = train(loader(path), until=(3, 4))
    if not keep_the_store:
        shutil.rmtree(path)
    run = loader(path)
    run.load_state_dict(state)
    train(run)
    found = epochs(path)
    first = 0 if keep_the_store else 3
    assert [row.number for row in found] == list(range(first, 6))
    for one, other in zip(found, whole[first:], strict=True):
        assert (one.kept, one.mean) == (other.kept, other.mean)
        assert np.array_equal(one.histogram, other.histogram)
    assert training(path, 6).since == first
    store = ScoreStore.open(path, "r")
    for epoch in range(max(first, 1), 7):
        assert np.array_equal(store.at(epoch), left[epoch - 1])


@pytest.mark.parametrize("back", ["overwrite", "checkpoint"])
def test_going_back_before_the_first_epoch_whose_losses_were_kept_leaves_none_of_them(tmp_path, back):
    path = tmp_path / "s.zarr"
    state = train(loader(path, history=False), until=(1, 2))
    run = loader(path, 3, history=False, existing="continue")
    run.load_state_dict(state)
    train(run)
    train(loader(path, existing="continue"))  # of epochs 3, 4 and 5
    run = loader(path, existing="overwrite" if back == "overwrite" else "continue")
    if back == "checkpoint":
        run.load_state_dict(state)
    first = run.epoch
    left, _ = train(run)
    store = ScoreStore.open(path, "r")
    for epoch, wanted in enumerate(left, first + 1):
        assert np.array_equal(store.at(epoch), wanted)


class Killed(BaseException):
    """Stands for a kill -9: nothing of the library sees it."""


def test_a_process_killed_anywhere_in_the_row_after_a_commit_leaves_one_that_the_next_mends(tmp_path, monkeypatch):
    train(loader(tmp_path / "whole.zarr", 2))
    (*_, wanted) = epochs(tmp_path / "whole.zarr")
    after, replace, killed = History.after, history_array.replace_inside, 0

    def until(count):
        """Writes nothing after ``count`` files of the row."""

        def write(*args):
            nonlocal count, killed
            if not count:
                killed += 1
                raise Killed
            count -= 1
            replace(*args)

        def last(self, scores):
            if self._epoch.number == 1:
                monkeypatch.setattr(history_array, "replace_inside", write)
            after(self, scores)

        return last

    for count in range(7):
        path = tmp_path / f"{count}.zarr"
        monkeypatch.setattr(History, "after", until(count))
        with suppress(Killed):
            train(loader(path, 2))
        monkeypatch.undo()
        gc.collect()
        loader(path, 2, existing="continue")
        (*_, found) = epochs(path)
        assert (found.number, found.mean) == (1, wanted.mean), count
        assert np.array_equal(found.quantiles, wanted.quantiles)
        assert np.array_equal(found.histogram, wanted.histogram)
    assert killed >= 5  # of quantiles, histogram and mean: the values, and how many there are


def test_an_earlier_checkpoint_takes_the_history_back_with_it(tmp_path):
    path = tmp_path / "s.zarr"
    state = train(loader(path), until=(2, 3))
    run = loader(path)
    run.load_state_dict(state)
    left, _ = train(run)
    again = loader(path)
    again.load_state_dict(state)
    assert [row.number for row in epochs(path)] == [0, 1]
    assert np.array_equal(train(again)[0], left)
    assert [row.number for row in epochs(path)] == list(range(6))


def test_a_new_run_over_an_old_store_has_no_history_of_that(tmp_path):
    path = tmp_path / "s.zarr"
    train(loader(path))
    run = loader(path, 2, existing="overwrite", policy=FullData())
    train(run)
    assert [row.number for row in epochs(path)] == [0, 1]
    assert set(training(path, 2).times.tolist()) == {2}


def test_a_history_that_cannot_be_written_is_a_warning_and_the_scores_are_committed(tmp_path):
    path = tmp_path / "s.zarr"
    run = loader(path, 2)
    for (x, _), picks in run:
        run.update(losses(x, 0), picks)
    (path / "history").write_text("not a folder")
    with pytest.warns(RuntimeWarning, match="the history of epoch 0 could not be written"):
        run.commit()
    assert run.store.epoch == 1
    assert not np.isnan(run.store.scores).any()


def test_what_a_broken_off_commit_wrote_is_not_counted_twice(tmp_path, monkeypatch):
    path, whole = tmp_path / "s.zarr", tmp_path / "whole.zarr"
    train(loader(whole))
    run, before = loader(path), History.before

    def broken_off(self, *arrays):
        before(self, *arrays)
        if self._epoch.number == 3:
            monkeypatch.undo()
            raise StoreError("the disk was pulled out")

    monkeypatch.setattr(History, "before", broken_off)
    with pytest.raises(StoreError, match="pulled out"):
        train(run)
    run.commit()
    train(run)
    ours, wanted = training(path, 6), training(whole, 6)
    assert ours.times.tolist() == wanted.times.tolist()
    assert ours.last.tolist() == wanted.last.tolist()
    assert [row.kept for row in epochs(path)] == [row.kept for row in epochs(whole)]


@pytest.mark.parametrize("go_on", ["continue", "checkpoint"])
def test_the_row_of_an_epoch_whose_process_was_killed_in_the_commit_is_whole_after_the_next_opening(
    tmp_path, monkeypatch, go_on
):
    train(loader(tmp_path / "whole.zarr"))
    path, after = tmp_path / "s.zarr", History.after

    def killed(self, scores):
        if self._epoch.number == 2:
            raise Killed
        after(self, scores)

    run = loader(path)
    monkeypatch.setattr(History, "after", killed)
    with pytest.raises(Killed):
        train(run)
    monkeypatch.undo()
    found = json.loads(command("inspect", path, "--json")[1])
    assert [row["mean"] is None for row in found["epochs"]] == [False, False, True]
    run = loader(path, existing="continue")
    if go_on == "checkpoint":
        state, run = run.state_dict(), loader(path)
        run.load_state_dict(state)
    train(run)
    for one, other in zip(epochs(path), epochs(tmp_path / "whole.zarr"), strict=True):
        wanted = (other.kept, other.threshold, other.mean)
        assert (one.kept, one.threshold, one.mean) == pytest.approx(wanted, nan_ok=True)
        assert np.array_equal(one.histogram, other.histogram)
    assert np.array_equal(training(path, 6).times, training(tmp_path / "whole.zarr", 6).times)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_store_that_is_replaced_by_one_further_on_keeps_the_rows_that_it_committed_and_no_half_ones(
    tmp_path, monkeypatch, moment
):
    train(loader(tmp_path / "whole.zarr"))
    path, told = tmp_path / "s.zarr", getattr(History, moment)

    def killed(self, *arrays):
        if moment == "before":
            told(self, *arrays)
        if self._epoch.number == 2:
            raise Killed
        if moment == "after":
            told(self, *arrays)

    monkeypatch.setattr(History, moment, killed)
    with pytest.raises(Killed):
        train(loader(path))
    monkeypatch.undo()
    ahead = ScoreStore.open(tmp_path / "whole.zarr", "r")
    header = read_header(tmp_path / "whole.zarr").replace(epoch=5)
    staged = StagedStore(path, header, scores=ahead.scores, replace=True)
    staged.keep_history()
    staged.place()
    wanted = epochs(tmp_path / "whole.zarr")[: 2 if moment == "before" else 3]
    for one, other in zip(epochs(path), wanted, strict=True):
        assert (one.number, one.kept, one.mean) == (other.number, other.kept, other.mean)
        assert np.array_equal(one.histogram, other.histogram)


def test_a_history_that_a_run_begins_while_it_is_looked_for_is_read_and_not_called_foreign(tmp_path, monkeypatch):
    train(loader(tmp_path / "s.zarr", 1))
    hidden, names_in = tmp_path / "zarr.json", history_array.names_in
    there = tmp_path / "s.zarr/history/zarr.json"
    there.rename(hidden)

    def written_just_now(*folder):
        if hidden.exists():
            hidden.rename(there)
        return names_in(*folder)

    monkeypatch.setattr(history_array, "names_in", written_just_now)
    assert [one.number for one in epochs(tmp_path / "s.zarr")] == [0]


def test_a_damaged_history_is_an_error_to_who_reads_it_and_a_warning_to_who_trains(tmp_path):
    path = tmp_path / "s.zarr"
    train(loader(path, 3))
    (path / "history" / "mean" / "zarr.json").write_text('{"zarr_format": 3')
    with pytest.raises(StoreError, match="cannot be read"):
        epochs(path)
    run = loader(path, 4, existing="continue")
    with pytest.warns(RuntimeWarning, match="the scores are not concerned"):
        train(run)
    assert run.store.epoch == 4


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=60),
    st.integers(0, 5),
)
def test_a_description_counts_every_score_and_no_other(values, unseen):
    scores = np.array([*values, *[np.nan] * unseen], np.float32)
    found = Epoch(0, 0, 0, 0, 0.0, 0.0).describing(scores)
    assert found.histogram.sum() == len(values)
    ordered = np.sort(np.array(values, np.float32))
    wanted = [ordered[min(int(share * len(values)), len(values) - 1)] for share in SHARES]
    assert found.quantiles == pytest.approx(wanted, rel=0.0079, abs=2e-38)
    assert (np.diff(found.quantiles) >= 0).all()


def test_a_damaged_history_does_not_keep_a_checkpoint_from_being_loaded(tmp_path):
    path = tmp_path / "s.zarr"
    state = train(loader(path), until=(3, 4))
    (path / "history" / "mean" / "zarr.json").write_text('{"zarr_format": 3')
    run = loader(path)
    with pytest.warns(RuntimeWarning, match="so it begins anew"):
        run.load_state_dict(state)
    train(run)
    assert [row.number for row in epochs(path)] == [3, 4, 5]


def test_zarr_reads_it(tmp_path):
    train(loader(tmp_path / "s.zarr", 3))
    group = zarr.open_group(tmp_path / "s.zarr", mode="r", zarr_format=3)["history"]
    assert group["kept"][:].tolist() == [row.kept for row in epochs(tmp_path / "s.zarr")]
    assert group["recorded"].shape == (3, COUNT)
    assert np.isnan(group["recorded"][1]).sum() == COUNT - group["kept"][1]


def test_a_run_with_a_budget_has_its_budget_in_the_history(tmp_path):
    train(loader(tmp_path / "s.zarr", 10, policy=BudgetPruning(0.4)))
    rows = epochs(tmp_path / "s.zarr")
    assert 1 - sum(row.trained for row in rows) / (10 * COUNT) == pytest.approx(0.4, abs=0.02)


def test_scores_of_epochs_that_are_not_there_are_refused(tmp_path):
    ScoreStore.create(tmp_path / "s.zarr", 5)
    with pytest.raises(StoreError, match="but none"):
        scores_at(tmp_path / "s.zarr", 5, 1)
    assert epochs(tmp_path / "s.zarr") == []
    assert training(tmp_path / "s.zarr", 0) is None
