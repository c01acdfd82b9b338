"""BudgetPruning: the share that was asked for, in an epoch and over the run; probabilities that grow with the score."""

import hashlib
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from infobatch_stream import BudgetPruning, InfoBatchLoader
from infobatch_stream.errors import ConfigError
from infobatch_stream.planning.selection import Selection
from infobatch_stream.policies.base import Moment
from infobatch_stream.policies.budget import ProportionalPruning
from infobatch_stream.score_stats import Summary

quick = settings(deadline=None, max_examples=60, derandomize=True)
UNIT = 2.0**-16

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
some_scores = arrays(np.float32, st.integers(1, 300), elements=finite | st.just(math.nan) | st.floats(0, 1, width=32))
shares = st.floats(0, 0.999)
powers = st.floats(0, 2)
floors = st.floats(2**-10, 1)


def losses(count, seed=0):
    return np.random.default_rng(seed).gamma(0.5, 1.0, count).astype(np.float32)


def expected(rule, scores):
    """How many are kept on average, those without a score included."""
    seen = scores[~np.isnan(scores)]
    return rule(seen).sum() + scores.size - seen.size


# --- one epoch


@quick
@given(scores=some_scores, share=shares, power=powers, floor=floors)
def test_the_expected_share_is_what_was_asked_for_wherever_the_floor_allows(scores, share, power, floor):
    rule = ProportionalPruning(share, power, floor).rule(Summary(scores))
    unseen = np.count_nonzero(np.isnan(scores))
    least = unseen + (scores.size - unseen) * math.ceil(floor * 2**16) * UNIT
    wanted = np.clip((1 - share) * scores.size, least, scores.size)
    assert expected(rule, scores) == pytest.approx(wanted, abs=scores.size * UNIT)


@quick
@given(scores=some_scores, share=shares, power=powers, floor=floors)
def test_a_higher_score_is_never_kept_less_and_none_under_the_floor(scores, share, power, floor):
    chance = ProportionalPruning(share, power, floor).rule(Summary(scores))(np.sort(scores[~np.isnan(scores)]))
    assert np.all(np.diff(chance) >= 0)
    assert np.all(chance >= math.ceil(floor * 2**16) * UNIT)
    assert np.all(chance <= 1)


@pytest.mark.parametrize("power", [0.25, 0.5, 1.0, 1.7, 2.0])
def test_between_floor_and_1_the_probability_is_proportional_to_the_power_of_the_score(power):
    scores = losses(100_000)
    chance = ProportionalPruning(0.5, power, 0.1).rule(Summary(scores))(scores)
    between = (chance > 0.11) & (chance < 0.99)
    assert between.sum() > 1000
    ratio = chance[between] / scores[between] ** power
    assert ratio.max() / ratio.min() < 1 + 0.01 * max(power, 1)  # a step of the table is 2^-7 of a score at most


def test_power_0_draws_all_alike():
    scores = losses(1000)
    chance = ProportionalPruning(0.4, 0.0, 0.15).rule(Summary(scores))(scores)
    assert set(chance) == {round(0.6 * 2**16) * UNIT}


@quick
@given(scores=some_scores, share=shares, power=powers, floor=floors, seed=st.integers(0, 2**64 - 1))
def test_a_selection_by_the_table_keeps_and_weighs_by_its_probabilities(scores, share, power, floor, seed):
    rule = ProportionalPruning(share, power, floor).rule(Summary(scores))
    selection = Selection(scores, rule, seed, 3)
    slow = Selection(scores, lambda scores: rule(scores), seed, 3)  # any function of the scores, without the table
    np.testing.assert_array_equal(selection.keep(0, scores.size), slow.keep(0, scores.size))
    index, weight = selection.choose(np.array([0]), np.array([scores.size]))
    np.testing.assert_array_equal(index, np.flatnonzero(slow.keep(0, scores.size)))
    np.testing.assert_array_equal(weight, slow.weight(index))
    np.testing.assert_array_equal(weight, selection.weight(index))


def test_the_weighted_sum_over_kept_samples_is_unbiased():
    scores = losses(300)
    scores[::11] = np.nan
    rule = ProportionalPruning(0.6, 0.5, 0.15).rule(Summary(scores))
    values = np.random.default_rng(1).normal(1, 1, scores.size)
    sums = []
    for seed in range(1000):
        index, weight = Selection(scores, rule, seed, 0).choose(np.array([0]), np.array([scores.size]))
        sums.append((weight * values[index]).sum())
    error = np.std(sums) / math.sqrt(len(sums))
    assert abs(np.mean(sums) - values.sum()) < 4 * error


def test_the_threshold_is_the_lowest_score_that_is_always_kept():
    scores = losses(50_000)
    rule = ProportionalPruning(0.5, 0.5, 0.15).rule(Summary(scores))
    chance = rule(scores)
    assert scores[chance < 1].max() < rule.threshold <= scores[chance == 1].min()
    assert math.isnan(ProportionalPruning(0.5, 0.0, 0.15).rule(Summary(scores)).threshold)


@pytest.mark.parametrize("power", [0.0, 0.3, 0.5, 1.0, 1.999])
def test_the_table_is_of_the_same_bits_on_every_machine(power):
    """Written down here: ranks on unlike processors have to agree on every probability."""
    scores = (np.arange(1, 5001, dtype=np.float32) / 1024) ** 3
    table = ProportionalPruning(0.55, power, 0.15).rule(Summary(scores)).units
    found = hashlib.sha256(table.astype("<u4").tobytes()).hexdigest()[:16]
    assert found == TABLES[power]


TABLES = {
    0.0: "d6a77ec77bbed9f4",
    0.3: "90a630fbeddd9e4b",
    0.5: "f8ef24dafaed0cc5",
    1.0: "b54e3b53a712b8de",
    1.999: "3770ede8c54251e0",
}


@quick
@given(
    scores=arrays(np.float32, 40, elements=st.floats(0, 4, width=32) | st.just(math.nan)),
    pool=arrays(np.int64, st.integers(1, 200), elements=st.integers(0, 39)),
    share=shares,
)
def test_of_a_mixed_pool_the_share_counts_its_entries_with_their_repeats(scores, pool, share):
    assume(not np.isnan(scores).all())
    rule = ProportionalPruning(share, 0.5, 0.01).rule(Summary(scores, pool))
    wanted = max((1 - share) * pool.size, expected_at_least(scores[pool], 0.01))
    assert expected(rule, scores[pool]) == pytest.approx(wanted, abs=pool.size * UNIT)


def expected_at_least(scores, floor):
    unseen = np.count_nonzero(np.isnan(scores))
    return unseen + (scores.size - unseen) * math.ceil(floor * 2**16) * UNIT


# --- the whole run


def pruned_evenly(policy, epochs, annealing, entries=1000, seeded=0.0):
    """Shares of the epochs when each skips what it is told to, and the first no more than it can."""
    skipped, shares = 0.0, []
    for epoch in range(annealing):
        share = policy.at(Moment(epoch, epochs, annealing, entries, epoch * entries, int(skipped), seeded)).share
        assert epoch or share <= seeded * (1 - policy.floor) + 1e-9
        skipped += share * entries
        shares.append(share)
    return shares


@quick
@given(
    fraction=st.floats(0, 0.99),
    epochs=st.integers(1, 300),
    delta=st.floats(0, 1),
    floor=floors,
    seeded=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
)
def test_every_fraction_up_to_the_largest_can_be_met_and_none_above(fraction, epochs, delta, floor, seeded):
    policy = BudgetPruning(fraction, floor=floor)
    annealing = math.floor(delta * epochs)
    largest = policy.largest(epochs, delta, seeded)
    start = Moment(0, epochs, annealing, 1000, 0, 0, seeded)
    if fraction > largest + 1e-9:  # rounding is no reason
        with pytest.raises(ConfigError, match=f"the largest fraction is {math.floor(largest * 10000) / 10000:g}"):
            policy.check(start)
        return
    assert policy.check(start) == ""
    met = sum(pruned_evenly(policy, epochs, annealing, seeded=seeded))
    assert met == pytest.approx(fraction * epochs, abs=0.002 * epochs)
    moments = [Moment(epoch, epochs, annealing, 1000, None, None, seeded) for epoch in range(annealing)]
    unknown = [policy.at(moment).share for moment in moments]
    assert sum(unknown) == pytest.approx(fraction * epochs, abs=1e-9 * epochs)


def test_what_an_epoch_skipped_too_little_the_later_ones_make_up_for():
    policy = BudgetPruning(0.4)
    late = policy.at(Moment(5, 10, 8, 1000, 5000, 0)).share
    assert late == min(0.4 * 10_000 / 3000, 0.85)
    early = policy.at(Moment(5, 10, 8, 1000, 5000, 3900)).share
    assert early == pytest.approx(100 / 3000)
    assert policy.at(Moment(5, 10, 8, 1000, 5000, 4500)).share == 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BudgetPruning(1.0), ["fraction=1.0", "[0, 1)"]),
        (lambda: BudgetPruning(-0.1), ["fraction=-0.1", "[0, 1)"]),
        (lambda: BudgetPruning(math.nan), ["nan", "[0, 1)"]),
        (lambda: BudgetPruning("0.4"), ["fraction='0.4'", "numbers"]),
        (lambda: BudgetPruning(0.4, power=-1), ["power=-1", "[0, 2]"]),
        (lambda: BudgetPruning(0.4, power=3), ["power=3", "[0, 2]"]),
        (lambda: BudgetPruning(0.4, floor=0), ["floor=0", "2^-10"]),
        (lambda: BudgetPruning(0.4, floor=2**-11), ["0.000488281", "2^-10"]),
        (lambda: BudgetPruning(0.4, floor=1.5), ["1.5", "2^-10"]),
    ],
)
def test_impossible_parameters_name_what_was_found_and_what_is_allowed(make, words):
    with pytest.raises(ConfigError) as caught:
        make()
    assert [word for word in words if word not in str(caught.value)] == []


# --- through the loader

N, BATCH = 2000, 50


def loader_of(path, fraction=0.5, **options):
    options = {"batch_size": BATCH, "epochs": 10, "policy": BudgetPruning(fraction), **options}
    return InfoBatchLoader(torch.arange(N), path, **options)


def loss_of(index, epoch):
    """Losses that differ and fall."""
    return (index.float() * 0.37 % 1 + 0.01) ** 3 / (1 + epoch)


def train(loader, until=None):
    """Train to the end, or to (epoch, step); what was drawn, as (epoch, index, weight) of each step."""
    drawn = []
    for epoch in range(loader.epoch, loader.epochs):
        for _, picks in loader:
            loader.update(loss_of(picks.index, epoch), picks)
            drawn.append((epoch, picks.index.tolist(), picks.weight.tolist()))
            if (epoch, loader.step) == until:
                return drawn
    loader.commit()
    return drawn


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.4, 0.5, 0.59])
def test_a_run_skips_the_fraction_that_was_asked_for(tmp_path, fraction):
    loader = loader_of(tmp_path / "scores.zarr", fraction)
    train(loader)
    # Only the draws of the last epoch that prunes are not made up for: 4 standard deviations of them.
    assert loader.stats["saved"] == pytest.approx(fraction, abs=4 * math.sqrt(N / 4) / (N * 10))


def test_more_than_can_be_skipped_is_refused_with_the_largest_fraction(tmp_path):
    with pytest.raises(ConfigError, match=r"largest fraction is 0\.595") as caught:
        loader_of(tmp_path / "scores.zarr", 0.7)
    assert "first" in str(caught.value)
    assert BudgetPruning(0.1).largest(10) == pytest.approx(0.595)
    assert not (tmp_path / "scores.zarr").exists()
    loader = loader_of(tmp_path / "scores.zarr", 0.6)  # which can be, if the store turns out to begin with scores
    with pytest.raises(ConfigError, match=r"largest fraction is 0\.595"):
        iter(loader)


@pytest.mark.parametrize("until", [(0, 40), (1, 3), (4, 7), (7, 1), (8, 2)])
def test_a_resumed_run_draws_the_same(tmp_path, until):
    whole = train(loader_of(tmp_path / "whole.zarr"))
    first = loader_of(tmp_path / "first.zarr")
    drawn = train(first, until)
    rest = loader_of(tmp_path / "rest.zarr")
    rest.load_state_dict(first.state_dict())
    assert drawn + train(rest) == whole


def test_an_epoch_that_was_begun_stays_what_it_is_when_epochs_are_raised_and_the_later_ones_meet_the_budget(tmp_path):
    whole = [step for step in train(loader_of(tmp_path / "whole.zarr")) if step[0] == 4]
    first = loader_of(tmp_path / "first.zarr")
    drawn = train(first, (4, 5))
    longer = loader_of(tmp_path / "longer.zarr", epochs=20)
    longer.load_state_dict(first.state_dict())
    drawn += train(longer)
    assert [step for step in drawn if step[0] == 4] == whole
    assert longer.stats["saved"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("options", [{"epochs": 1}, {"delta": 0.0}, {"delta": 0.1}])
def test_a_budget_is_refused_where_no_epoch_may_prune(tmp_path, options):
    with pytest.raises(ConfigError, match="largest fraction is 0"):
        loader_of(tmp_path / "scores.zarr", 0.4, **options)
    loader_of(tmp_path / "scores.zarr", 0.0, **options)


def test_a_budget_that_cannot_be_met_any_more_is_told_once(tmp_path):
    loader = loader_of(tmp_path / "scores.zarr", 0.59)
    train(loader)
    loader.epochs = 12  # of which 10 may prune, and these are over
    with pytest.warns(RuntimeWarning, match=r"fraction=0\.59.* cannot be met any more: 0\.49") as said:
        train(loader)
    assert len(said) == 1


def test_losses_that_are_not_finite_are_made_up_for_or_told(tmp_path):
    loader = loader_of(tmp_path / "scores.zarr", 0.5)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(10):
            for _, picks in loader:
                losses = loss_of(picks.index, 0)
                loader.update(torch.where(picks.index % 2 == 0, losses, torch.nan), picks)
    assert [str(warning.message).split(":")[1].split()[0] for warning in said] == ["a", "BudgetPruning(fraction=0.5,"]
    assert loader.stats["saved"] < 0.35


def test_samples_that_drop_last_leaves_out_count_as_skipped(tmp_path):
    loader = loader_of(tmp_path / "scores.zarr", 0.4, batch_size=300, drop_last=True)
    drawn = train(loader)
    trained = sum(len(index) for _, index, _ in drawn)
    assert loader.stats["saved"] == pytest.approx(1 - trained / (10 * N))
    assert 0.39 < loader.stats["saved"] < 0.4 + 3 * 300 / (10 * N)  # the last two epochs drop some, and skip none


def test_a_run_that_was_continued_without_a_checkpoint_goes_on_at_the_pace_of_the_whole(tmp_path):
    first = loader_of(tmp_path / "scores.zarr")
    train(first, (3, 1))
    del first
    loader = loader_of(tmp_path / "scores.zarr", existing="continue")
    iter(loader)
    assert loader.epoch == 3
    assert loader.stats["pruned"] / N == pytest.approx(0.5 * 10 / 7, abs=0.05)
    state = loader.state_dict()
    assert state["progress"]["knows_all"] is False


# --- spread evenly


@quick
@given(scores=some_scores, share=shares, power=powers, floor=floors)
def test_what_has_no_score_counts_as_of_the_median_one(scores, share, power, floor):
    rule = ProportionalPruning(share, power, floor, prunes_always=True).rule(Summary(scores))
    chance = rule(scores)
    least = math.ceil(floor * 2**16) * UNIT
    assert chance.mean() == pytest.approx(max(1 - share, least), abs=2 * UNIT)
    unseen = np.isnan(scores)
    if unseen.any() and not unseen.all():
        seen = np.sort(scores[~unseen])
        low, high = rule(seen[[(seen.size - 1) // 2, seen.size // 2]])
        assert low - UNIT <= chance[unseen][0] <= high + UNIT


def test_spread_evenly_every_epoch_skips_the_same_share_and_the_weighted_sum_stays_unbiased(tmp_path):
    size, epochs = 2000, 4
    loader = InfoBatchLoader(
        list(range(size)),
        tmp_path / "scores.zarr",
        batch_size=100,
        epochs=epochs,
        policy=BudgetPruning(0.4, spread="even"),
        constant_steps=True,
    )
    loss = torch.from_numpy(losses(size)) + 0.01
    for epoch in range(epochs):
        weights = torch.zeros(size)
        for _, picks in loader:
            loader.update(loss[picks.index], picks)
            weights[picks.index] += picks.weight
        assert loader.step == len(loader) == 20
        assert (weights > 0).sum() == pytest.approx(0.6 * size, abs=5 * math.sqrt(size))
        assert weights.sum() == pytest.approx(size, rel=0.1)
        assert math.isnan(loader.stats["threshold"]) == (epoch == 0)
        if epoch == 0:
            assert sorted(set(weights.tolist())) == pytest.approx([0, 1 / 0.6], rel=1e-4)  # at random
    assert loader.stats["saved"] == pytest.approx(0.4, abs=0.03)


def test_spread_evenly_a_run_may_be_of_one_epoch(tmp_path):
    policy = BudgetPruning(0.3, spread="even")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader = InfoBatchLoader(list(range(1000)), tmp_path / "scores.zarr", batch_size=10, epochs=1, policy=policy)
        picked = sum(len(picks) for _, picks in loader if loader.update(torch.ones(len(picks)), picks) is not None)
    assert 600 < picked < 800


def test_spread_evenly_all_but_the_floor_can_be_skipped(tmp_path):
    assert BudgetPruning(0.1, floor=0.2, spread="even").largest(7) == pytest.approx(0.8)
    for percent in range(1, 100):  # what is not a sum of powers of 2
        policy = BudgetPruning((100 - percent) / 100, floor=percent / 100, spread="even")
        assert policy.check(Moment(0, 7, 7, 100, 0, 0)) == ""
    policy = BudgetPruning(0.85, floor=0.2, spread="even")
    with pytest.raises(ConfigError, match=r"the largest fraction is 0\.8\. Ask for less, or lower the floor"):
        InfoBatchLoader([1, 2, 3], tmp_path / "scores.zarr", batch_size=1, epochs=9, policy=policy)


def test_the_repr_by_which_states_are_compared_tells_the_spread_where_it_is_not_the_default():
    assert repr(BudgetPruning(0.5)) == "BudgetPruning(fraction=0.5, power=0.5, floor=0.15)"
    assert (
        repr(BudgetPruning(0.5, spread="even")) == "BudgetPruning(fraction=0.5, power=0.5, floor=0.15, spread='even')"
    )
    with pytest.raises(ConfigError, match="spread='late'"):
        BudgetPruning(0.5, spread="late")
