"""Stores that begin with scores of elsewhere: what they take, what they say of it, and who can read them."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from support.histories import COUNT, loader, train

from infobatch_stream import ConfigError, ScoreStore, StoreError
from infobatch_stream.report.simulation import scores_of, simulate
from infobatch_stream.store import header
from infobatch_stream.store.history import epochs
from infobatch_stream.store.seed import digest_of, seed_values

SCORES = np.array([0.5, np.nan, 2, 0], np.float32)
quick = settings(deadline=None, max_examples=60, derandomize=True)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "scores.zarr"


def fields(path):
    return json.loads((path / "zarr.json").read_text())["attributes"]["infobatch_stream"]


def rewrite(path, **changes):
    """Change the header of a store, and its checksum."""
    group = json.loads((path / "zarr.json").read_text())
    mine = group["attributes"]["infobatch_stream"]
    mine.update(changes)
    mine["checksum"] = header.checksum(mine)
    (path / "zarr.json").write_text(json.dumps(group))


def test_a_seeded_store_has_scores_at_epoch_0_and_says_of_all_epochs_where_they_were_from(path):
    store = ScoreStore.seed(path, SCORES, "digits", source="a reference model")
    np.testing.assert_array_equal(store.scores, SCORES)
    for epoch in range(3):
        assert (store.epoch, store.seeded) == (epoch, header.Seeded(3, "a reference model"))
        store.record(np.array([1]), np.array([1.0]))
        store.commit()
        store = ScoreStore.open(path)


def test_a_store_of_an_earlier_run_gives_its_scores_and_its_dataset(path, tmp_path):
    earlier = ScoreStore.create(tmp_path / "earlier.zarr", 4, "digits", scores=SCORES, epoch=7)
    store = ScoreStore.seed(path, earlier)
    assert (store.epoch, store.fingerprint, store.seeded.source) == (0, "digits", "earlier.zarr after 7 epochs")
    np.testing.assert_array_equal(store.scores, SCORES)


def test_the_header_of_others_is_as_ever_and_the_checksum_covers_the_new_field(path, tmp_path):
    """So a program that does not know the field, but how checksums are made, reads the store."""
    assert "seeded" not in fields(ScoreStore.create(tmp_path / "plain.zarr", 4).path)
    ScoreStore.seed(path, SCORES, "digits", source="é")
    assert fields(path)["seeded"] == {"samples": 3, "source": "é"}
    assert fields(path)["checksum"] == header.checksum(fields(path))
    (path / "zarr.json").write_text((path / "zarr.json").read_text().replace('"samples": 3', '"samples": 2'))
    with pytest.raises(StoreError, match="does not have the checksum"):
        ScoreStore.open(path)


@pytest.mark.parametrize(
    "seeded", [[], {"samples": 3}, {"samples": True, "source": "x"}, {"samples": 5, "source": ""},
               {"samples": 0, "source": ""}, {"samples": 1, "source": "x" * 1001}]
)  # fmt: skip
def test_a_header_that_says_something_else_is_damaged(path, seeded):
    ScoreStore.seed(path, SCORES)
    rewrite(path, seeded=seeded)
    with pytest.raises(StoreError, match="the store is damaged"):
        ScoreStore.open(path)


numbers = st.floats(width=32, allow_infinity=False) | st.just(math.nan)


@quick
@given(arrays(np.float32, st.integers(1, 50), elements=numbers))
def test_what_is_finite_is_taken_as_it_is_and_nothing_else_is_known(scores):
    if np.isnan(scores).all():
        with pytest.raises(ConfigError, match="none is known"):
            seed_values(scores)
        assert digest_of(scores) == ""
        return
    values, known = seed_values(scores.astype(np.float64))
    np.testing.assert_array_equal(values, scores)
    assert known == np.count_nonzero(np.isfinite(scores))
    other = scores.copy()
    place = np.flatnonzero(np.isfinite(scores))[0]
    other[place] = np.nextafter(scores[place], np.float32(0 if scores[place] else 1))
    assert digest_of(scores) != digest_of(other)


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ([1.0, math.inf, 2.0, -math.inf], "2 are infinite in float32, as inf of sample 1"),
        ([1.0, 1e39, 2.0, 3.0], r"1 are infinite in float32, as 1e\+39 of sample 1"),
        (np.ones((4, 1)), r"float64\[4, 1\]"),
        (np.array([True] * 4), "bool"),
        (["a"], "one number for each"),
        ([], "none is known"),
    ],
)
def test_what_are_no_scores_is_refused_before_anything_is_written(path, scores, words):
    with pytest.raises(ConfigError, match=words):
        ScoreStore.seed(path, scores)
    assert list(path.parent.iterdir()) == []


def test_what_stands_there_stays_unless_it_may_be_replaced_and_no_run_has_it(path, tmp_path):
    going = loader(path)
    iter(going)
    with pytest.raises(ConfigError, match="source has 1,001 characters"):
        ScoreStore.seed(tmp_path / "new.zarr", SCORES, source="x" * 1001)
    other = ScoreStore.seed(tmp_path / "other.zarr", SCORES, "digits")
    with pytest.raises(StoreError, match=r"other\.zarr exists"):
        ScoreStore.seed(other.path, SCORES)
    assert ScoreStore.seed(other.path, SCORES * 2, replace=True).scores[0] == 1
    with pytest.raises(StoreError, match="scores of another dataset"):
        ScoreStore.seed(tmp_path / "new.zarr", other, "letters")
    for replace in (False, True):
        with pytest.raises(StoreError, match="is in use: process"):
            ScoreStore.seed(path, SCORES, replace=replace)


# ---- the history


def test_with_all_losses_kept_the_scores_of_every_epoch_are_known_from_the_seeds_on(tmp_path):
    seeds = np.random.default_rng(0).random(COUNT, dtype=np.float32)
    seeds[::3] = np.nan
    run = loader(tmp_path / "s.zarr", 4, initial_scores=seeds)
    left, seen = train(run)
    assert len(seen[0]) < COUNT
    for epoch, scores in enumerate([seeds, *left]):
        np.testing.assert_array_equal(run.store.at(epoch), scores)
    (found,) = simulate([run._run.config.policy], scores_of(run.store), epochs=4)
    assert found.kept == [row.kept for row in epochs(run.store.path)]


def test_a_simulation_of_a_run_that_begins_with_scores_prunes_its_first_epoch(path):
    store = ScoreStore.seed(path, np.linspace(0.1, 1, COUNT))
    given = scores_of(store)
    np.testing.assert_array_equal(next(given), store.scores)
    store.commit()
    np.testing.assert_array_equal(next(scores_of(store)), store.scores)
