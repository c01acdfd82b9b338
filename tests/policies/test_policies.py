"""Policies and the summary they see: one contract for every policy; exact facts from chunked passes."""

import math
import re
from functools import reduce
from operator import add

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from support.paths import ROOT

from infobatch_stream import score_stats as summary_module
from infobatch_stream.errors import ConfigError
from infobatch_stream.loader import InfoBatchLoader
from infobatch_stream.policies.base import StepRule
from infobatch_stream.policies.budget import ProportionalPruning
from infobatch_stream.policies.kakurenbo import HidingPruning
from infobatch_stream.policies.order import OrderPruning
from infobatch_stream.policies.pruning import FullData, QuantilePruning, SoftPruning
from infobatch_stream.policies.seta import WindowPruning
from infobatch_stream.score_stats import Summary

quick = settings(deadline=None, max_examples=60, derandomize=True)

POLICIES = [
    FullData(),
    SoftPruning(),
    SoftPruning(ratio=0.0),
    SoftPruning(ratio=0.3),
    SoftPruning(ratio=1 - 2**-10),
    QuantilePruning(),
    QuantilePruning((0.5,), (0.1, 1.0)),
    QuantilePruning((), (0.5,)),
    QuantilePruning([0.1, 0.5, 0.9], [2**-10, 0.25, 0.0, 1.0]),
    ProportionalPruning(0.0, 0.5, 0.15),
    ProportionalPruning(0.5, 0.5, 0.15),
    ProportionalPruning(0.9, 2.0, 2**-10),
    ProportionalPruning(0.3, 0.0, 1.0),
    HidingPruning(0.3),
    OrderPruning(),
    OrderPruning(1.0, 2**-10),
    WindowPruning(1.0, 1, 0.5, 0),
    WindowPruning(0.9, 5, 0.9, 1),
    WindowPruning(2**-10, 10, 0.5, 7),
]
# The others skip a share that was asked for, whatever the scores.
KEEP_EQUAL_SCORES = [
    policy
    for policy in POLICIES
    if isinstance(policy, FullData | SoftPruning | QuantilePruning) and policy != QuantilePruning((), (0.5,))
]
every_policy = pytest.mark.parametrize("policy", POLICIES, ids=repr)

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
scores_without_nan = arrays(np.float32, st.integers(1, 200), elements=finite)
scores_with_nan = arrays(np.float32, st.integers(1, 200), elements=finite | st.just(math.nan))


def losses(count, seed=0):
    return np.random.default_rng(seed).gamma(1.0, 1.0, count).astype(np.float32)


# --- the contract of every policy


@every_policy
@quick
@given(scores=scores_without_nan)
def test_a_rule_gives_one_allowed_probability_per_score(policy, scores):
    chance = policy.rule(Summary(scores))(scores)
    assert chance.shape == scores.shape
    assert chance.dtype == np.float64
    assert np.all((chance == 0) | ((chance >= 2**-10) & (chance <= 1)))


@every_policy
@quick
@given(scores=scores_without_nan, cut=st.integers(0, 200))
def test_a_rule_looks_at_each_score_alone(policy, scores, cut):
    rule = policy.rule(Summary(scores))
    before = scores.copy()
    whole = rule(scores)
    np.testing.assert_array_equal(np.concatenate([rule(scores[:cut]), rule(scores[cut:])]), whole)
    np.testing.assert_array_equal(rule(scores[::-1]), whole[::-1])
    np.testing.assert_array_equal(scores, before)


@every_policy
def test_equal_policies_make_equal_rules(policy):
    scores = losses(1000)
    again = type(policy)(*vars(policy).values())
    assert again == policy
    assert hash(again) == hash(policy)
    np.testing.assert_array_equal(policy.rule(Summary(scores))(scores), again.rule(Summary(scores.copy()))(scores))


@pytest.mark.parametrize("policy", KEEP_EQUAL_SCORES, ids=repr)
@quick
@given(score=finite, count=st.integers(1, 2000))
def test_equal_scores_prune_nothing(policy, score, count):
    scores = np.full(count, score, dtype=np.float32)
    assert np.all(policy.rule(Summary(scores))(scores) == 1)


@every_policy
def test_a_policy_cannot_be_changed_after_it_was_checked(policy):
    with pytest.raises(AttributeError):
        policy.ratio = 2.0


# --- what each policy does


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.9])
@quick
@given(scores=scores_without_nan)
def test_soft_pruning_drops_exactly_below_the_mean(ratio, scores):
    facts = Summary(scores)
    rule = SoftPruning(ratio).rule(facts)
    below = scores.astype(np.float64) < facts.mean
    np.testing.assert_array_equal(rule(scores), np.where(below, 1 - ratio, 1.0))
    assert rule.threshold == facts.mean


def test_a_mean_between_two_float32_values_splits_them():
    low = np.float32(1)
    scores = np.array([low, np.nextafter(low, np.float32(2))], dtype=np.float32)
    np.testing.assert_array_equal(SoftPruning(0.5).rule(Summary(scores))(scores), [0.5, 1.0])


@quick
@given(scores=scores_without_nan)
def test_quantile_pruning_puts_at_most_its_share_into_the_lower_bands(scores):
    policy = QuantilePruning((0.2, 0.85), (0.25, 0.5, 1.0))
    chance = policy.rule(Summary(scores))(scores)
    assert np.count_nonzero(chance == 0.25) <= 0.2 * scores.size
    assert np.count_nonzero(chance < 1) <= 0.85 * scores.size


def test_quantile_pruning_cuts_distinct_scores_at_its_shares():
    scores = np.random.default_rng(0).permutation(np.arange(1000, dtype=np.float32))
    policy = QuantilePruning()
    chance = policy.rule(Summary(scores))(scores)
    expected = np.select([scores < 200, scores < 850], [0.25, 0.5], 1.0)
    np.testing.assert_array_equal(chance, expected)
    assert policy.rule(Summary(scores)).threshold == 850


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SoftPruning(1.0), ["1.0", "[0, 1)", "FullData"]),
        (lambda: SoftPruning(-0.1), ["-0.1", "[0, 1)"]),
        (lambda: SoftPruning(math.nan), ["nan", "[0, 1)"]),
        (lambda: SoftPruning(math.inf), ["inf", "[0, 1)"]),
        (lambda: SoftPruning(0.9999), ["0.9999", "2^-10", "1024"]),
        (lambda: SoftPruning("0.5"), ["ratio='0.5'", "[0, 1)"]),
        (lambda: QuantilePruning(quantiles=0.5), ["quantiles=0.5", "lists of numbers"]),
        (lambda: QuantilePruning(keep=("a", "b", "c")), ["keep=('a', 'b', 'c')", "lists of numbers"]),
        (lambda: QuantilePruning((0.5, 0.2), (0.1, 0.2, 1.0)), ["(0.5, 0.2)", "increase", "(0, 1)"]),
        (lambda: QuantilePruning((0.5, 0.5), (0.1, 0.2, 1.0)), ["(0.5, 0.5)", "increase"]),
        (lambda: QuantilePruning((0.0, 0.5), (0.1, 0.2, 1.0)), ["(0.0, 0.5)", "(0, 1)"]),
        (lambda: QuantilePruning((0.5, 1.0), (0.1, 0.2, 1.0)), ["(0.5, 1.0)", "(0, 1)"]),
        (lambda: QuantilePruning((0.5, math.nan), (0.1, 0.2, 1.0)), ["nan", "increase"]),
        (lambda: QuantilePruning((0.5,), (0.1, 0.2, 1.0)), ["1 quantiles make 2 bands", "3 probabilities"]),
        (lambda: QuantilePruning((0.2, 0.5), (1.0,)), ["2 quantiles make 3 bands", "1 probabilities"]),
        (lambda: QuantilePruning((0.5,), (0.5, 1.5)), ["1.5", "[2^-10, 1]"]),
        (lambda: QuantilePruning((0.5,), (-0.5, 1.0)), ["-0.5", "[2^-10, 1]"]),
        (lambda: QuantilePruning((0.5,), (2**-11, 1.0)), ["0.000488281", "[2^-10, 1]"]),
        (lambda: QuantilePruning((0.5,), (math.nan, 1.0)), ["nan", "[2^-10, 1]"]),
        (lambda: QuantilePruning((0.5,), (0.0, 0.0)), ["(0.0, 0.0)", "above 0"]),
    ],
)
def test_impossible_parameters_name_what_was_found_and_what_is_allowed(make, words):
    with pytest.raises(ConfigError) as caught:
        make()
    assert [word for word in words if word not in str(caught.value)] == []


# --- the summary


@quick
@given(scores=scores_with_nan)
def test_the_mean_is_that_of_the_seen_scores_in_float64(scores):
    seen = scores[~np.isnan(scores)].astype(np.float64)
    facts = Summary(scores)
    assert facts.count == seen.size
    if seen.size:
        assert facts.mean == pytest.approx(math.fsum(seen) / seen.size, rel=0, abs=1e-14 * np.abs(seen).sum())
        assert facts.largest == seen.max()
    else:
        assert math.isnan(facts.mean)
        assert math.isnan(facts.largest)


@quick
@given(score=finite, count=st.integers(1, 5000))
def test_no_score_is_below_the_mean_of_equal_scores(score, count):
    scores = np.full(count, score, dtype=np.float32)
    facts = Summary(scores)
    assert facts.mean <= facts.largest == scores[0]
    assert not np.any(scores < facts.mean)


@pytest.mark.parametrize("count", [(1 << 17) - 1, 1 << 17, (1 << 17) + 1, (2 << 17) + 3])
def test_facts_are_right_at_the_bounds_of_the_chunks(count):
    scores = losses(count) - np.float32(0.5)
    scores[::7] = np.nan
    seen = np.sort(scores[~np.isnan(scores)])
    facts = Summary(scores)
    shares = (0.0, 0.001, 0.2, 0.5, 0.85, 0.999, 1.0)
    assert facts.count == seen.size
    assert facts.mean == pytest.approx(seen.mean(dtype=np.float64), rel=1e-13)
    assert facts.quantiles(shares) == [seen[min(math.floor(q * seen.size), seen.size - 1)] for q in shares]


def test_the_mean_does_not_depend_on_the_order_of_the_chunks(monkeypatch):
    monkeypatch.setattr(summary_module, "_CHUNK", 8)
    blocks = losses(800).reshape(100, 8) * np.float32(10) ** np.arange(-20, 30, 0.5, dtype=np.float32)[:, None]
    orders = [np.random.default_rng(seed).permutation(100) for seed in range(20)]
    sums = [blocks[order].sum(axis=1, dtype=np.float64).tolist() for order in orders]
    assert len({reduce(add, some) for some in sums}) > 1  # not sum(), which is exacter from Python 3.12 on
    assert len({Summary(blocks[order].reshape(-1)).mean for order in orders}) == 1


def test_the_mean_does_not_depend_on_the_memory_layout():
    scores = losses(100_000)
    assert Summary(np.stack([scores, scores], axis=1)[:, 0]).mean == Summary(scores).mean


@pytest.mark.parametrize("chunk", [1, 3, 64, 1000])
def test_no_fact_depends_on_the_size_of_the_chunks_beyond_rounding(chunk, monkeypatch):
    scores = losses(997)
    scores[100:300] = np.nan
    whole = Summary(scores)
    monkeypatch.setattr(summary_module, "_CHUNK", chunk)
    parts = Summary(scores)
    assert (parts.count, parts.largest) == (whole.count, whole.largest)
    assert parts.mean == pytest.approx(whole.mean, rel=1e-15)
    assert parts.quantiles((0.1, 0.5, 0.9)) == whole.quantiles((0.1, 0.5, 0.9))


special = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0**-149, -(2.0**-149), 2.0**-126, 3.4028234663852886e38, math.nan])


@quick
@given(
    scores=arrays(np.float32, st.integers(1, 60), elements=special | finite),
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=5),
)
def test_quantiles_are_elements_of_the_sorted_scores(scores, shares):
    seen = np.sort(scores[~np.isnan(scores)])
    facts = Summary(scores)
    if not seen.size:
        with pytest.raises(ValueError, match="no sample has a score"):
            facts.quantiles(shares)
        return
    assert facts.quantiles(shares) == [float(seen[min(math.floor(q * seen.size), seen.size - 1)]) for q in shares]


# ---- a policy of one's own

PAGE = ROOT / "docs" / "policies.md"


class Own:
    """Of which the rule is ``made``."""

    def __init__(self, made):
        self.made = made

    def rule(self, summary):
        return self.made

    def __repr__(self):
        return "Own()"


def run_with(path, policy, epochs=4, **options):
    """The loader after three epochs; the loss of sample i is i."""
    loader = InfoBatchLoader(range(1000), path, batch_size=50, epochs=epochs, policy=policy, **options)
    for _ in range(3):
        for x, picks in loader:
            loader.update(x.float(), picks)
    return loader


def test_what_docs_policies_shows_runs_and_keeps_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": __name__}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S):
        exec(block, names)
    assert names["loader"].epoch == 4
    middle = run_with("middle.zarr", names["Middle"]())
    assert middle.stats["kept"] == pytest.approx(490 + 510 / 4, abs=50)
    assert math.isnan(middle.stats["threshold"])
    stepped = run_with("stepped.zarr", names["Stepped"]())
    assert stepped.stats["kept"] == pytest.approx(500 + 500 / 4, abs=50)
    assert stepped.stats["threshold"] == 500
    growing = run_with("growing.zarr", names["Growing"]())
    assert growing.kept_share == pytest.approx(1 - 0.5 * 0.5 * 2 / 3, abs=0.05)


@pytest.mark.parametrize(
    "rule",
    [
        lambda scores: torch.full((len(scores),), 0.5),
        lambda scores: np.full(scores.shape, 0.5, dtype=np.float16),
        lambda scores: [0.5] * len(scores),
    ],
    ids=["tensor", "float16", "list"],
)
def test_any_array_of_probabilities_will_do(tmp_path, rule):
    loader = run_with(tmp_path / "scores.zarr", Own(rule))
    assert loader.kept_share == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (None, r"Own\(\)\.rule\(summary\) returned NoneType; it must return a function"),
        (0.5, "returned float; it must return a function"),
        (lambda scores: 0.5, r"returned float for 64 scores; .* one keep probability per score, float64\[64\]"),
        (lambda scores: scores[:3], r"returned ndarray\[3\] for 64 scores"),
        (lambda scores: None, "returned NoneType for 64 scores"),
        (lambda scores: ["half"] * len(scores), "returned list for 64 scores"),
        (lambda scores: scores, r"keeps with probability .*\[2\^-10, 1\]"),
        (lambda scores: np.full(scores.shape, np.nan), "keeps with probability nan"),
        (lambda scores: np.full(scores.shape, -0.5), "keeps with probability -0.5"),
    ],
)
def test_a_rule_that_is_none_is_refused_when_the_loader_is_made(tmp_path, rule, text):
    with pytest.raises(ConfigError, match=text):
        InfoBatchLoader(range(100), tmp_path / "scores.zarr", batch_size=10, epochs=4, policy=Own(rule))


def test_a_rule_that_goes_wrong_with_the_real_scores_is_refused_too(tmp_path):
    with pytest.raises(ConfigError, match=r"keeps with probability 0\.0005"):
        run_with(tmp_path / "scores.zarr", Own(lambda scores: np.where(scores > 900, 0.0005, 1.0)))


def test_a_rule_in_a_schedule_is_tried_too(tmp_path):
    class Scheduled:
        def __repr__(self):
            return "Scheduled()"

        def check(self, moment):
            return ""

        def at(self, moment):
            return Own(None)

    scheduled = Scheduled()
    with pytest.raises(ConfigError, match="must return a function"):
        InfoBatchLoader(range(100), tmp_path / "scores.zarr", batch_size=10, epochs=4, policy=scheduled)


@pytest.mark.parametrize(
    ("edges", "keep", "text"),
    [
        ((1.0,), (0.5,), r"n edges, none below the one before, part n \+ 1 probabilities"),
        ((2.0, 1.0), (0.5, 0.5, 1.0), "none below"),
        ((1.0,), (2.0, 1.0), "keeps with probability 2"),
        ((math.nan, 1.0), (0.5, 0.5, 1.0), "none below"),
    ],
)
def test_steps_that_cannot_be_are_refused(edges, keep, text):
    with pytest.raises(ConfigError, match=text):
        StepRule(edges, keep)


# ---- runs that prune nothing


@pytest.mark.parametrize("options", [{"epochs": 2}, {"epochs": 1}, {"epochs": 30, "delta": 0.05}, {"delta": 0}])
def test_a_run_that_can_prune_nothing_is_warned_of_once_as_it_begins(tmp_path, options):
    loader = InfoBatchLoader(range(20), tmp_path / "scores.zarr", batch_size=10, **{"epochs": 4, **options})
    with pytest.warns(RuntimeWarning, match=r"nothing can be pruned in this run.*policy=FullData\(\)") as said:
        [iter(loader) for _ in range(2)]
    assert len(said) == 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("options", [{"epochs": 3}, {"epochs": 2, "delta": 1.0}, {"epochs": 1, "policy": FullData()}])
def test_a_run_that_can_prune_or_does_not_mean_to_is_not_warned_of(tmp_path, options):
    list(InfoBatchLoader(range(20), tmp_path / "scores.zarr", batch_size=10, **options))
