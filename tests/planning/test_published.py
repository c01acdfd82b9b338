"""Against the published algorithm, written here from the paper (arXiv 2303.04947, section 3 and algorithm 1).

It works on the whole array: samples with a score below the mean are "well learned"; a share ``ratio`` of them is
dropped, drawn without replacement; the loss of those that stay is multiplied by 1 / (1 - ratio). Epochs are counted
from 1, and pruning stops once the count passes delta * epochs.
"""

import numpy as np
import pytest

from infobatch_stream.planning.config import RunConfig
from infobatch_stream.planning.epoch_plan import EpochPlan
from infobatch_stream.planning.position import RunPosition
from infobatch_stream.policies.pruning import SoftPruning
from infobatch_stream.sources.map_style import MapStyleSource

SIZE = 2000
SCORES = {
    "gamma": np.random.default_rng(0).gamma(1.0, 1.0, SIZE).astype(np.float32),
    "normal, some below 0": np.random.default_rng(1).normal(0.5, 1.0, SIZE).astype(np.float32),
    "two values": np.where(np.arange(SIZE) % 5 == 0, np.float32(9), np.float32(0.1)),
    "converged": (np.random.default_rng(2).random(SIZE) * 1e-6).astype(np.float32),
}
every_score = pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES.keys())
every_ratio = pytest.mark.parametrize("ratio", [0.25, 0.5, 0.7])


def published_epoch(scores, ratio, rng):
    """(threshold, kept indices, weight of every sample) of one pruned epoch."""
    threshold = scores.mean(dtype=np.float64)
    well_learned = np.flatnonzero(scores < threshold)
    others = np.flatnonzero(scores >= threshold)
    chosen = rng.choice(well_learned, int((1 - ratio) * well_learned.size), replace=False)
    weight = np.ones(scores.size)
    weight[chosen] = 1 / (1 - ratio)
    return threshold, np.concatenate([others, chosen]), weight


def published_anneals(epoch, delta, epochs):
    return epoch + 1 > delta * epochs


def our_plan(scores, ratio, epoch):
    return EpochPlan(scores, SoftPruning(ratio), seed=1, epoch=epoch, global_batch=scores.size)


def our_epoch(scores, ratio, epoch):
    plan = our_plan(scores, ratio, epoch)
    entries = plan.step(0)
    real = entries.weight > 0
    return plan, entries.index[real], entries.weight[real]


@every_score
@every_ratio
def test_same_threshold_and_same_well_learned_samples(scores, ratio):
    threshold, _, _ = published_epoch(scores, ratio, np.random.default_rng(0))
    low = set(np.flatnonzero(scores < threshold).tolist())
    dropped, rescaled = set(), set()
    for epoch in range(12):
        plan, index, weight = our_epoch(scores, ratio, epoch)
        assert plan.threshold == pytest.approx(threshold, rel=1e-12)
        dropped |= set(range(scores.size)) - set(index.tolist())
        rescaled |= set(index[weight != 1].tolist())
    assert rescaled <= low
    assert dropped <= low
    assert dropped | rescaled == low


@every_score
@every_ratio
def test_same_expected_number_of_kept_samples(scores, ratio):
    epochs = 100
    published = published_epoch(scores, ratio, np.random.default_rng(0))[1].size
    ours = [our_plan(scores, ratio, epoch).kept for epoch in range(epochs)]
    low = np.count_nonzero(scores < scores.mean(dtype=np.float64))
    error = np.sqrt(low * ratio * (1 - ratio) / epochs)
    assert abs(np.mean(ours) - published) <= 4 * error + 1  # the published count is rounded down


@every_score
@every_ratio
def test_same_weights(scores, ratio):
    _, _, weight = published_epoch(scores, ratio, np.random.default_rng(0))
    for epoch in range(5):
        _, index, ours = our_epoch(scores, ratio, epoch)
        _, kept, _ = published_epoch(scores, ratio, np.random.default_rng(epoch))
        low = scores[index] < scores.mean(dtype=np.float64)
        np.testing.assert_allclose(ours[low], weight.max(), rtol=2**-15)
        np.testing.assert_array_equal(ours[~low], 1)
        np.testing.assert_array_equal(
            np.sort(index[~low]), np.sort(kept[scores[kept] >= scores.mean(dtype=np.float64)])
        )


@every_score
def test_the_same_sum_of_weights_in_expectation(scores):
    """Both estimate the number of samples: the gradient of the full data, where all gradients are equal."""
    epochs = 60
    ours = np.mean([our_epoch(scores, 0.5, epoch)[2].sum(dtype=np.float64) for epoch in range(epochs)])
    _, kept, weight = published_epoch(scores, 0.5, np.random.default_rng(0))
    low = np.count_nonzero(scores < scores.mean(dtype=np.float64))
    error = np.sqrt(low / epochs)  # (1 - p) / p = 1
    assert abs(ours - scores.size) <= 4 * error
    assert abs(weight[kept].sum() - scores.size) <= 2


def config(delta):
    return RunConfig(SoftPruning(), delta=delta, seed=1, shuffle=True, shuffle_window=64, drop_last=False)


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 8, 10, 12, 30, 64, 90, 100, 160, 200, 300])
def test_same_annealing_epochs(epochs):
    for delta in [0, 0.1, 0.29, 1 / 3, 0.5, 0.57, 0.58, 0.7, 0.8, 0.825, 0.85, 0.875, 0.9, 0.95, 0.99, 1 - 1e-9, 1]:
        ours = list(range(config(delta).annealing(epochs), epochs))
        theirs = [epoch for epoch in range(epochs) if published_anneals(epoch, delta, epochs)]
        assert ours == theirs, f"delta={delta}"


@pytest.mark.parametrize(("epochs", "first"), [(90, 78), (100, 87), (8, 7), (200, 175), (1, 0)])
def test_annealing_begins_at_the_floor_of_delta_times_epochs(epochs, first):
    assert config(0.875).annealing(epochs) == first


@every_score
def test_an_annealing_epoch_is_full_with_weight_1(scores):
    source = MapStyleSource(range(SIZE))
    plan = config(0.875).plan(scores, source, RunPosition(80), epochs=90, lanes=1, global_batch=SIZE)
    entries = plan.step(0)
    np.testing.assert_array_equal(np.sort(entries.index), np.arange(SIZE))
    assert np.all(entries.weight == 1)
    assert np.all(entries.record)
