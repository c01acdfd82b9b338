"""The policies of other papers: what they keep, how that moves through a run, and that nothing is rescaled."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from infobatch_stream import InfoBatchLoader, KakurenboPruning, OrderPruning, SetaPruning
from infobatch_stream.errors import ConfigError
from infobatch_stream.planning.selection import Selection
from infobatch_stream.policies.base import Moment
from infobatch_stream.policies.kakurenbo import HidingPruning
from infobatch_stream.policies.pruning import FullData
from infobatch_stream.policies.seta import WindowPruning
from infobatch_stream.score_stats import Summary

quick = settings(deadline=None, max_examples=60, derandomize=True)

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
some_scores = arrays(np.float32, st.integers(1, 300), elements=finite | st.just(math.nan) | st.sampled_from([0, 1, 2]))
real_losses = st.floats(0, 100, width=32, allow_subnormal=False) | st.sampled_from([0.0, -0.0, 1.0, 2.0])
COMPARATORS = [SetaPruning(), SetaPruning(0.0, 10, 0.5), OrderPruning(), KakurenboPruning()]
every_comparator = pytest.mark.parametrize("policy", COMPARATORS, ids=repr)


def losses(count, seed=0):
    return np.random.default_rng(seed).gamma(0.5, 1.0, count).astype(np.float32)


def moment(epoch, epochs=100):
    return Moment(epoch, epochs, epochs, 1000, None, None)


def chances(policy, scores, include=None):
    """Keep probabilities of all samples, those without a score included."""
    rule = policy.rule(Summary(scores, include=include))
    chance = np.full(scores.size, rule.unseen)
    seen = ~np.isnan(scores)
    chance[seen] = rule(scores[seen])
    return chance if include is None else chance[include]


# --- what they have in common


@every_comparator
def test_what_is_kept_weighs_1(policy):
    scores = losses(3000)
    scores[::7] = np.nan
    for epoch in (0, 1, 2, 50, 99):
        chosen = policy.at(moment(epoch)) if hasattr(policy, "at") else policy
        selection = Selection(scores, chosen.rule(Summary(scores)), 1, epoch)
        index, weight = selection.choose(np.array([0]), np.array([scores.size]))
        np.testing.assert_array_equal(index, np.flatnonzero(selection.keep(0, scores.size)))
        np.testing.assert_array_equal(weight, 1)
        np.testing.assert_array_equal(selection.weight(index), 1)


@every_comparator
def test_samples_without_a_score_are_kept_as_often_as_the_rule_says(policy):
    scores = np.full(200_000, np.nan, np.float32)
    scores[::2] = losses(100_000)
    chosen = policy.at(moment(1)) if hasattr(policy, "at") else policy
    rule = chosen.rule(Summary(scores))
    kept = Selection(scores, rule, 1, 1).keep(0, scores.size)[1::2]
    assert kept.mean() == pytest.approx(rule.unseen, abs=0.006)
    assert kept.all() == (rule.unseen == 1)


@every_comparator
def test_a_run_is_the_same_again_and_when_it_is_resumed(tmp_path, policy):
    def start(name, **options):
        data = list(range(400))
        return InfoBatchLoader(data, tmp_path / name, batch_size=20, epochs=6, policy=policy, **options)

    def train(loader, epochs, state=None):
        drawn = []
        for _ in range(epochs):
            for _, picks in loader:
                loader.update(losses_now[picks.index] / (1 + loader.epoch), picks)
                drawn.append((loader.epoch, picks.index.tolist()))
                assert set(picks.weight.tolist()) <= {0.0, 1.0}
        return drawn

    losses_now = torch.from_numpy(losses(400))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = start("a.zarr"), start("b.zarr")
        whole = train(first, 6)
        assert train(second, 3) == whole[: sum(epoch < 3 for epoch, _ in whole)]
        state = second.state_dict()
        del second
        third = start("b.zarr", existing="continue")
        third.load_state_dict(state)
        assert train(third, 3) == whole[-sum(epoch >= 3 for epoch, _ in whole) :]
    assert 0.1 < first.stats["saved"] < 0.6


# --- KAKURENBO


@quick
@given(scores=some_scores, fraction=st.floats(0.01, 0.99))
def test_the_hidden_share_is_the_fraction_as_far_as_there_are_scores(scores, fraction):
    chance = chances(HidingPruning(fraction), scores)
    unseen = np.isnan(scores)
    assert chance.sum() == pytest.approx(max((1 - fraction) * scores.size, unseen.sum()), abs=scores.size * 2**-10)
    assert np.all(chance[unseen] == 1)


@quick
@given(scores=some_scores, fraction=st.floats(0.01, 0.99))
def test_the_lowest_are_hidden_and_only_equal_ones_by_chance(scores, fraction):
    scores = np.sort(scores[~np.isnan(scores)])
    chance = chances(HidingPruning(fraction), scores)
    assert np.all(np.diff(chance) >= 0)
    assert np.unique(scores[(chance > 0) & (chance < 1)]).size <= 1


def test_equal_losses_are_hidden_by_chance_up_to_the_fraction():
    scores = np.zeros(10_000, np.float32)
    scores[:4000] = 1.0
    kept = Selection(scores, HidingPruning(0.3).rule(Summary(scores)), 1, 1).keep(0, scores.size)
    assert kept[:4000].all()
    assert kept.mean() == pytest.approx(0.7, abs=0.02)


def test_what_a_mask_leaves_out_does_not_count():
    scores, include = losses(1000), np.arange(1000) < 200
    scores[200:] += 10
    assert chances(HidingPruning(0.3), scores, include).mean() == pytest.approx(0.7, abs=0.01)


def test_the_hidden_fraction_falls_by_the_factors_of_the_paper():
    policy = KakurenboPruning()
    found = [policy.at(moment(epoch)) for epoch in range(100)]
    assert found[0] == FullData()
    fractions = [one.fraction for one in found[1:]]
    assert fractions == pytest.approx([0.3] * 29 + [0.24] * 30 + [0.18] * 20 + [0.12] * 20)
    assert KakurenboPruning(0.0).at(moment(5)) == FullData()


# --- OrderDP


@quick
@given(scores=some_scores, subset=st.floats(0.05, 1), top=st.floats(0.05, 1))
def test_every_epoch_keeps_the_same_share_whatever_the_scores(scores, subset, top):
    chance = chances(OrderPruning(subset, top), scores)
    assert chance.mean() == pytest.approx(subset * top, abs=2**-10)
    assert np.all(chance <= subset)


def test_the_keep_probability_is_that_of_the_highest_of_a_random_subset():
    """By drawing as the paper says: without replacement, then a sort."""
    size, draws = 4000, 400
    scores = losses(size)
    kept = np.zeros(size)
    rng = np.random.default_rng(1)
    for _ in range(draws):
        subset = rng.choice(size, int(0.75 * size), replace=False)
        kept[subset[np.argsort(-scores[subset])[: int(0.85 * subset.size)]]] += 1
    order = np.argsort(scores)
    wanted = (kept / draws)[order].reshape(40, -1).mean(axis=1)  # by rank, in steps of 2.5 %
    found = chances(OrderPruning(), scores)[order].reshape(40, -1).mean(axis=1)
    near = np.abs(np.arange(40) - 5.5) < 1  # where the cut is at 15 %, by chance on one side or the other
    np.testing.assert_allclose(found[~near], wanted[~near], atol=0.01)
    np.testing.assert_allclose(found[near], wanted[near], atol=0.15)


# --- SeTa


@pytest.mark.parametrize("ratio", [0.0, 0.25])
def test_the_window_slides_from_easy_to_hard_and_begins_anew(ratio):
    groups = np.arange(6000) % 6
    scores = (groups + np.random.default_rng(0).uniform(0, 0.1, 6000)).astype(np.float32)
    policy = SetaPruning(ratio, groups=6, window=0.5, delta=0.75)
    windows = []
    for epoch in range(12):
        chance = chances(policy.at(moment(epoch, 12)), scores)
        assert set(chance) <= {0.0, 1 - ratio}
        windows.append(sorted(set(groups[chance > 0].tolist())))
        assert np.all(chance[np.isin(groups, windows[-1])] == 1 - ratio)  # whole groups
    everything = [0, 1, 2, 3, 4, 5]
    sliding = [[1, 2, 3], [2, 3, 4], [3, 4, 5], [0, 1, 2]]
    assert windows == [everything, *sliding, *sliding, *[everything] * 3]


def starts_of(scores, groups):
    """Where clusters begin: the lower edges of windows of one of them."""
    rules = [WindowPruning(1.0, groups, 1e-9, turn).rule(Summary(scores)) for turn in range(groups)]
    return sorted({rule.threshold for rule in rules})


@quick
@given(scores=arrays(np.float32, st.integers(1, 300), elements=real_losses), groups=st.integers(2, 12))
def test_clusters_are_not_empty_and_each_score_is_in_that_of_the_nearest_mean(scores, groups):
    starts = starts_of(scores, groups)
    cluster = np.searchsorted(starts, scores, "right") - 1
    assert cluster.min() == 0
    assert set(cluster) == set(range(len(starts)))
    assert len(starts) <= groups
    wide = scores.astype(np.float64)
    means = np.array([wide[cluster == one].mean() for one in range(len(starts))])
    best = np.abs(wide[:, None] - means).min(axis=1)
    np.testing.assert_array_less(np.abs(wide - means[cluster]), best + 0.02 * wide.max() + 1e-30)  # steps of the tally


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_distinct_losses_are_clusters_of_their_own(count):
    scores = np.repeat(np.float32([3, 0, 1, 7, 20])[:count], 100)
    assert starts_of(scores, 5) == sorted(set(scores.tolist()))


def test_clusters_are_about_as_good_as_the_best():
    """The squared distances to the means, against those of the best cuts, found by dynamic programming."""
    scores = np.sort(losses(400))
    wide = scores.astype(np.float64)
    ends, sums, squares = (np.append(0, np.cumsum(part)) for part in (np.ones(400), wide, wide**2))
    low, high = np.meshgrid(np.arange(401), np.arange(401), indexing="ij")
    size = np.maximum(ends[high] - ends[low], 1)
    cost = squares[high] - squares[low] - (sums[high] - sums[low]) ** 2 / size
    cost[low > high] = np.inf
    best = cost[0]
    for _ in range(4):
        best = (best[:, None] + cost).min(axis=0)
    cluster = np.searchsorted(starts_of(scores, 5), scores, "right")
    found = sum(((wide[cluster == one] - wide[cluster == one].mean()) ** 2).sum() for one in set(cluster))
    assert found < 1.1 * best[-1]


@quick
@given(
    scores=arrays(np.float32, st.integers(1, 100), elements=real_losses | st.just(math.nan)),
    groups=st.integers(1, 12),
    window=st.floats(0.01, 1),
    turn=st.integers(0, 1000),
)
def test_no_window_is_empty(scores, groups, window, turn):
    assert chances(WindowPruning(1.0, groups, window, turn), scores).any()


def test_a_window_has_its_lower_end_as_threshold():
    scores = losses(1000)
    rule = SetaPruning(0.0, 10, 0.5).at(moment(3)).rule(Summary(scores))
    kept = scores[rule(scores) > 0]
    assert scores[scores < kept.min()].max() < rule.threshold <= kept.min()


# --- values that cannot be


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SetaPruning(1.0), ["ratio=1.0", "keeps nothing"]),
        (lambda: SetaPruning(-0.1), ["ratio=-0.1", "[0, 1]"]),
        (lambda: SetaPruning(window=0), ["window=0", "keeps nothing"]),
        (lambda: SetaPruning(groups=0), ["groups=0", "1..1000"]),
        (lambda: SetaPruning(delta="all"), ["delta='all'", "[0, 1]"]),
        (lambda: SetaPruning(0.9999), ["0.9999", "2^-10"]),
        (lambda: OrderPruning(0.0), ["subset=0.0", "(0, 1]"]),
        (lambda: OrderPruning(top=1.5), ["top=1.5", "(0, 1]"]),
        (lambda: OrderPruning(0.01, 0.01), ["0.0001", "2^-10"]),
        (lambda: OrderPruning("half"), ["subset='half'", "(0, 1]"]),
        (lambda: KakurenboPruning(1.0), ["fraction=1.0", "[0, 1)"]),
        (lambda: KakurenboPruning(math.nan), ["fraction=nan", "[0, 1)"]),
        (lambda: KakurenboPruning(milestones=(0.6, 0.3, 0.8)), ["(0.6, 0.3, 0.8)", "increase"]),
        (lambda: KakurenboPruning(factors=(1, 2)), ["(1.0, 2.0)", "one more"]),
        (lambda: KakurenboPruning(factors=(1, 1, 1, 2)), ["2.0)", "in [0, 1]"]),
        (lambda: KakurenboPruning("some"), ["fraction='some'", "a number and two lists"]),
    ],
)
def test_impossible_parameters_name_what_was_found_and_what_is_allowed(make, words):
    with pytest.raises(ConfigError) as caught:
        make()
    assert [word for word in words if word not in str(caught.value)] == []
