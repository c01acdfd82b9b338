"""Plans with constant steps: as many steps as if nothing were pruned, of even sizes, the same on every world."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infobatch_stream.planning.deal import Deal, count_steps
from infobatch_stream.planning.entries import Entries
from infobatch_stream.planning.epoch_plan import EpochPlan
from infobatch_stream.policies.pruning import FullData, QuantilePruning, SoftPruning

quick = settings(deadline=None, max_examples=60, derandomize=True)
BATCH = 24
WORLDS = (1, 2, 3, 4, 8)
HALF, FEW, NEARLY_NONE = (QuantilePruning((), (keep,)) for keep in (0.5, 0.1, 2**-9))
POLICIES = FullData(), SoftPruning(), HALF, FEW


@st.composite
def plans(draw, policies=POLICIES):
    """Of map-style data, shards, and pools with repeats."""
    size = draw(st.integers(BATCH, 900))
    rng = np.random.default_rng(size)
    scores = rng.gamma(1.0, 1.0, size).astype(np.float32)
    scores[-1] = np.nan  # so that something is kept
    cuts = np.sort(rng.integers(0, size + 1, max(1, size // 17)))
    sizes = np.diff(np.concatenate([[0], cuts, [size]])).astype(np.int64)
    pool = np.concatenate([np.arange(size // 4, size), np.arange(size // 2, size)]).astype(np.int64)
    units = np.append(np.full(pool.size // 7, 7), pool.size % 7).astype(np.int64)
    shape = draw(st.sampled_from([{}, {"shard_sizes": sizes}, {"shard_sizes": sizes, "pool": (pool, units)}]))
    options = {
        "lanes": draw(st.sampled_from([1, 2, 3, 8])),
        "shuffle": draw(st.booleans()),
        "drop_last": draw(st.booleans()),
        "window": draw(st.sampled_from([1, 50, 2**16])),
        "seed": draw(st.integers(0, 9)),
        "epoch": draw(st.integers(0, 9)),
        "global_batch": BATCH,
    }
    return EpochPlan(scores, draw(st.sampled_from(policies)), constant_steps=True, **shape, **options)


def real(entries):
    return entries.take(np.flatnonzero(entries.weight > 0))


def dealt(plan, world):
    """By step, what each rank has."""
    return [[plan.step(step, rank, world) for rank in range(world)] for step in range(plan.steps)]


def same(one, other):
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("index", "weight", "record"))


@given(plans())
@quick
def test_the_steps_are_those_of_an_epoch_that_prunes_nothing(plan):
    assert plan.steps in (max(1, plan.entries // BATCH), -(-plan.entries // BATCH))
    assert plan.trained == min(plan.kept, plan.steps * BATCH)
    assert sum(real(plan.step(step)).index.size for step in range(plan.steps)) == plan.trained


@given(plans())
@quick
def test_every_kept_entry_is_in_one_step_and_none_is_filled_up_where_there_are_enough(plan):
    steps = Entries.join([real(plan.step(step)) for step in range(plan.steps)])
    per_step = EpochPlan.step(plan, 0).index.size
    assert per_step <= BATCH
    if plan.entries == plan.kept and plan.trained == plan.kept:
        assert (steps.weight == 1).all()
    if plan.trained >= plan.steps:
        assert sum(plan.step(step).index.size for step in range(plan.steps)) == plan.trained
    _, counts = np.unique(steps.index, return_counts=True)
    assert counts.max() <= 2  # in a pool
    assert counts.sum() == plan.trained


@given(plans(), st.sampled_from(WORLDS))
@quick
def test_a_step_holds_the_same_on_every_world(plan, world):
    for step, ranks in enumerate(dealt(plan, world)):
        assert same(Entries.join([real(part) for part in ranks]), real(plan.step(step)))


@given(plans(), st.sampled_from(WORLDS))
@quick
def test_batches_differ_by_at_most_one_sample_and_change_their_size_once(plan, world):
    sizes = np.array([[real(part).index.size for part in ranks] for ranks in dealt(plan, world)])
    assert sizes.max() - sizes.min() <= 1
    assert sizes.sum() == plan.trained
    assert (np.abs(np.diff(sizes, axis=0)).sum(axis=0) <= 1).all()
    assert plan.smallest == sizes.sum(axis=1).min()


@given(plans((NEARLY_NONE,)), st.sampled_from(WORLDS))
@quick
def test_a_rank_without_entries_repeats_one_that_counts_for_nothing(plan, world):
    known = set(Entries.join([real(plan.step(step)) for step in range(plan.steps)]).index.tolist())
    for ranks in dealt(plan, world):
        for part in ranks:
            assert part.index.size >= 1
            filled = part.weight == 0
            assert set(part.index.tolist()) <= known
            assert not part.record[filled].any()
            assert not filled.any() or part.index.size == 1


@given(plans(), st.sampled_from(WORLDS), st.randoms())
@quick
def test_any_step_may_be_asked_for_directly(plan, world, random):
    wanted = dealt(plan, world)
    for _ in range(20):
        step, rank = random.randrange(plan.steps), random.randrange(world)
        assert same(plan.step(step, rank, world), wanted[step][rank])


@given(st.integers(1, 10**12), st.integers(1, 64), st.integers(1, 10**6), st.integers(0, 2**32))
@quick
def test_lanes_are_read_without_gaps(kept, lanes, steps, at):
    """What a step takes from a lane begins where the step before it ended."""
    deal = Deal.even(kept, lanes, steps)
    step = at % steps
    assert sum(deal.lane_sizes) == kept
    before = {lane: stop for lane, _, stop in deal.spans(step - 1, 0, 1)} if step else {}
    for lane, start, stop in deal.spans(step, 0, 1):
        assert 0 <= start < stop <= deal.lane_sizes[lane]
        assert start == deal._before(lane, step)
        assert lane not in before or before[lane] == start


@pytest.mark.parametrize(("ranks", "lanes"), [(4, 2), (8, 2), (8, 4), (2, 2), (6, 3)])
def test_each_rank_reads_one_lane_where_the_lanes_are_as_nodes(ranks, lanes):
    """So that a shard is read on one node alone, whatever the sizes are."""
    for kept in range(500, 560):
        deal = Deal.even(kept, lanes, 29)
        for step in range(29):
            for rank in range(ranks):
                assert {lane for lane, *_ in deal.spans(step, rank, ranks)} <= {rank * lanes // ranks}


def test_the_expected_step_is_the_step_of_the_full_batch():
    """Over many epochs, sum(weight * value) / nominal batch has the mean of the full data's steps."""
    size, epochs = 24 * 40, 400
    rng = np.random.default_rng(0)
    scores = rng.gamma(1.0, 1.0, size).astype(np.float32)
    value = rng.normal(1, 3, size)
    found = []
    for epoch in range(epochs):
        plan = EpochPlan(scores, SoftPruning(0.7), seed=1, epoch=epoch, global_batch=BATCH, constant_steps=True)
        assert plan.steps == count_steps(size, BATCH, drop_last=False) == 40
        for step in range(plan.steps):
            entries = plan.step(step)
            found.append((entries.weight * value[entries.index]).sum() / BATCH)
    found = np.array(found)
    assert abs(found.mean() - value.mean()) < 3 * found.std() / np.sqrt(found.size)
    published = EpochPlan(scores, SoftPruning(0.7), seed=1, epoch=0, global_batch=BATCH)
    assert published.steps < 40  # of a gradient that is larger by as much
