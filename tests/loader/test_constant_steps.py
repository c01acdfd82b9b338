"""The loader with constant steps: as many in every epoch, known in advance, exact on resume."""

import warnings

import numpy as np
import pytest
import torch
from support.ddp.data import Faulty, Noisy, loss_of

from infobatch_stream import BudgetPruning, ConfigError, FullData, InfoBatchLoader, QuantilePruning, SoftPruning

N, BATCH, EPOCHS = 203, 16, 5
STEPS = -(-N // BATCH)
POLICIES = [SoftPruning(), QuantilePruning(), BudgetPruning(0.4), FullData()]


@pytest.fixture
def make(tmp_path):
    def make(dataset=None, name="scores", **options):
        options = {"batch_size": BATCH, "epochs": EPOCHS, "delta": 0.8, "constant_steps": True, **options}
        return InfoBatchLoader(dataset or Noisy(N), tmp_path / f"{name}.zarr", **options)

    return make


def steps_of(loader):
    """To the end of the run: epoch, step, indices and weights of every step."""
    found = []
    for epoch in range(loader.epoch, loader.epochs):
        for _, picks in loader:
            loader.update(loss_of(picks.index, epoch), picks)
            found.append((epoch, loader.step, picks.index.tolist(), picks.weight.tolist()))
    return found


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_a_schedule_of_torch_makes_exactly_as_many_steps_as_it_was_told(make, policy):
    loader = make(policy=policy)
    assert loader.total_steps == EPOCHS * STEPS
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=loader.total_steps)
    for epoch in range(EPOCHS):
        assert len(loader) == STEPS
        for _, picks in loader:
            assert len(loader) == STEPS
            loader.update(loss_of(picks.index, epoch) + weight, picks).backward()
            optimizer.step()
            schedule.step()
    assert schedule.last_epoch == loader.total_steps
    with pytest.raises(ValueError, match="Tried to step"):
        schedule.step()
    assert (loader.stats["saved"] > 0) == (policy != FullData())


def test_without_constant_steps_their_number_is_not_known(make):
    assert make(policy=FullData(), constant_steps=False).total_steps == EPOCHS * STEPS
    with pytest.raises(ConfigError, match="constant_steps=True"):
        _ = make(constant_steps=False).total_steps


def test_batches_shrink_by_what_is_pruned_and_nothing_is_filled_up(make):
    loader = make()
    for epoch in range(EPOCHS):
        sizes = []
        for _, picks in loader:
            loader.update(loss_of(picks.index, epoch), picks)
            assert (picks.weight > 0).all()
            sizes.append(len(picks))
        assert sum(sizes) == loader.stats["kept"]
        assert max(sizes) - min(sizes) <= 1
        assert sizes == sorted(sizes, reverse=True)
        assert (sum(sizes) < N) == (0 < epoch < 4)


def test_the_loss_is_divided_by_the_nominal_batch_size(make):
    loader = make()
    steps_of_first = [loader.update(loss_of(picks.index), picks) for _, picks in loader]
    assert len(steps_of_first) == STEPS
    _, picks = next(iter(loader))
    losses = torch.arange(len(picks), dtype=torch.float64)
    assert len(picks) < BATCH
    assert loader.update(losses, picks) == pytest.approx(float((losses * picks.weight).sum()) / BATCH)


def test_progress_is_the_share_of_the_steps(make):
    loader, done = make(), 0
    assert loader.progress == 0
    for epoch in range(EPOCHS):
        for _, picks in loader:
            loader.update(loss_of(picks.index, epoch), picks)
            done += 1
            assert loader.progress == done / loader.total_steps
    assert loader.progress == 1


@pytest.mark.parametrize("kind", ["workers", "drop_last", "straight"])
def test_a_run_goes_on_exactly_from_a_state(make, kind):
    options = {"workers": {"num_workers": 1}, "drop_last": {"drop_last": True}, "straight": {"shuffle": False}}
    options = {"batch_size": 4, "epochs": 4, "delta": 0.75, **options.get(kind, {})}
    data = Noisy(41)
    loader, states, steps = make(data, **options), [], []
    for epoch in range(4):
        for _, picks in loader:
            states.append(loader.state_dict())
            steps.append((epoch, loader.step + 1, picks.index.tolist(), picks.weight.tolist()))
            loader.update(loss_of(picks.index, epoch), picks)
    assert any(len(step[2]) < 4 for step in steps)
    for number in range(0, len(states), 7):
        again = make(data, "again", existing="overwrite", **options)
        again.load_state_dict(states[number])
        assert steps_of(again) == steps[number:]


def test_a_batch_that_comes_next_can_be_peeked_at(make):
    loader = make()
    for epoch in range(3):
        for _, picks in loader:
            loader.update(loss_of(picks.index, epoch), picks)
            if loader.step < STEPS:
                peeked = loader.peek()[1]
        assert loader.step == STEPS
    assert len(peeked) < BATCH


def test_samples_that_cannot_be_read_are_replaced(make):
    loader = make(Faulty(N, bad={3, 7}), on_error="replace")
    with pytest.warns(RuntimeWarning, match="was replaced"):
        steps = steps_of(loader)
    assert len(steps) == EPOCHS * STEPS
    assert loader.stats["unreadable"] > 0


def test_the_history_tells_what_was_trained_on(make):
    loader = make(history=True)
    steps_of(loader)
    loader.commit()
    assert loader.store.epoch == EPOCHS
    assert np.isfinite(loader.store.at(2)).any()


def test_it_is_said_when_batches_become_small(make):
    loader = make(policy=BudgetPruning(0.5))
    steps = iter(loader)
    for _, picks in steps:
        loader.update(loss_of(picks.index), picks)
    with pytest.warns(RuntimeWarning, match=r"holds \d samples on 1 rank\(s\), while batch_size is 16. With fewer"):
        iter(loader)


def test_it_is_not_said_where_nothing_is_pruned_and_again_when_they_have_halved(make):
    loader = make(batch_size=8, policy=BudgetPruning(0.5, floor=0.1), epochs=10)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        steps_of(loader)
    sizes = [int(str(one.message).split("holds ")[1].split()[0]) for one in said]
    assert sizes
    assert max(sizes) < 7
    assert len({size.bit_length() for size in sizes}) == len(sizes)


def test_a_state_of_the_other_mode_is_refused_and_one_of_before_there_were_two_is_read(make):
    for _, picks in (loader := make(constant_steps=False)):
        loader.update(loss_of(picks.index), picks)
    state = loader.state_dict()
    with pytest.raises(ConfigError, match="constant_steps=False, this loader has constant_steps=True"):
        make(name="other").load_state_dict(state)
    del state["settings"]["constant_steps"], state["checksum"]
    make(name="same", constant_steps=False).load_state_dict(state)
    with pytest.raises(ConfigError, match="constant_steps=False, this loader has constant_steps=True"):
        make(name="another").load_state_dict(state)
