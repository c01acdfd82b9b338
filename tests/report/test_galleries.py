"""Which samples a report shows, and the recorded losses by which it chooses."""

import numpy as np
import pytest

from benchmarks.report_page import make_store
from infobatch_stream import ScoreStore
from infobatch_stream.report import galleries
from infobatch_stream.report import loss_history as losses_module
from infobatch_stream.report.galleries import Highest, choose
from infobatch_stream.report.loss_history import Losses
from infobatch_stream.store.history import Epoch, History, Training


def trained(times, epochs):
    times = np.asarray(times, np.uint16)
    return Training(times, np.where(times > 0, epochs - 1, -1).astype(np.int32), 0)


def chosen(*arguments):
    return {gallery.kind: gallery.index.tolist() for gallery in choose(*arguments)}


def recorded(path, rows):
    """A store whose epochs had the losses ``rows``, float[E, N]."""
    rows = np.asarray(rows, np.float32)
    store = ScoreStore.create(path, rows.shape[1])
    for epoch, row in enumerate(rows):
        store.put_pending(0, row)
        seen = int(np.count_nonzero(~np.isnan(row)))
        store.commit(epoch, history=History(path, Epoch(epoch, row.size, seen, seen, np.nan, 1.0), recorded=True))
    return Losses.open(path, rows.shape[1], len(rows))


@pytest.mark.parametrize("block", [1, 3, 100])
def test_the_hardest_and_easiest_samples_are_those_of_a_stable_sort(monkeypatch, block):
    monkeypatch.setattr(galleries, "_BLOCK", block)
    rng = np.random.default_rng(0)
    for count in (1, 4, 50):
        scores = rng.integers(0, 6, 40).astype(np.float32)
        scores[rng.random(40) < 0.2] = np.nan
        seen = np.flatnonzero(~np.isnan(scores))
        found = chosen(scores, 3, None, None, count)
        assert found["hardest"] == seen[np.argsort(-scores[seen], kind="stable")][:count].tolist()
        assert found["easiest"] == seen[np.argsort(scores[seen], kind="stable")][:count].tolist()


def test_the_highest_of_all_blocks_are_found_whatever_their_order():
    values = np.random.default_rng(1).random(1000)
    found = Highest(10)
    for start in range(0, 1000, 7):
        found.add(start, values[start : start + 7])
    assert found.index.tolist() == np.argsort(-values)[:10].tolist()


def test_without_scores_there_is_no_gallery():
    assert chosen(np.full(5, np.nan, np.float32), 3, trained([0] * 5, 3), None, 4) == {}


def test_never_learned_are_the_highest_5_percent_that_were_trained_on_in_most_epochs():
    scores = np.linspace(0, 1, 100, dtype=np.float32)
    times = np.full(100, 8)
    times[[96, 98]] = 5  # of 8: fewer than three quarters
    assert chosen(scores, 8, trained(times, 8), None, 10)["unlearned"] == [99, 97, 95]
    assert "unlearned" not in chosen(scores, 2, trained(np.full(100, 2), 2), None, 10)  # too early to tell
    assert "unlearned" not in chosen(np.full(100, 0.5, np.float32), 8, trained(times, 8), None, 10)


def test_never_learned_are_in_the_order_of_their_lowest_loss_where_that_is_known(tmp_path):
    rows = np.full((4, 40), 0.1)
    rows[:, 38], rows[:, 39] = [5, 4, 4, 4], [5, 1, 4, 5]
    found = recorded(tmp_path / "scores.zarr", rows)
    assert chosen(rows[-1].astype(np.float32), 4, trained([4] * 40, 4), found, 10)["unlearned"] == [38, 39]


def test_the_most_unstable_are_those_whose_losses_deviate_most_of_three_or_more(tmp_path):
    rows = np.full((4, 6), 1.0)
    rows[:, 1] = [0, 3, 0, 3]
    rows[:, 2] = [0, 9, np.nan, np.nan]
    rows[:, 3] = [1, 2, 1, np.nan]
    found = recorded(tmp_path / "scores.zarr", rows)
    assert chosen(np.ones(6, np.float32), 4, None, found, 2)["unstable"] == [1, 3]


@pytest.mark.parametrize(("block", "chunk"), [(1 << 16, 1 << 20), (7, 16)])
def test_moments_are_those_of_all_recorded_losses(tmp_path, monkeypatch, block, chunk):
    monkeypatch.setattr("infobatch_stream.store.history._SAMPLES", chunk)
    monkeypatch.setattr(losses_module, "_BLOCK", block)
    rng = np.random.default_rng(0)
    rows = rng.lognormal(size=(6, 50))
    rows[rng.random((6, 50)) < 0.4] = np.nan
    rows[:, 3] = np.nan
    rows = rows.astype(np.float32)
    found = recorded(tmp_path / "scores.zarr", rows)
    parts = list(found.moments())
    assert [part.start for part in parts] == list(range(0, 50, chunk))
    times, mean, spread, lowest = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("times", "mean", "spread", "lowest")
    )
    seen = ~np.isnan(rows)
    assert (times == seen.sum(0)).all()
    for number in range(50):
        known = rows[seen[:, number], number].astype(np.float64)
        if known.size:
            assert mean[number] == pytest.approx(known.mean())
            assert spread[number] == pytest.approx(known.std(), abs=1e-12)
            assert lowest[number] == known.min()
        else:
            assert np.isnan([mean[number], spread[number], lowest[number]]).all()
    index = np.array([49, 0, 17, 17])
    assert np.array_equal(found.of(index), rows[:, index], equal_nan=True)


def test_what_stands_for_the_epochs_that_were_not_recorded_is_no_loss(tmp_path):
    path = tmp_path / "scores.zarr"
    store = ScoreStore.create(path, 4)
    for epoch, loss in enumerate([8, 8, 1, 2]):
        store.put_pending(0, np.full(4, loss, np.float32))
        store.commit(epoch, history=History(path, Epoch(epoch, 4, 4, 4, np.nan, 1.0), recorded=epoch >= 2))
    found = Losses.open(path, 4, 4)
    (moments,) = found.moments()
    assert (moments.times == 2).all()
    assert (moments.mean == 1.5).all()
    assert np.array_equal(found.of(np.array([0]))[:, 0], [np.nan, 8, 1, 2], equal_nan=True)


def test_there_are_no_losses_before_the_first_epoch_and_in_a_store_that_kept_none(tmp_path):
    make_store(tmp_path / "a.zarr", 8, 3)
    make_store(tmp_path / "b.zarr", 8, 3, recorded=False)
    assert Losses.open(tmp_path / "a.zarr", 8, 0) is None
    assert Losses.open(tmp_path / "b.zarr", 8, 3) is None
    assert Losses.open(tmp_path / "a.zarr", 8, 2).epochs == 2
