"""Which samples are kept: without bias, the same for any range, anew in every epoch."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infobatch_stream.planning.rng import Draws, Purpose
from infobatch_stream.planning.selection import Selection
from infobatch_stream.policies.pruning import FullData, QuantilePruning, SoftPruning
from infobatch_stream.score_stats import Summary

quick = settings(deadline=None, max_examples=60, derandomize=True)

# Every one keeps all of its samples with a probability above 0.
UNBIASED = [
    FullData(),
    SoftPruning(),
    SoftPruning(ratio=0.1),
    SoftPruning(ratio=0.9),
    QuantilePruning(),
    QuantilePruning((0.5,), (0.1, 0.7)),
    QuantilePruning((0.3, 0.6, 0.9), (2**-6, 1.0, 0.3, 0.9)),
]
DROPPING = QuantilePruning((0.25, 0.75), (0.0, 0.5, 1.0))


def losses(count, seed=0, unseen=0.0):
    rng = np.random.default_rng(seed)
    scores = rng.gamma(1.0, 1.0, count).astype(np.float32)
    scores[rng.random(count) < unseen] = np.nan
    return scores


def select(scores, policy=SoftPruning(), seed=1, epoch=2):  # noqa: B008 - a policy is immutable
    return Selection(scores, policy.rule(Summary(scores)), seed, epoch)


def chances(scores, policy):
    """The keep probability of each sample, in whole multiples of 2^-16, by definition."""
    seen = ~np.isnan(scores)
    chance = np.ones(scores.size)
    chance[seen] = np.rint(policy.rule(Summary(scores))(scores[seen]) * 2**16) / 2**16
    return chance


def uniforms(seed, epoch, size):
    """The 16-bit uniform of each sample, by definition."""
    upper, lower = (Draws(seed, epoch, half).of8(0, size) for half in (Purpose.SELECT, Purpose.SELECT_FINELY))
    return upper.astype(np.int64) * 256 + lower


def kept_of(selection, size):
    return np.flatnonzero(selection.keep(0, size))


@pytest.mark.parametrize("policy", UNBIASED, ids=repr)
def test_the_weighted_sum_over_kept_samples_is_unbiased(policy):
    size, epochs = 2000, 600
    scores = losses(size, unseen=0.2)
    value = np.random.default_rng(1).normal(1.0, 2.0, size) * np.nan_to_num(scores, nan=1.0)  # gradients go with losses
    sums = []
    for epoch in range(epochs):
        selection = select(scores, policy, epoch=epoch)
        kept = kept_of(selection, size)
        sums.append(np.sum(selection.weight(kept).astype(np.float64) * value[kept]))
    chance = chances(scores, policy)
    error = np.sqrt(np.sum(value**2 * (1 - chance) / chance) / epochs)  # of the mean over the epochs
    assert abs(np.mean(sums) - value.sum()) <= 4 * error + 1e-9 * np.abs(value).sum()
    assert np.std(sums) == pytest.approx(error * np.sqrt(epochs), rel=0.15, abs=1e-9)


@pytest.mark.parametrize("policy", [*UNBIASED, DROPPING], ids=repr)
def test_samples_that_were_never_seen_are_always_kept_with_weight_1(policy):
    scores = losses(3000, unseen=0.3)
    unseen = np.flatnonzero(np.isnan(scores))
    for epoch in range(20):
        selection = select(scores, policy, epoch=epoch)
        assert np.all(selection.keep(0, 3000)[unseen])
        assert np.all(selection.weight(unseen) == 1)


def test_without_a_rule_everything_is_kept_with_weight_1():
    selection = Selection(losses(1000), None, 1, 2)
    assert selection.keeps_all
    assert np.all(selection.keep(3, 1000))
    assert np.all(selection.weight(np.arange(1000)) == 1)


@pytest.mark.parametrize("policy", [*UNBIASED, DROPPING], ids=repr)
def test_a_weight_is_one_over_the_probability_that_was_drawn_against(policy):
    scores = losses(5000, unseen=0.1)
    selection = select(scores, policy, seed=5, epoch=6)
    units = np.rint(chances(scores, policy) * 2**16).astype(np.int64)
    np.testing.assert_array_equal(selection.keep(0, 5000), uniforms(5, 6, 5000) < units)
    kept = kept_of(selection, 5000)
    np.testing.assert_array_equal(selection.weight(kept), (2**16 / units[kept]).astype(np.float32))
    assert selection.weight(kept).dtype == np.float32


def test_a_draw_that_equals_the_probability_drops_the_sample():
    """Else every probability were 2^-16 too large, and samples of probability 0 were kept with an infinite weight."""
    scores = np.arange(4_000_000, dtype=np.float32)
    units = np.rint(chances(scores, DROPPING) * 2**16).astype(np.int64)
    drawn = uniforms(1, 2, scores.size)
    kept = select(scores, DROPPING).keep(0, scores.size)
    for unit in (0, 2**15):
        edge = (drawn == unit) & (units == unit)
        assert np.any(edge)
        assert not np.any(kept[edge])
    assert np.all(kept[units == 2**16])


def test_a_band_of_probability_0_is_never_kept():
    scores = np.arange(400, dtype=np.float32)
    for epoch in range(30):
        assert kept_of(select(scores, DROPPING, epoch=epoch), 400).min() >= 100


SCORES = losses(5000, unseen=0.2)


@quick
@given(start=st.integers(0, 5000), stop=st.integers(0, 5000), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 999))
def test_a_range_is_decided_as_in_the_whole(start, stop, seed, epoch):
    start, stop = sorted((start, stop))
    selection = select(SCORES, seed=seed, epoch=epoch)
    np.testing.assert_array_equal(selection.keep(start, stop), selection.keep(0, 5000)[start:stop])


@quick
@given(index=st.lists(st.integers(0, 4999), max_size=50))
def test_a_weight_is_a_function_of_the_sample_alone(index):
    selection = select(SCORES)
    index = np.array(index, dtype=np.int64)
    np.testing.assert_array_equal(selection.weight(index), selection.weight(np.arange(5000))[index])


def test_the_decision_repeats_for_the_same_seed_and_epoch_and_is_another_for_any_other():
    scores = losses(2000)
    settings_of = [(seed, epoch) for seed in (0, 1, 2**63, 2**64 - 1) for epoch in (0, 1, 2, 89)]
    seen = {select(scores, seed=seed, epoch=epoch).keep(0, 2000).tobytes() for seed, epoch in settings_of}
    assert len(seen) == len(settings_of)
    again = {select(scores.copy(), seed=seed, epoch=epoch).keep(0, 2000).tobytes() for seed, epoch in settings_of}
    assert again == seen


@pytest.mark.parametrize("other", [(1, 3), (2, 2)], ids=["next epoch", "next seed"])
def test_decisions_of_two_epochs_or_seeds_are_independent(other):
    size = 200_000
    scores = np.ones(size, dtype=np.float32)
    policy = QuantilePruning((), (0.5,))
    one, two = select(scores, policy).keep(0, size), select(scores, policy, *other).keep(0, size)
    for first, second in [(one, two), (one[:-1], two[1:]), (one[:-1], one[1:])]:
        both = np.count_nonzero(first & second)
        assert abs(both - size / 4) <= 5 * np.sqrt(size * 3 / 16)


@pytest.mark.parametrize("keep", [2**-10, 0.1, 0.25, 1 / 3, 0.5, 0.9, 1 - 2**-10])
def test_the_kept_share_of_a_band_is_its_probability(keep):
    size = 400_000
    policy = QuantilePruning((0.5,), (keep, 1.0))
    scores = np.arange(size, dtype=np.float32)
    kept = select(scores, policy).keep(0, size)
    band = size // 2
    chance = round(keep * 2**16) / 2**16
    assert abs(np.count_nonzero(kept[:band]) - band * chance) <= 5 * np.sqrt(band * chance * (1 - chance))
    assert np.all(kept[band:])


@quick
@given(
    ranges=st.lists(st.tuples(st.integers(0, 2**50), st.integers(0, 80)), min_size=1, max_size=8),
    lane=st.integers(0, 99),
    width=st.sampled_from(["of8", "of16"]),
)
def test_the_draw_of_a_position_depends_on_nothing_that_was_drawn_before(ranges, lane, width):
    shared = getattr(Draws(3, 4, Purpose.WINDOW, lane), width)
    for start, size in ranges:
        around = getattr(Draws(3, 4, Purpose.WINDOW, lane), width)(max(start - 37, 0), start + size)
        np.testing.assert_array_equal(shared(start, start + size), around[around.size - size :])


def test_draws_of_threads_that_share_them_are_those_of_one():
    draws = Draws(3, 4, Purpose.SELECT)
    expected = Draws(3, 4, Purpose.SELECT).of8(0, 64_000)
    with ThreadPoolExecutor(4) as pool:
        parts = pool.map(lambda start: draws.of8(start, start + 100), range(0, 64_000, 100))
    np.testing.assert_array_equal(np.concatenate(list(parts)), expected)


@pytest.mark.parametrize("policy", [*UNBIASED, DROPPING], ids=repr)
@pytest.mark.parametrize(
    "ranges", [[(0, 3000)], [(2990, 3000), (0, 0), (17, 400), (5, 17)], [(k, 2500 + k) for k in range(0, 400, 20)]]
)
def test_samples_chosen_from_ranges_are_those_that_are_kept_there(policy, ranges):
    selection = select(losses(3000, unseen=0.2), policy)
    index, weight = selection.choose(*np.array(ranges).T)
    np.testing.assert_array_equal(
        index, np.concatenate([start + np.flatnonzero(selection.keep(start, stop)) for start, stop in ranges])
    )
    np.testing.assert_array_equal(weight, selection.weight(index))


class Proportional:
    """A rule that is no step function."""

    threshold = np.nan

    def __call__(self, scores):
        return np.clip(scores / 2, 0.15, 1)


def test_any_rule_is_drawn_against_and_weighed_alike():
    scores = losses(5000, unseen=0.2)
    selection = Selection(scores, Proportional(), 1, 2)
    units = np.where(np.isnan(scores), 2**16, np.rint(np.clip(np.nan_to_num(scores) / 2, 0.15, 1) * 2**16))
    kept = selection.keep(0, 5000)
    np.testing.assert_array_equal(kept, uniforms(1, 2, 5000) < units)
    np.testing.assert_array_equal(selection.weight(np.flatnonzero(kept)), (2**16 / units[kept]).astype(np.float32))


@pytest.mark.parametrize("width", ["of8", "of16"])
def test_draws_are_uniform(width):
    drawn = getattr(Draws(11, 3, Purpose.WINDOW, 7), width)(5, 5 + 256_000)
    top = drawn.view(np.uint8).reshape(-1, drawn.itemsize)
    for byte in range(drawn.itemsize):
        counts = np.bincount(top[:, byte], minlength=256)
        chi_square = np.sum((counts - 1000) ** 2 / 1000)  # 255 degrees of freedom: 255 +- 22.6
        assert abs(chi_square - 255) < 5 * 22.6
