"""The plan of an epoch: every kept entry once, the same on every world, shuffled as promised, any step directly."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infobatch_stream.errors import ConfigError
from infobatch_stream.planning.deal import count_steps
from infobatch_stream.planning.entries import Entries
from infobatch_stream.planning.epoch_plan import EpochPlan
from infobatch_stream.planning.rng import bijection, permutation
from infobatch_stream.planning.selection import Selection
from infobatch_stream.planning.window_shuffle import WindowShuffle
from infobatch_stream.policies.pruning import FullData, QuantilePruning, SoftPruning
from infobatch_stream.score_stats import Summary
from infobatch_stream.store.score_store import ScoreStore

quick = settings(deadline=None, max_examples=100, derandomize=True)

SEED, EPOCH = 3, 4
HALF = QuantilePruning((), (0.5,))  # keeps each sample with probability 1/2


def losses(size, unseen=0.1):
    rng = np.random.default_rng(size)
    scores = rng.gamma(1.0, 1.0, size).astype(np.float32)
    scores[rng.random(size) < unseen] = np.nan
    return scores


def shard_sizes(size, around=17):
    """Sizes from 0 to about twice ``around`` that sum to ``size``."""
    cuts = np.sort(np.random.default_rng(size).integers(0, size + 1, size // around))
    return np.diff(np.concatenate([[0], cuts, [size]])).astype(np.int64)


def mixed_pool(size):
    """Entries of three streams: one left out, one twice over, one partly; as visits to shards of 7."""
    index = np.concatenate(
        [np.arange(size // 4, size), np.arange(size // 2, size), np.arange(size // 2, 5 * size // 8)]
    )
    units = np.full(index.size // 7, 7)
    return index.astype(np.int64), np.append(units, index.size - units.sum()).astype(np.int64)


SHAPES = {
    "map-style": lambda size: {},
    "shards": lambda size: {"shard_sizes": shard_sizes(size)},
    "pool": lambda size: {"shard_sizes": shard_sizes(size), "pool": mixed_pool(size)},
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def make(scores, policy=SoftPruning(), **options):  # noqa: B008 - a policy is immutable
    options = {"seed": SEED, "epoch": EPOCH, "global_batch": 24, "window": 50, **options}
    return EpochPlan(scores, policy, **options)


def steps_of(plan, world_size=1, order=None):
    """The contents of every step, the ranks' shares one after the other."""
    steps = {}
    for step in range(plan.steps) if order is None else order:
        shares = [plan.step(step, rank, world_size) for rank in range(world_size)]
        assert len({share.index.size for share in shares}) == 1
        steps[step] = Entries.join(shares)
    return [steps[step] for step in sorted(steps)]


def assert_same(one, two):
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a.index, b.index)
        np.testing.assert_array_equal(a.weight, b.weight)
        np.testing.assert_array_equal(a.record, b.record)


def whole(plan):
    """(the real entries of the epoch in reading order, the filled-up ones)."""
    everything = Entries.join(steps_of(plan))
    real = everything.weight > 0
    return everything.take(np.flatnonzero(real)), everything.take(np.flatnonzero(~real))


def selection_of(scores, policy=SoftPruning(), seed=SEED, epoch=EPOCH):  # noqa: B008
    return Selection(scores, policy.rule(Summary(scores)), seed, epoch)


def expected_entries(scores, pool=None, policy=SoftPruning()):  # noqa: B008
    """Indices of the kept entries, sorted, as the selection alone says."""
    kept = selection_of(scores, policy).keep(0, scores.size)
    index = np.arange(scores.size) if pool is None else pool[0]
    return np.sort(index[kept[index]])


def assert_every_entry_once(plan, scores, pool=None, global_batch=24):
    """The whole contract of an epoch's contents."""
    expected = expected_entries(scores, pool)
    steps = steps_of(plan)
    real, filled = whole(plan)
    np.testing.assert_array_equal(np.sort(real.index), expected)
    np.testing.assert_array_equal(real.weight, selection_of(scores).weight(real.index))
    assert plan.kept == expected.size
    assert plan.entries == (scores.size if pool is None else pool[0].size)
    assert plan.steps == len(steps) == math.ceil(expected.size / global_batch)
    assert all(step.index.size == global_batch for step in steps)
    assert not np.any(filled.record)
    assert set(filled.index) <= set(expected)
    assert all(step.index.dtype == np.int64 and step.weight.dtype == np.float32 for step in steps)
    if pool is None:
        assert np.all(real.record)


# --- the contents of an epoch


@every_shape
@pytest.mark.parametrize("lanes", [1, 2, 3, 8])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("size", [400, 491])
def test_every_kept_entry_occurs_exactly_once(shape, lanes, shuffle, size):
    scores, options = losses(size), shape(size)
    plan = make(scores, lanes=lanes, shuffle=shuffle, **options)
    assert_every_entry_once(plan, scores, options.get("pool"))


@quick
@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(any),
    lanes=st.sampled_from([1, 2, 3, 4, 12]),
    window=st.sampled_from([1, 2, 3, 5, 8, 64, 65536]),
    shuffle=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
)
def test_every_kept_entry_occurs_exactly_once_for_any_shards(sizes, lanes, window, shuffle, seed):
    """Empty shards, at either end too; shards of one sample; fewer entries than a batch or than lanes; any window."""
    scores = losses(sum(sizes))
    plan = make(
        scores,
        FullData(),
        seed=seed,
        lanes=lanes,
        window=window,
        shuffle=shuffle,
        global_batch=12,
        shard_sizes=np.array(sizes, dtype=np.int64),
    )
    real, filled = whole(plan)
    np.testing.assert_array_equal(np.sort(real.index), np.arange(sum(sizes)))
    assert (real.index.size + filled.index.size, plan.steps) == (12 * plan.steps, math.ceil(sum(sizes) / 12))
    assert not np.any(filled.record)


@pytest.mark.parametrize(
    "sizes", [[0, 0, 300, 0], [0, 100, 0, 0, 200], [1] * 300, [300, 0], [0, 300], [1, 298, 1], [0, 1, 0, 299, 0]]
)
@pytest.mark.parametrize("lanes", [1, 4])
def test_empty_and_tiny_shards_of_a_pruned_epoch(sizes, lanes):
    scores = losses(300)
    assert_every_entry_once(make(scores, lanes=lanes, shard_sizes=np.array(sizes)), scores)


def test_shards_that_end_where_the_counting_pass_is_cut():
    """Kept samples are counted in chunks of 2^20 scores."""
    chunk = 1 << 20
    sizes = np.array([0, chunk - 1, 0, 1, 1, 0, chunk - 2, 1, 0, chunk + 7, 0])
    scores = np.random.default_rng(0).random(sizes.sum(), dtype=np.float32)
    plan = make(scores, shard_sizes=sizes, shuffle=False, global_batch=1 << 22)
    np.testing.assert_array_equal(whole(plan)[0].index, np.flatnonzero(selection_of(scores).keep(0, scores.size)))


def test_large_shards_are_decided_in_pieces_and_read_as_if_they_were_whole():
    sizes = np.array([200_000, 3, 65536, 100_000, 0, 65537])
    scores = np.random.default_rng(0).random(sizes.sum(), dtype=np.float32)
    options = {"shard_sizes": sizes, "global_batch": 1 << 16}
    assert_every_entry_once(make(scores, lanes=2, **options), scores, global_batch=1 << 16)
    in_order = whole(make(scores, shuffle=False, **options))[0].index
    np.testing.assert_array_equal(in_order, np.flatnonzero(selection_of(scores).keep(0, scores.size)))


@every_shape
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_rank_that_reads_far_more_or_less_than_is_computed_ahead(shape, shuffle):
    scores, options = losses(20_000), shape(20_000)
    large = make(scores, FullData(), global_batch=12_288, shuffle=shuffle, **options)
    assert_same(steps_of(large, 3), steps_of(large))
    steps = [step for step in (0, 1) for _ in range(2)]  # again, and from before
    for step in [*steps, *steps[::-1]]:
        assert_same(
            [large.step(step, 2, 3)],
            [make(scores, FullData(), global_batch=12_288, shuffle=shuffle, **options).step(step, 2, 3)],
        )


@every_shape
@pytest.mark.parametrize("lanes", [1, 4, 24])
@pytest.mark.parametrize("size", [1, 2, 5, 23])
def test_fewer_entries_than_a_batch_or_than_lanes(shape, lanes, size):
    options = shape(size) if shape is not SHAPES["pool"] else {"pool": (np.arange(size), np.array([size, 0]))}
    plan = make(np.full(size, np.nan, np.float32), lanes=lanes, **options)
    assert plan.steps == 1
    entries = plan.step(0)
    assert entries.index.size == 24
    np.testing.assert_array_equal(np.sort(entries.index[entries.weight > 0]), np.arange(size))
    assert np.count_nonzero(entries.record) == size
    assert_same(steps_of(plan, 8), steps_of(plan))


def test_filling_up_repeats_the_entries_that_were_read_last():
    plan = make(np.full(50, np.nan, np.float32), shuffle=False)
    np.testing.assert_array_equal(plan.step(2).index, [48, 49, *range(49, 27, -1)])
    np.testing.assert_array_equal(plan.step(2).weight, [1, 1] + [0] * 22)


@every_shape
@pytest.mark.parametrize("lanes", [1, 3])
def test_drop_last_leaves_out_the_step_that_is_not_full(shape, lanes):
    scores, options = losses(500), shape(500)
    filled, dropped = (make(scores, lanes=lanes, drop_last=drop, **options) for drop in (False, True))
    assert filled.kept % 24
    assert dropped.steps == filled.steps - 1
    real, repeated = whole(dropped)
    assert repeated.index.size == 0
    assert real.index.size == 24 * dropped.steps
    assert_same(steps_of(dropped), steps_of(filled)[:-1])


def test_drop_last_keeps_the_only_step_and_fills_it_up():
    plan = make(losses(10), FullData(), drop_last=True)
    assert plan.steps == 1
    assert plan.step(0).index.size == 24
    assert np.count_nonzero(plan.step(0).weight) == 10


def test_drop_last_drops_nothing_when_the_last_step_is_full():
    assert make(losses(72), FullData(), drop_last=True).steps == 3


@pytest.mark.parametrize(
    ("entries", "drop_last", "steps"), [(1, False, 1), (48, False, 2), (49, False, 3), (49, True, 2), (23, True, 1)]
)
def test_steps_are_counted_without_a_plan(entries, drop_last, steps):
    assert count_steps(entries, 24, drop_last) == steps


def test_the_facts_of_an_epoch():
    scores = losses(400)
    plan = make(scores)
    seen = scores[~np.isnan(scores)].astype(np.float64)
    assert plan.epoch == EPOCH
    assert plan.mean_score == plan.threshold == pytest.approx(seen.mean())
    assert math.isnan(make(scores, FullData()).threshold)
    assert make(scores, FullData()).mean_score == plan.mean_score
    fresh = make(np.full(400, np.nan, np.float32))
    assert fresh.kept == 400
    assert math.isnan(fresh.mean_score)


# --- worlds and steps


@every_shape
@pytest.mark.parametrize("global_batch", [24, 48])
@pytest.mark.parametrize("lanes", [1, 2, 3, 4, 6, 12, 24])
def test_a_step_holds_the_same_on_every_world(shape, global_batch, lanes):
    scores = losses(300)
    plan = make(scores, lanes=lanes, global_batch=global_batch, **shape(300))
    alone = steps_of(plan)
    for world_size in (2, 3, 4, 8, 24):
        assert_same(steps_of(plan, world_size), alone)


@every_shape
@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("shuffle", [True, False])
def test_any_step_is_reached_directly(shape, lanes, shuffle):
    scores = losses(500)

    def fresh():
        return make(scores, lanes=lanes, shuffle=shuffle, window=20, **shape(500))

    plan = fresh()
    sequential = steps_of(plan)
    assert_same(steps_of(plan, order=reversed(range(plan.steps))), sequential)
    assert_same(steps_of(plan, order=np.random.default_rng(0).permutation(plan.steps).tolist()), sequential)
    assert_same([fresh().step(step) for step in range(plan.steps)], sequential)
    assert_same([Entries.join([fresh().step(step, r, 2) for r in (0, 1)]) for step in range(plan.steps)], sequential)


@every_shape
def test_the_order_repeats_for_the_same_seed_and_epoch_and_is_another_for_any_other(shape):
    scores = losses(300)
    moments = [(seed, epoch) for seed in (0, 1, 2**63, 2**64 - 1) for epoch in (0, 1, 89)]

    def order(seed, epoch):
        return whole(make(scores, FullData(), seed=seed, epoch=epoch, **shape(300)))[0].index.tobytes()

    orders = {order(*moment) for moment in moments}
    assert len(orders) == len(moments)
    assert {order(*moment) for moment in moments} == orders


def test_a_step_beyond_the_epoch_is_an_index_error():
    plan = make(losses(100))
    for step in (-1, plan.steps):
        with pytest.raises(IndexError, match=f"step {step} of an epoch of {plan.steps} steps"):
            plan.step(step)


# --- errors


@pytest.mark.parametrize("lanes", [5, 7, 48, 0, -1])
def test_lanes_must_divide_the_global_batch(lanes):
    with pytest.raises(ConfigError, match=rf"batch of 24 cannot be cut into {lanes} equal lanes.*canonical_nodes"):
        make(losses(100), lanes=lanes)


def test_ranks_must_divide_the_global_batch():
    with pytest.raises(ConfigError, match="5 ranks cannot share a global batch of 24"):
        make(losses(100)).step(0, 0, 5)


@every_shape
def test_an_epoch_that_keeps_nothing_is_an_error(shape):
    with pytest.raises(ConfigError, match=r"QuantilePruning.* keeps none of the \d+ entries of epoch 4"):
        make(np.ones(64, np.float32), QuantilePruning((0.5,), (1.0, 0.0)), **shape(64))


@pytest.mark.parametrize(
    "nothing",
    [
        {},
        {"shard_sizes": np.zeros(3, np.int64)},
        {"shard_sizes": np.zeros(0, np.int64)},
        {"pool": (np.zeros(0, np.int64), np.zeros(0, np.int64))},
    ],
    ids=["map-style", "empty shards", "no shards", "empty pool"],
)
def test_an_epoch_of_no_entries_is_an_error(nothing):
    with pytest.raises(ConfigError, match="none of the 0 entries"):
        make(np.empty(0, np.float32), **nothing)


# --- lanes


@every_shape
@pytest.mark.parametrize("lanes", [2, 3, 8])
def test_every_lane_has_an_equal_share_and_an_equal_part_of_each_step(shape, lanes):
    """Unshuffled, a lane is a contiguous part of the kept sequence; shuffled, it keeps its entries."""
    scores, options = losses(500), shape(500)
    width = 24 // lanes

    def rows(**more):
        steps = steps_of(make(scores, lanes=lanes, **options, **more))
        table = [np.concatenate([step.index[lane * width :][:width] for step in steps]) for lane in range(lanes)]
        real = [np.concatenate([step.weight[lane * width :][:width] for step in steps]) > 0 for lane in range(lanes)]
        return [row[is_real] for row, is_real in zip(table, real, strict=True)]

    sizes = [row.size for row in rows()]
    assert max(sizes) - min(sizes) <= 1
    straight = Entries.join(steps_of(make(scores, shuffle=False, **options))).take(slice(0, sum(sizes)))
    np.testing.assert_array_equal(np.concatenate(rows(shuffle=False)), straight.index)


def test_a_lane_keeps_to_its_own_shards():
    sizes = np.full(40, 25)
    steps = steps_of(make(losses(1000), FullData(), lanes=4, shard_sizes=sizes))
    shards = [{shard for step in steps for shard in step.index[6 * lane : 6 * lane + 6] // 25} for lane in range(4)]
    assert [len(own) for own in shards] == [10, 10, 10, 10]
    assert len(set().union(*shards)) == 40


# --- order


@every_shape
def test_without_shuffle_entries_come_in_the_order_of_the_pool(shape):
    scores, options = losses(500), shape(500)
    kept = selection_of(scores).keep(0, 500)
    index = options["pool"][0] if "pool" in options else np.arange(500)
    np.testing.assert_array_equal(whole(make(scores, shuffle=False, **options))[0].index, index[kept[index]])


def order_of(size, window, seed=1, epoch=2, lane=0):
    """The positions of a lane in their output order, bucket by bucket, each where it says that it begins."""
    shuffle = WindowShuffle(size, window, seed, epoch, lane)
    order = np.empty(0, np.int64)
    for bucket in range(-(-size // window) + 1):
        assert shuffle.first(bucket) == order.size
        late, early, both = shuffle.bucket(bucket)
        positions = np.concatenate([late + (bucket - 1) * window, early + bucket * window])
        order = np.concatenate([order, positions[both]])
    return order


@quick
@given(size=st.integers(1, 300), window=st.integers(1, 400), seed=st.integers(0, 2**64 - 1), lane=st.integers(0, 9))
def test_a_window_moves_every_entry_by_less_than_its_length(size, window, seed, lane):
    """Keys lie in [p, p + W): whoever stands W or more before p comes out before it, W or more behind p after it."""
    order = order_of(size, window, seed, lane=lane)
    np.testing.assert_array_equal(np.sort(order), np.arange(size))
    assert np.max(np.abs(order - np.arange(size))) <= min(window, size) - 1


def test_a_window_mixes_as_far_as_it_reaches():
    size, window = 20_000, 1000
    moved = (order_of(size, window) - np.arange(size))[window:-window]
    assert np.mean(np.abs(moved)) == pytest.approx(window / 4, rel=0.05)  # uniform in +- W/2
    assert np.abs(moved).max() > 0.4 * window


def test_lanes_seeds_and_epochs_have_orders_of_their_own():
    orders = {order_of(200, 50, *at).tobytes() for at in [(1, 2, 0), (1, 2, 1), (1, 3, 0), (2, 2, 0)]}
    assert len(orders) == 4


def test_lanes_are_not_shuffled_alike():
    steps = steps_of(make(losses(480), FullData(), lanes=2, shard_sizes=np.array([480])))
    one, two = (np.concatenate([step.index[12 * lane :][:12] for step in steps]) for lane in (0, 1))
    assert np.mean(one == two - 240) < 0.2


def test_a_window_of_one_entry_keeps_the_order_within_permuted_shards():
    sizes = shard_sizes(500)
    index = whole(make(losses(500), FullData(), window=1, shard_sizes=sizes))[0].index
    bounds = np.cumsum([0, *sizes])
    order = permutation(SEED, EPOCH, sizes.size)
    np.testing.assert_array_equal(index, np.concatenate([np.arange(bounds[s], bounds[s + 1]) for s in order]))


def test_an_entry_stays_within_the_window_of_its_place_in_the_permuted_shards():
    sizes, window = shard_sizes(2000), 100
    straight = whole(make(losses(2000), window=1, shard_sizes=sizes))[0].index
    shuffled = whole(make(losses(2000), window=window, shard_sizes=sizes))[0].index
    place = np.empty(2000, np.int64)
    place[straight] = np.arange(straight.size)
    assert np.abs(place[shuffled] - np.arange(shuffled.size)).max() <= window - 1
    assert np.mean(shuffled != straight) > 0.9


def test_the_first_batch_touches_few_shards_and_later_ones_mix_a_window():
    """As measured for shards of 1300 and a window of 65536: 5 shards, then 51 of the 50.4 that a window spans."""
    sizes = np.full(300, 1300)
    touched = []
    for epoch in range(5):
        plan = make(losses(sizes.sum(), 0), FullData(), epoch=epoch, global_batch=256, window=65536, shard_sizes=sizes)
        touched.append([np.unique(plan.step(step).index // 1300).size for step in (0, plan.steps // 2)])
    first, middle = np.mean(touched, axis=0)
    assert first <= 7
    assert 45 <= middle <= 53


@every_shape
def test_a_window_larger_than_a_lane_shuffles_all_of_it(shape):
    plan = make(losses(200), FullData(), window=2**29, lanes=2, **shape(200))
    real, _ = whole(plan)
    assert real.index.size == plan.kept


def spread_over_batches(labels_by_step, share, size):
    """Mean squared deviation of the class counts of batches, over that of batches drawn from a full permutation."""
    counts = np.array([np.bincount(labels, minlength=share.size) for labels in labels_by_step])
    batch = counts[0].sum()
    hypergeometric = batch * share * (1 - share) * (size - batch) / (size - 1)
    return np.mean((counts - batch * share) ** 2 / hypergeometric)


def test_class_sorted_map_style_data_is_mixed_like_a_full_permutation():
    size, classes, batch = 1000, 10, 50
    scores = np.full(size, np.nan, np.float32)
    label = np.arange(size) // (size // classes)
    steps = [
        label[step.index]
        for epoch in range(150)
        for step in steps_of(make(scores, epoch=epoch, global_batch=batch, lanes=2))
    ]
    share = np.full(classes, 1 / classes)
    assert spread_over_batches(steps, share, size) == pytest.approx(1, abs=0.05)  # +- 0.009 by chance
    in_order = np.split(label, size // batch)
    assert spread_over_batches(in_order, share, size) > 10


def test_a_pruned_epoch_of_class_sorted_data_is_mixed_too():
    size, classes, batch = 2000, 4, 50
    scores = np.ones(size, np.float32)
    label = np.arange(size) // (size // classes)
    ratios = []
    for epoch in range(60):
        steps = steps_of(make(scores, HALF, epoch=epoch, global_batch=batch, drop_last=True))
        kept = label[np.flatnonzero(selection_of(scores, HALF, epoch=epoch).keep(0, size))]
        share = np.bincount(kept, minlength=classes) / kept.size
        ratios.append(spread_over_batches([label[step.index] for step in steps], share, kept.size))
    assert np.mean(ratios) == pytest.approx(1, abs=0.1)


# --- the keyed bijection


POWERS = [2**k + d for k in range(1, 15) for d in (-1, 0, 1)]


@pytest.mark.parametrize("size", [1, 2, *POWERS, 6, 7, 10, 100, 1000, 10_000])
def test_the_bijection_is_a_permutation(size):
    for seed, epoch in [(0, 0), (1, 0), (2**64 - 1, 99)]:
        np.testing.assert_array_equal(np.sort(bijection(seed, epoch, size, np.arange(size))), np.arange(size))


@quick
@given(size=st.integers(1, 2**40), at=st.lists(st.integers(0, 2**40 - 1), max_size=30), seed=st.integers(0, 2**64 - 1))
def test_the_bijection_sends_each_place_alone_and_no_two_to_one(size, at, seed):
    at = np.unique(np.array(at, dtype=np.int64) % size)
    out = bijection(seed, 1, size, at)
    assert out.dtype == np.int64
    assert np.all((out >= 0) & (out < size))
    assert np.unique(out).size == at.size
    np.testing.assert_array_equal(bijection(seed, 1, size, at[::-1]), out[::-1])


@pytest.mark.parametrize("size", [2, 3, 4, 5, 7, 16, 17, 50])
def test_the_bijection_sends_every_place_everywhere_equally_often(size):
    keys = 1200
    images = np.array([bijection(seed, 5, size, np.arange(size)) for seed in range(keys)])
    for place in {0, size // 2, size - 1}:
        counts = np.bincount(images[:, place], minlength=size)
        chi_square = np.sum((counts - keys / size) ** 2 / (keys / size))
        assert chi_square < (size - 1) + 5 * np.sqrt(2 * (size - 1))


@pytest.mark.parametrize("size", [1000, 1024, 4097, 60_000])
def test_the_bijection_mixes_like_a_random_permutation(size):
    out = bijection(1, 2, size, np.arange(size))
    error = size / np.sqrt(size)
    assert abs(np.mean(np.abs(out - np.arange(size))) - size / 3) < 2 * error
    assert abs(np.corrcoef(out[:-1], out[1:])[0, 1]) < 5 / np.sqrt(size)
    assert np.count_nonzero(np.diff(out) == 1) <= 8  # Poisson, mean 1


# --- stream mixing


def test_repeats_in_a_mixed_pool_share_the_decision_and_the_first_alone_records():
    scores, pool = losses(400), mixed_pool(400)
    plan = make(scores, shard_sizes=shard_sizes(400), pool=pool)
    assert_every_entry_once(plan, scores, pool)
    real, _ = whole(plan)
    index, repeats = np.unique(pool[0], return_counts=True)
    seen, times = np.unique(real.index, return_counts=True)
    np.testing.assert_array_equal(times, repeats[np.isin(index, seen)])  # all repeats of a sample, or none
    np.testing.assert_array_equal(np.sort(real.index[real.record]), seen)  # one of them records
    assert times.max() == 3


def test_a_mixed_pool_is_read_visit_by_visit():
    pool = mixed_pool(400)
    plan = make(losses(400), FullData(), pool=pool, window=1)
    ends = np.cumsum(pool[1])
    order = permutation(SEED, EPOCH, pool[1].size)
    expected = np.concatenate([pool[0][ends[unit] - pool[1][unit] : ends[unit]] for unit in order])
    np.testing.assert_array_equal(whole(plan)[0].index, expected)


# --- large data


LARGE = 20_000_001
FLOAT32_EXACT = 1 << 24


def test_every_one_of_20_000_001_samples_in_shards_occurs_once():
    """A float32 holds no odd index above 2^24."""
    scores = np.broadcast_to(np.float32(1), (LARGE,))
    sizes = np.append(np.full(15384, 1300), LARGE - 15384 * 1300)
    plan = make(scores, HALF, global_batch=1 << 20, window=65536, shard_sizes=sizes)
    times = np.zeros(LARGE, np.int8)
    for step in range(plan.steps):
        entries = plan.step(step)
        assert entries.index.dtype == np.int64
        times[entries.index[entries.weight > 0]] += 1
    kept = selection_of(scores, HALF).keep(0, LARGE)
    assert np.array_equal(times, kept)
    assert np.any(kept[FLOAT32_EXACT + 1 :: 2])


def test_map_style_indices_above_2_to_the_24_are_exact():
    scores = np.broadcast_to(np.float32(1), (LARGE,))
    plan = make(scores, HALF, global_batch=1 << 15)
    index = np.concatenate([plan.step(step).index for step in (0, 1, plan.steps // 2, plan.steps - 2)])
    kept = selection_of(scores, HALF).keep(0, LARGE)
    assert index.dtype == np.int64
    assert np.all(kept[index])
    assert np.unique(index).size == index.size
    large = index[index > FLOAT32_EXACT]
    assert large.size / index.size == pytest.approx(1 - FLOAT32_EXACT / LARGE, rel=0.05)
    assert np.mean(large % 2) == pytest.approx(0.5, abs=0.02)
    last = make(scores, HALF, global_batch=1 << 15, shuffle=False).step(plan.steps - 1)
    assert last.index[last.weight > 0][-1] == np.flatnonzero(kept)[-1]


def test_half_precision_losses_at_indices_above_2_to_the_24_reach_their_samples(tmp_path):
    store = ScoreStore.create(tmp_path / "scores.zarr", LARGE)
    index = np.array([FLOAT32_EXACT - 1, FLOAT32_EXACT, FLOAT32_EXACT + 1, FLOAT32_EXACT + 3, LARGE - 1])
    store.record(index, np.array([1, 2, 3, 4, 5], dtype=np.float16) / np.float16(4))
    store.commit()
    np.testing.assert_array_equal(np.flatnonzero(~np.isnan(store.scores)), index)
    np.testing.assert_array_equal(store.scores[index], np.arange(1, 6) / 4)
