"""Random state while a batch is made: set where code of the user's runs, and put back in the main process."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.ddp.data import Noisy, noise, state_of_rngs, write_wds
from torch.utils.data import TensorDataset, default_collate

from infobatch_stream import IndexedWebDataset, InfoBatchLoader
from infobatch_stream.sources import open_source


@pytest.fixture
def make(tmp_path):
    def make(dataset, **options):
        return InfoBatchLoader(dataset, tmp_path / "scores.zarr", batch_size=8, epochs=3, **options)

    return make


@pytest.fixture(autouse=True)
def _globals_come_back():
    before = np.random.get_bit_generator(), np.random.get_state(legacy=False), random.getstate(), torch.get_rng_state()
    yield
    np.random.set_bit_generator(before[0])
    np.random.set_state(before[1])
    random.setstate(before[2])
    torch.set_rng_state(before[3])


@pytest.mark.parametrize("normals", [0, 1, 2])
def test_a_normal_number_that_numpy_keeps_for_later_is_kept(make, normals):
    """It makes two at once, and gives out the second at the next call."""
    np.random.seed(3)
    np.random.randn(normals)
    before = state_of_rngs()
    make(Noisy(16)).peek()
    assert state_of_rngs() == before
    ours = np.random.randn(3).tolist()
    np.random.seed(3)
    assert np.random.randn(normals + 3).tolist()[normals:] == ours


def test_a_numpy_that_does_not_tell_of_it_alone_is_asked_for_all(make, monkeypatch):
    np.random.seed(3)
    np.random.randn()
    before = state_of_rngs()
    with monkeypatch.context() as patch:
        patch.setattr(np.random, "mtrand", SimpleNamespace())
        wanted = make(Noisy(16)).peek()[0][1]
    assert state_of_rngs() == before
    assert torch.equal(make(Noisy(16)).peek()[0][1], wanted)


def test_another_bit_generator_of_the_users_is_kept(make):
    wanted = make(Noisy(16)).peek()[0][1]
    mine = np.random.PCG64(5)
    np.random.set_bit_generator(mine)
    state = mine.state
    assert torch.equal(make(Noisy(16)).peek()[0][1], wanted)
    assert np.random.get_bit_generator() is mine
    assert mine.state == state


def test_a_batch_may_be_read_within_another(make, tmp_path):
    inner = InfoBatchLoader(Noisy(16), tmp_path / "inner.zarr", batch_size=8, epochs=1)

    class Outer(Noisy):
        def __getitem__(self, index):
            if self.nested:
                inner.peek()
            return index, noise()

    dataset = Outer(16)
    dataset.nested = False
    wanted = make(dataset).peek()[0][1]
    dataset.nested = True
    before = state_of_rngs()
    assert torch.equal(make(dataset).peek()[0][1], wanted)
    assert state_of_rngs() == before


def test_the_state_comes_back_after_an_error(make):
    class Broken(Noisy):
        def __getitem__(self, index):
            noise()
            raise ValueError("mine")

    before = state_of_rngs()
    with pytest.raises(ValueError, match="mine"):
        make(Broken(16)).peek()
    assert state_of_rngs() == before


def test_a_collate_function_that_draws_repeats_itself(make):
    def drawing(samples):
        return default_collate(samples), noise()

    loader = make(TensorDataset(torch.arange(16)), collate_fn=drawing)
    before = state_of_rngs()
    first, second = loader.peek()[0][1], loader.peek()[0][1]
    assert torch.equal(first, second)
    assert state_of_rngs() == before


def test_the_users_picks_are_copies(make):
    loader = make(Noisy(16))
    picks = loader.peek()[1]
    wanted = picks.index.tolist(), picks.weight.tolist()
    picks.index.zero_()
    picks.weight.zero_()
    again = loader.peek()[1]
    assert (again.index.tolist(), again.weight.tolist()) == wanted


def test_draws_are_ruled_out_only_where_nothing_of_the_users_runs(tmp_path):
    class Mine(TensorDataset):
        pass

    tensors = torch.arange(4)
    assert not open_source(TensorDataset(tensors)).draws
    assert open_source(Mine(tensors)).draws
    assert open_source(Noisy(4)).draws

    class MineOfTars(IndexedWebDataset):
        pass

    folder = write_wds(tmp_path / "shards")
    assert not open_source(IndexedWebDataset(folder)).draws
    assert open_source(IndexedWebDataset(folder).map(lambda sample: sample)).draws
    assert open_source(MineOfTars(folder)).draws
