"""augmentation_rng: random numbers that depend on seed, epoch and sample alone."""

import random

import numpy as np
import pytest
import torch
from support.ddp.data import loss_of, state_of_rngs, write_mds, write_wds
from torch.utils.data import Subset, default_collate

from infobatch_stream import FullData, IndexedWebDataset, InfoBatchLoader, augmentation_rng

SIZE = 40
# Python's own warning that forking a process with threads is risky; workers are forked here as users fork them.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
WAYS = {"alone": {}, "threads": {"num_threads": 3}, "processes": {"num_workers": 2}}
ways = pytest.mark.parametrize("way", WAYS)


def drawn():
    rng = augmentation_rng()
    return torch.tensor([torch.rand((), generator=rng.torch).item(), rng.numpy.random()], dtype=torch.float64)


class Augmented:
    """Map-style: sample i is its number and two random numbers."""

    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        return index, drawn()


def tars(folder):
    return IndexedWebDataset(write_wds(folder / "tars")).map(lambda sample: (int(sample["cls"]), drawn()))


def mds(folder):
    from streaming import StreamingDataset

    class Mine(StreamingDataset):
        def __getitem__(self, index):
            return super().__getitem__(index)["i"], drawn()

    return Mine(local=write_mds(folder / "mds"))


SOURCES = {"map": lambda folder: Augmented(), "tars": tars, "mds": mds}


@pytest.fixture
def make(tmp_path):
    def make(dataset, name="scores", **options):
        options = {"batch_size": 8, "epochs": 2, "policy": FullData(), **options}
        return InfoBatchLoader(dataset, tmp_path / f"{name}.zarr", **options)

    return make


def draws_of(loader, steps=None):
    """Train on, to the end or so many steps: what was drawn, by epoch and sample."""
    found, made = {}, 0
    for epoch in range(loader.epoch, loader.epochs):
        for (numbers, values), picks in loader:
            for index, weight, value in zip(numbers.tolist(), picks.weight.tolist(), values.tolist(), strict=True):
                if weight:
                    found[epoch, index] = tuple(value)
            loader.update(loss_of(picks.index), picks)
            made += 1
            if made == steps:
                return found
    return found


@ways
@pytest.mark.parametrize("source", SOURCES)
def test_draws_are_the_same_in_every_way_of_making_batches(tmp_path, make, source, way):
    dataset = SOURCES[source](tmp_path)
    wanted = draws_of(make(dataset))
    assert len(set(wanted.values())) == len(wanted) == 2 * len(dataset)
    assert draws_of(make(dataset, "other", **WAYS[way])) == wanted


@ways
def test_draws_are_the_same_after_a_resume(make, way):
    wanted = draws_of(make(Augmented()))
    loader = make(Augmented(), "part", **WAYS[way])
    begun = draws_of(loader, 7)
    again = make(Augmented(), "again", **WAYS[way])
    again.load_state_dict(loader.state_dict())
    assert begun | draws_of(again) == wanted


def test_neither_batch_nor_order_matters_but_the_seed_does(make):
    wanted = draws_of(make(Augmented()))
    assert draws_of(make(Augmented(), "smaller", batch_size=3, shuffle=False)) == wanted
    assert not set(draws_of(make(Augmented(), "seed", seed=1)).values()) & set(wanted.values())


def test_peek_shows_what_will_be_drawn(make):
    loader = make(Augmented())
    assert torch.equal(loader.peek()[0][1], next(iter(loader))[0][1])


def test_a_subset_counts_its_own_samples(make):
    """Also where one stands in it twice, which is two samples."""
    found = draws_of(make(Subset(Augmented(), [5, 5, 7])))
    assert len(found) == 4  # by number of the inner dataset
    loader = make(Subset(Augmented(), [5, 5, 7]), "other", shuffle=False, batch_size=3)
    values = next(iter(loader))[0][1].tolist()
    assert values[0] != values[1]
    whole = draws_of(make(Augmented(), "whole"))
    assert [tuple(value) for value in values] == [whole[0, place] for place in range(3)]


def test_further_calls_for_a_sample_go_on(make):
    class Twice(Augmented):
        def __getitem__(self, index):
            return index, torch.cat([drawn(), drawn()])

    values = next(iter(make(Twice())))[0][1]
    assert len(values.unique()) == values.numel()


@ways
def test_where_samples_are_read_together_the_index_says_whose_they_are(make, way):
    class Together(Augmented):
        def __getitems__(self, indices):
            rngs = [augmentation_rng(index) for index in indices]
            values = [[torch.rand((), generator=rng.torch).item(), rng.numpy.random()] for rng in rngs]
            return [(i, torch.tensor(v, dtype=torch.float64)) for i, v in zip(indices, values, strict=True)]

    assert draws_of(make(Together(), **WAYS[way])) == draws_of(make(Augmented(), "one"))


@ways
def test_without_it_they_are_of_the_batch(make, way):
    """And a trial of the collate_fn, at the first step that is made, takes nothing of them."""

    def collate(samples):
        return default_collate(samples), drawn()

    def runs(name, **options):
        found, loader = [], make(Augmented(), name, collate_fn=collate, **options)
        for _ in range(2):
            for data, picks in loader:
                loader.update(loss_of(picks.index), picks)
                found.append(data[1].tolist())
        return found

    wanted = runs("one")
    assert len({tuple(value) for value in wanted}) == len(wanted)
    assert runs("other", **WAYS[way]) == wanted
    loader = make(Augmented(), "part", collate_fn=collate)
    batches = iter(loader)
    for _ in range(3):
        picks = next(batches)[1]
        loader.update(loss_of(picks.index), picks)
    again = make(Augmented(), "again", collate_fn=collate, **WAYS[way])
    again.load_state_dict(loader.state_dict())
    assert next(iter(again))[0][1].tolist() == wanted[3]


def test_outside_of_a_loader_they_follow_the_global_seed():
    torch.manual_seed(3)
    one, other = drawn(), drawn()
    assert not torch.equal(one, other)
    torch.manual_seed(3)
    assert torch.equal(drawn(), one)


def test_the_global_generators_are_not_drawn_from(make):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = state_of_rngs()
    draws_of(make(Augmented(), num_threads=2))
    assert state_of_rngs() == before
