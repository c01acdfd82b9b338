"""The loader in one process."""

import gc
import multiprocessing
import pickle
import shutil
import warnings
import weakref
from copy import deepcopy
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from support.ddp.data import Faulty, Noisy, loss_of, state_of_rngs, wds, write_wds
from support.late_device import LateDevice
from torch.utils.data import Subset, TensorDataset, default_collate

from infobatch_stream import (
    ConfigError,
    DataError,
    FullData,
    InfoBatchLoader,
    OutOfStepError,
    QuantilePruning,
    ScoreStore,
    SoftPruning,
    StoreError,
)
from infobatch_stream.pinned_ring import PinnedRing
from infobatch_stream.recorder import Recorder

N = 50
# Python's own warning that forking a process with threads is risky; workers are forked here as users fork them.
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture
def make(tmp_path):
    def make(dataset=None, store=None, **options):
        options = {"batch_size": 8, "epochs": 4, **options}
        return InfoBatchLoader(dataset or Noisy(N), store or tmp_path / "scores.zarr", **options)

    return make


def epoch_of(loader, losses=loss_of):
    """Train one epoch: its list of (data, picks)."""
    batches = []
    for data, picks in loader:
        loader.update(losses(picks.index, loader.epoch), picks)
        batches.append((data, picks))
    return batches


def run_of(loader):
    """Train to the end: for every step its epoch, indices, weights, numbers and noise."""
    steps = []
    for epoch in range(loader.epoch, loader.epochs):
        for (numbers, noise), picks in epoch_of(loader):
            steps.append((epoch, picks.index.tolist(), picks.weight.tolist(), numbers.tolist(), noise.tolist()))
    return steps


def joined(batches, name):
    return torch.cat([getattr(picks, name) for _, picks in batches])


# ---- data and picks


def test_data_is_what_dataset_and_collate_give(make):
    given = []

    def collate(samples):
        given.append(samples)
        return {"my": samples}

    dataset = [object() for _ in range(N)]
    for data, picks in make(dataset, collate_fn=collate):
        assert data["my"] is given[-1]
        assert all(sample is dataset[i] for sample, i in zip(data["my"], picks.index.tolist(), strict=True))


def test_without_collate_it_is_the_default_one(make):
    dataset = TensorDataset(torch.arange(N).float(), torch.arange(N))
    for (x, y), picks in make(dataset):
        wanted = default_collate([dataset[i] for i in picks.index.tolist()])
        assert torch.equal(x, wanted[0])
        assert torch.equal(y, wanted[1])


def test_a_dataset_that_reads_many_at_once_is_asked_so(make):
    class Many(Noisy):
        def __getitems__(self, indices):
            self.asked = indices
            return [(i, 0) for i in indices]

        __getitem__ = None

    dataset = Many(N)
    for _, picks in make(dataset):
        assert dataset.asked == picks.index.tolist()
    assert len(list(make(Subset(TensorDataset(torch.arange(N)), range(10)), existing="overwrite"))) == 2


def test_types_of_picks(make):
    for _, picks in make():
        assert (picks.index.dtype, picks.index.device.type) == (torch.int64, "cpu")
        assert picks.weight.dtype == torch.float32
        assert picks.index.shape == picks.weight.shape == (8,) == (len(picks),)


def test_to_moves_the_weight_and_keeps_the_index(make):
    loader = make()
    _, picks = next(iter(loader))
    moved = picks.to("meta", non_blocking=True)
    assert moved.weight.device.type == "meta"
    assert moved.index is picks.index
    assert picks.weight.device.type == "cpu"


def test_picks_that_were_moved_still_record(make):
    loader = make()
    epoch = [loader.update(loss_of(p.index), p.to(torch.device("cpu")).to("cpu")) for _, p in loader]
    loader.commit()
    assert len(epoch) == 7
    assert np.array_equal(ScoreStore.open(loader._run.scores.path).scores, loss_of(torch.arange(N)).numpy())


@pytest.mark.parametrize("travel", [deepcopy, lambda picks: pickle.loads(ForkingPickler.dumps(picks))])
def test_picks_that_travel_are_the_same_and_open_no_file(make, travel):
    """A tensor that comes from a worker holds a file open; a list of the picks of an epoch would run out of them."""

    def files():
        return len(list(Path("/proc/self/fd").iterdir()))

    kept, opened = [picks for _, picks in make()], files()
    arrived = [travel(picks) for picks in kept]
    assert files() == opened
    for picks, there in zip(kept, arrived, strict=True):
        for name in ("index", "weight", "_record"):
            one, other = getattr(picks, name), getattr(there, name)
            assert torch.equal(one, other)
            assert one.dtype == other.dtype
        assert there._origin == picks._origin


# ---- update


def test_update_returns_the_weighted_mean_and_gradients_flow(make):
    loader = make(policy=SoftPruning(0.5))
    epoch_of(loader)
    for _, picks in loader:
        x = loss_of(picks.index).requires_grad_()
        loss = loader.update(x * 2, picks)
        assert loss.item() == pytest.approx((picks.weight * x * 2).mean().item())
        (slope,) = torch.autograd.grad(loss, x)
        assert torch.allclose(slope, picks.weight * 2 / len(picks))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_losses_of_other_float_types_are_recorded_as_they_are(make, kind):
    loader = make()
    for _, picks in loader:
        losses = loss_of(picks.index).to(kind)
        before = losses.clone()
        loader.update(losses, picks)
        assert torch.equal(losses, before)  # never changed in place
    loader.commit()
    assert np.array_equal(
        ScoreStore.open(loader._run.scores.path).scores, loss_of(torch.arange(N)).to(kind).float().numpy()
    )


def test_score_is_recorded_instead_of_the_loss(make):
    loader = make()
    for _, picks in loader:
        loss = loader.update(loss_of(picks.index), picks, score=picks.index.float())
        assert loss.item() == pytest.approx((loss_of(picks.index) * picks.weight).mean().item())
    loader.commit()
    assert np.array_equal(ScoreStore.open(loader._run.scores.path).scores, np.arange(N, dtype=np.float32))


def test_losses_that_are_not_finite_are_counted_and_warned_of_once(make):
    loader = make()
    bad = {0: torch.nan, 1: torch.inf, 2: -torch.inf, 3: 1e300}

    def losses(index, epoch):
        values = loss_of(index).double()
        for i, value in bad.items():
            values[index == i] = value
        return values

    with pytest.warns(RuntimeWarning, match="NaN or infinite") as seen:
        full = epoch_of(loader, losses)
    assert len(seen) == 1
    filled = [i for i, w in zip(joined(full, "index").tolist(), joined(full, "weight").tolist(), strict=True) if not w]
    assert loader.stats["not_finite"] == 4, filled  # filled-up entries do not count
    loader.commit()
    scores = ScoreStore.open(loader._run.scores.path).scores
    assert np.isnan(scores[:4]).all()
    assert np.isfinite(scores[4:]).all()
    assert set(joined(epoch_of(loader), "index").tolist()) >= {0, 1, 2, 3}  # as never seen: kept


def test_losses_that_arrive_after_the_last_step_are_warned_of_too(make):
    class Late(Recorder):  # as one whose device is slow
        def add(self, *copy):
            self.waiting = [*getattr(self, "waiting", []), copy]

        def flush(self):
            for copy in self.__dict__.pop("waiting", []):
                super().add(*copy)

    loader = make()
    loader._run.scores.recorder = Late()
    epoch_of(loader, lambda index, epoch: torch.where(index == 3, torch.nan, loss_of(index)))
    with pytest.warns(RuntimeWarning, match="NaN or infinite"):
        loader.commit()
    assert loader.stats["not_finite"] == 1
    assert np.flatnonzero(np.isnan(ScoreStore.open(loader._run.scores.path).scores)).tolist() == [3]


def test_weights_and_losses_that_go_through_pinned_memory_are_the_same(make, tmp_path):
    class Computing(LateDevice):
        def to_device(self, block, beside):
            there = super().to_device(block, beside)
            self.work(self.now, 1000)  # the product with the losses is taken now
            return there

    def run(store, ring):
        loader, found = make(store=tmp_path / store, sample_weight=np.arange(1, N + 1) / N), []
        loader._run.scores.recorder.ring = ring
        for _ in range(3):
            found += [loader.update(loss_of(picks.index, loader.epoch), picks).item() for _, picks in loader]
        loader.commit()
        return found, ScoreStore.open(loader._run.scores.path).scores

    ring = PinnedRing(Computing())
    found, scores = run("ring.zarr", ring)
    wanted, wanted_scores = run("plain.zarr", PinnedRing())
    assert found == wanted
    assert np.array_equal(scores, wanted_scores)
    assert ring.device.calls["to_host"] == ring.device.calls["to_device"] == len(found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")  # a prototype, as torch says of it
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_losses_on_a_cuda_device_are_recorded_alike_and_no_step_waits(make, tmp_path, kind):
    def run(device, store):
        loader, found = make(store=tmp_path / store, batch_size=2), []
        for _ in range(2):
            for _, picks in loader:
                losses = loss_of(picks.index, loader.epoch).to(device, kind)
                torch.cuda.set_sync_debug_mode("error")
                try:
                    found.append(loader.update(losses, picks))
                finally:
                    torch.cuda.set_sync_debug_mode("default")
        loader.commit()
        return torch.stack(found).cpu(), ScoreStore.open(loader._run.scores.path).scores

    found, scores = run("cuda", "cuda.zarr")
    wanted, wanted_scores = run("cpu", "cpu.zarr")
    assert np.array_equal(scores, wanted_scores)
    assert torch.allclose(found, wanted)


def test_filled_up_entries_weigh_nothing_and_never_record(make):
    loader = make()
    seen = []
    for _, picks in loader:
        filled = picks.weight == 0
        seen.append(filled)
        loader.update(torch.where(filled, 1e9, loss_of(picks.index)), picks)
    assert torch.cat(seen[:-1]).sum() == 0
    assert seen[-1].sum() == 7 * 8 - N
    loader.commit()
    assert np.array_equal(ScoreStore.open(loader._run.scores.path).scores, loss_of(torch.arange(N)).numpy())


def test_after_each_epoch_the_store_holds_the_last_losses_recorded(make):
    loader = make(epochs=5)
    last = np.full(N, np.nan, np.float32)
    for epoch in range(5):
        batches = epoch_of(loader)
        for _, picks in batches:
            last[picks.index] = loss_of(picks.index, epoch).numpy()
        loader.commit()
        store = ScoreStore.open(loader._run.scores.path)
        assert np.array_equal(store.scores, last)
        assert store.epoch == loader.epoch == epoch + 1


def test_large_indices_and_half_precision_losses_stay_exact(make):
    class Virtual(Noisy):
        def __getitem__(self, index):
            return index

    size = 20_000_001  # float32 counts to 2^24 = 16,777,216 only, float16 to 2048
    loader = make(Virtual(size), batch_size=4096, epochs=1)
    wanted = torch.full((size,), torch.nan)
    for numbers, picks in loader:
        assert torch.equal(numbers, picks.index)
        losses = loss_of(picks.index).half()
        loader.update(losses, picks)
        wanted[picks.index] = losses.float()
        if loader.step == 4:
            break
    assert (picks.index > 2**24).any()
    loader.commit()
    scores = ScoreStore.open(loader._run.scores.path, mode="r").scores
    assert np.array_equal(scores, wanted.numpy(), equal_nan=True)
    shutil.rmtree(loader._run.scores.path)  # 160 MB


# ---- selection, through the loader


def test_weights_and_samples_are_those_of_the_policy(make):
    loader = make(policy=SoftPruning(0.5), epochs=8)
    epoch_of(loader)
    loader.commit()
    scores = ScoreStore.open(loader._run.scores.path).scores
    low = scores < scores.mean(dtype=np.float64)
    batches = epoch_of(loader)
    index, weight = joined(batches, "index").numpy(), joined(batches, "weight").numpy()
    index, weight = index[weight > 0], weight[weight > 0]
    assert np.unique(index).size == index.size
    assert set(np.flatnonzero(~low)) <= set(index)
    assert np.array_equal(weight, np.where(low[index], 2, 1))
    assert 0 < np.count_nonzero(low[index]) < np.count_nonzero(low)


@pytest.mark.parametrize(("delta", "epochs"), [(0.875, 8), (0.5, 5), (0, 3), (1, 3), (0.875, 3)])
def test_annealing_epochs_are_full_with_weight_1(make, delta, epochs):
    loader = make(delta=delta, epochs=epochs)
    for epoch in range(epochs):
        weight = joined(epoch_of(loader), "weight")
        full = epoch == 0 or epoch >= int(delta * epochs)
        assert (weight.unique().tolist() == [0, 1]) == full
        assert (loader.stats["pruned"] == 0) == full


def test_samples_that_were_never_seen_are_kept(make):
    loader = make(epochs=9, policy=SoftPruning(ratio=0.99))
    for _, picks in loader:
        loader.update(loss_of(picks.index), picks)
        break
    seen = set(picks.index.tolist())
    second = joined(epoch_of(loader), "index").tolist()
    assert set(range(N)) - seen <= set(second)
    assert not seen <= set(second)


def test_drop_last_drops_the_incomplete_step(make):
    loader = make(drop_last=True)
    for _ in range(4):
        batches = epoch_of(loader)
        assert len(batches) == loader.stats["kept"] // 8 == len(loader)
        assert (joined(batches, "weight") > 0).all()


def test_shuffle_false_keeps_the_order(make):
    loader = make(shuffle=False, policy=FullData())
    assert joined(epoch_of(loader), "index")[:N].tolist() == list(range(N))


def test_orders_differ_between_epochs_and_seeds_and_repeat(make, tmp_path):
    def orders(seed, store):
        loader = make(store=tmp_path / store, seed=seed)
        return [joined(epoch_of(loader), "index").tolist() for _ in range(4)]

    one = orders(1, "a")
    assert one == orders(1, "b")
    assert one != orders(2, "c")
    assert one[0] != one[3]


# ---- samples that cannot be read


def test_raise_passes_on_what_the_dataset_raises(make):
    loader = make(Faulty(N, [17]))
    with pytest.raises(OSError, match="sample 17 is rotten"):
        epoch_of(loader)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=forks)])
def test_replace_keeps_steps_and_batch_sizes(make, workers):
    bad = [3, 4, 5, 17, 49]
    loader = make(Faulty(N, bad), on_error="replace", num_workers=workers, epochs=3)
    with pytest.warns(RuntimeWarning, match=r"sample \d+: .*is rotten") as seen:
        batches = epoch_of(loader)
    assert len([one for one in seen if issubclass(one.category, RuntimeWarning)]) == 1
    assert len(batches) == 7
    for (numbers, _), picks in batches:
        assert len(picks) == 8
        assert torch.equal(numbers, picks.index)  # data, index and weight belong together
    index, weight = joined(batches, "index"), joined(batches, "weight")
    assert sorted(index[weight > 0].tolist()) == sorted(set(range(N)) - set(bad))
    assert loader.stats["unreadable"] >= len(bad)
    loader.commit()
    assert np.flatnonzero(np.isnan(ScoreStore.open(loader._run.scores.path).scores)).tolist() == bad


def test_a_replacement_records_nothing(make):
    loader = make(Faulty(N, range(0, N, 2)), on_error="replace")
    with pytest.warns(RuntimeWarning):
        batches = list(loader)
    for _, picks in batches:
        loader.update(torch.where(picks.weight > 0, loss_of(picks.index), 1e9), picks)
    loader.commit()
    odd = ScoreStore.open(loader._run.scores.path).scores[1::2]
    assert np.array_equal(odd, loss_of(torch.arange(1, N, 2)).numpy())


def test_replace_raises_when_nothing_of_a_batch_can_be_read(make):
    loader = make(Faulty(N, range(N)), on_error="replace")
    with pytest.raises(DataError, match=r"none of the 8 samples .*epoch 0.*step 0") as caught:
        epoch_of(loader)
    assert "rotten" in repr(caught.value.__cause__)


# ---- length, progress, stats


def test_len_before_the_first_epoch_is_that_of_an_unpruned_one(make):
    loader = make()
    assert len(loader) == 7
    assert len(epoch_of(loader)) == len(loader) == 7
    assert len(make(existing="continue", epochs=9)) == 7
    assert not make(store=loader._run.scores.path.with_name("other")).peek()[1].weight.eq(0).any()


def test_len_after_commit_is_that_of_the_coming_epoch(make):
    loader = make(epochs=8)
    epoch_of(loader)
    loader.commit()
    coming = len(loader)
    assert coming < 7
    assert coming == len(epoch_of(loader)) == -(-loader.stats["kept"] // 8)


def test_progress_rises_evenly_from_0_to_1(make):
    loader = make(epochs=5)
    assert loader.progress == 0
    for epoch in range(5):
        steps, found = 0, []
        for _, picks in loader:
            found.append(loader.progress)
            loader.update(loss_of(picks.index, epoch), picks)
            steps += 1
        assert found == pytest.approx([(epoch + k / steps) / 5 for k in range(steps)])
        assert loader.progress == pytest.approx((epoch + 1) / 5)
    assert loader.progress == 1
    loader.commit()
    assert loader.progress == 1


def test_stats_tell_of_the_epoch(make):
    loader = make(epochs=4)
    stats = loader.stats
    assert (stats["kept"], stats["pruned"], stats["saved"], stats["steps"]) == (N, 0, 0, 7)
    assert np.isnan([stats["threshold"], stats["mean_score"]]).all()
    kept = 0
    for epoch in range(4):
        batches = epoch_of(loader)
        stats = loader.stats
        count = int((joined(batches, "weight") > 0).sum())
        kept += count
        assert (stats["epoch"], stats["step"], stats["steps"]) == (epoch, len(batches), len(batches))
        assert (stats["kept"], stats["pruned"]) == (count, N - count)
        assert loader.kept_share == count / N
        assert stats["saved"] == pytest.approx(1 - kept / (N * (epoch + 1)))
        if epoch in (1, 2):  # the last is an annealing epoch: no threshold
            mean = ScoreStore.open(loader._run.scores.path, mode="r").scores.mean(dtype=np.float64)
            assert stats["threshold"] == pytest.approx(mean)
            assert stats["mean_score"] == pytest.approx(mean)
    saved = stats["saved"]
    loader.commit()
    assert loader.stats["saved"] == saved > 0
    assert loader.stats["kept"] == loader.stats["pruned"] == 0


def test_stats_of_a_continued_run_that_has_nothing_left(make):
    loader = make(epochs=1)
    epoch_of(loader)
    loader.commit()
    done = make(epochs=1, existing="continue")
    assert done.progress == 1
    assert done.stats["saved"] == 0


# ---- a store that exists


def one_epoch(make):
    loader = make()
    epoch_of(loader)
    loader.commit()
    return loader


def test_a_store_with_epochs_is_an_error_at_the_first_iteration(make):
    one_epoch(make)
    loader = make()  # making it is no error: load_state_dict may follow
    with pytest.raises(StoreError, match="load_state_dict") as caught:
        iter(loader)
    assert "existing='overwrite'" in str(caught.value)
    assert "existing='continue'" in str(caught.value)
    assert ScoreStore.open(loader._run.scores.path).epoch == 1


def test_overwrite_begins_anew(make):
    one_epoch(make)
    loader = make(existing="overwrite")
    assert loader.epoch == 0
    assert loader.peek()[1].weight.unique().tolist() == [1]
    assert joined(epoch_of(loader), "weight").max() == 1
    assert ScoreStore.open(loader._run.scores.path).epoch == 0


def test_continue_goes_on_with_scores_and_epoch(make):
    first = one_epoch(make)
    loader = make(existing="continue")
    assert loader.epoch == 1
    assert loader.progress == 0.25
    _, peeked = loader.peek()
    batches = epoch_of(loader)
    assert torch.equal(peeked.index, batches[0][1].index)
    assert loader.stats["pruned"] > 0
    loader.commit()
    del first


def test_a_store_that_another_run_commits_meanwhile_is_refused(make):
    one_epoch(make)
    loader = make(existing="continue")
    ScoreStore.open(loader._run.scores.path).commit()
    for _ in range(2):
        with pytest.raises(StoreError, match=r"stands at epoch 2 .*not at epoch 1.*another run"):
            iter(loader)
    assert ScoreStore.open(loader._run.scores.path).epoch == 2


def test_continue_begins_where_there_is_no_store(make):
    assert make(existing="continue").epoch == 0
    assert len(epoch_of(make(existing="continue"))) == 7


def test_load_state_dict_lifts_the_error(make):
    state = one_epoch(make).state_dict()
    loader = make()
    loader.load_state_dict(state)
    assert loader.epoch == 1
    assert loader.stats["pruned"] > 0
    assert len(epoch_of(loader)) == len(loader)


def test_pending_scores_of_a_killed_run_are_discarded_unless_continued(make):
    first = make()
    for _, picks in first:
        first.update(loss_of(picks.index), picks)
        break
    del first
    assert np.isfinite(ScoreStore.open(make()._run.scores.path).pending).sum() == 8
    continued = make(existing="continue")
    iter(continued)
    assert np.isfinite(ScoreStore.open(continued.store.path).pending).sum() == 8
    anew = make()
    iter(anew)
    assert np.isnan(ScoreStore.open(anew.store.path).pending).all()


def test_a_score_store_is_taken_for_a_path(make, tmp_path):
    fingerprint = make()._run.source.fingerprint
    store = ScoreStore.create(tmp_path / "mine.zarr", N, fingerprint=fingerprint)
    loader = make(store=store)
    epoch_of(loader)
    loader.commit()
    assert np.array_equal(store.scores, loss_of(torch.arange(N)).numpy())


# ---- epochs begin, are spent, and end


def test_the_context_manager_commits(make):
    with make() as loader:
        epoch_of(loader)
    assert loader.epoch == ScoreStore.open(loader._run.scores.path).epoch == 1


def test_with_an_exception_it_only_flushes(make):
    loader = make()
    with pytest.raises(KeyboardInterrupt), loader:
        epoch_of(loader)
        raise KeyboardInterrupt
    store = ScoreStore.open(loader._run.scores.path)
    assert store.epoch == loader.epoch == 0
    assert np.isfinite(store.pending).all()
    assert np.isnan(store.scores).all()


def test_a_fault_of_the_recorder_does_not_hide_the_users_exception(make, monkeypatch):
    loader = make()

    def fault():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(KeyError, match="mine"), loader:
        epoch_of(loader)
        monkeypatch.setattr(loader._run.scores.recorder, "flush", fault)
        raise KeyError("mine")


def test_after_a_break_iter_commits_and_begins_the_next_epoch(make):
    loader = make()
    for _, picks in loader:
        loader.update(loss_of(picks.index), picks)
        if loader.step == 3:
            break
    iter(loader)
    assert (loader.epoch, loader.step) == (1, 0)
    assert np.isfinite(ScoreStore.open(loader._run.scores.path).scores).sum() == 24


def test_an_epoch_of_which_nothing_was_updated_begins_again(make):
    loader = make()
    _, first = next(iter(loader))
    _, again = next(iter(loader))
    assert loader.epoch == 0
    assert torch.equal(first.index, again.index)
    loader.commit()
    assert loader.epoch == 0


def test_peek_spends_nothing_touches_no_randomness_and_equals_the_next_batch(make):
    loader = make(epochs=3)
    before = state_of_rngs()
    peeked = loader.peek()
    assert not loader._run.scores.path.exists()
    for _ in range(3):
        for data, picks in loader:
            assert state_of_rngs() == before
            assert torch.equal(peeked[1].index, picks.index)
            assert torch.equal(peeked[1].weight, picks.weight)
            assert torch.equal(peeked[0][1], data[1])  # the noise too
            loader.update(loss_of(picks.index), picks)
            peeked = loader.peek()
            assert state_of_rngs() == before
        loader.commit()
        peeked = loader.peek()


def test_update_with_peeked_picks_records_nothing(make):
    loader = make()
    _, picks = loader.peek()
    loss = loader.update(loss_of(picks.index), picks)
    assert loss.item() == pytest.approx(loss_of(picks.index).mean().item())
    iter(loader)
    _, picks = loader.peek()
    loader.update(loss_of(picks.index), picks)
    assert loader.step == loader.epoch == 0
    assert np.isnan(ScoreStore.open(loader._run.scores.path).pending).all()
    loader.commit()
    assert loader.epoch == 0


def test_an_epoch_without_update_is_spent_and_warned_of(make):
    loader = make()
    list(loader)
    with pytest.warns(RuntimeWarning, match=r"epoch 0 .*update\(\)"):
        iter(loader)
    assert loader.epoch == 1
    assert loader.stats["pruned"] == 0


def test_iterating_past_the_end_is_an_error_that_raising_epochs_lifts(make):
    loader = make(epochs=2)
    run_of(loader)
    with pytest.raises(ConfigError, match=r"all 2 epochs are done.*loader\.epochs"):
        iter(loader)
    loader.epochs = 3
    assert len(epoch_of(loader)) == len(loader)
    assert loader.epoch == 2


def test_epochs_may_be_raised_on_resume(make, tmp_path):
    loader = make(epochs=2)
    run_of(loader)
    longer = make(store=tmp_path / "longer.zarr", epochs=16)
    longer.load_state_dict(loader.state_dict())
    assert longer.epoch == 2
    epoch_of(longer)
    assert longer.stats["pruned"] > 0  # it is no annealing epoch now


def test_raising_epochs_after_a_commit_anneals_as_the_longer_run_does(make, tmp_path):
    loader = make(epochs=2)
    run_of(loader)
    loader.commit()
    longer = make(store=tmp_path / "longer.zarr", epochs=16)
    longer.load_state_dict(loader.state_dict())
    epoch_of(longer)
    assert longer.stats["pruned"] > 0


def test_an_epoch_that_was_begun_stays_annealing_when_epochs_are_raised(make, tmp_path):
    loader = make(epochs=2, delta=0.5)
    epoch_of(loader)
    for _, picks in loader:
        loader.update(loss_of(picks.index, 1), picks)
        loader.epochs = 8
        if loader.step == 2:
            break
    longer = make(store=tmp_path / "longer.zarr", epochs=8, delta=0.5)
    longer.load_state_dict(loader.state_dict())
    assert longer.stats["kept"] == loader.stats["kept"] == N
    assert torch.equal(longer.peek()[1].index, loader.peek()[1].index)


def test_an_iterator_of_an_epoch_that_was_left_raises(make):
    loader = make()
    old = iter(loader)
    _, picks = next(old)
    loader.update(loss_of(picks.index), picks)
    loader.commit()
    with pytest.raises(OutOfStepError, match=r"epoch that was left.*iter\(loader\)"):
        next(old)
    older = iter(loader)
    iter(loader)
    with pytest.raises(OutOfStepError, match="epoch that was left"):
        next(older)


def test_picks_of_another_epoch_are_refused(make):
    loader = make()
    _, old = epoch_of(loader)[-1]
    loader.commit()
    with pytest.raises(OutOfStepError, match="picks are of epoch 0, the loader is in epoch 1"):
        loader.update(loss_of(old.index), old)
    assert loader.step == 0


def test_picks_of_another_loader_are_refused(make, tmp_path):
    _, picks = next(iter(make()))
    other = InfoBatchLoader(Noisy(16), tmp_path / "other.zarr", batch_size=8, epochs=1)
    with pytest.raises(OutOfStepError, match="picks are another loader's"):
        other.update(loss_of(picks.index), picks)


# ---- workers and options


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=forks)])
def test_iterating_leaves_the_global_randomness_alone(make, workers):
    before = state_of_rngs()
    loader = make(epochs=2, num_workers=workers)
    for _ in range(2):
        for _, picks in loader:
            assert state_of_rngs() == before
            loader.update(loss_of(picks.index), picks)
    loader.commit()
    assert state_of_rngs() == before


@forks
@pytest.mark.parametrize("kind", ["map", "wds"])
def test_workers_change_neither_picks_nor_augmentation(make, tmp_path, kind):
    dataset = Noisy(N) if kind == "map" else wds(write_wds(tmp_path / "shards"))
    options = [
        {},
        {"num_workers": 1, "multiprocessing_context": "fork"},
        {"num_workers": 2, "multiprocessing_context": "fork"},
        {"num_workers": 2, "multiprocessing_context": "fork", "persistent_workers": True},
        {"num_workers": 2, "multiprocessing_context": "spawn", "persistent_workers": True},
    ]
    if kind == "map":
        options[-1] = {"num_workers": 1, "multiprocessing_context": "spawn"}
    runs = [
        run_of(make(dataset, store=tmp_path / f"{k}.zarr", epochs=2, delta=1, **given))
        for k, given in enumerate(options)
    ]
    noises = [noise for step in runs[0] for noise in step[4]]
    assert len({tuple(noise) for noise in noises}) > 0.9 * len(noises)
    for run in runs[1:]:
        assert run == runs[0]


@forks
def test_what_workers_fetched_ahead_of_a_break_never_comes_later(make, tmp_path):
    def run_with_breaks(**options):
        loader, steps = make(epochs=5, **options), []
        for epoch in range(5):
            for _, picks in loader:
                loader.update(loss_of(picks.index, epoch), picks)
                steps.append((epoch, picks.index.tolist()))
                if loader.step == 2 and epoch % 2 == 0:
                    break
        return steps

    options = {"num_workers": 2, "prefetch_factor": 4, "persistent_workers": True}
    assert run_with_breaks(store=tmp_path / "ahead", **options) == run_with_breaks()


@forks
def test_options_reach_the_inner_dataloader(make, tmp_path):
    def init(worker):
        (tmp_path / f"worker{worker}").touch()

    generator = torch.Generator()
    given = {"num_workers": 2, "prefetch_factor": 3, "timeout": 60, "worker_init_fn": init, "generator": generator}
    loader = make(**given, persistent_workers=True)
    inner = loader.dataloader
    assert isinstance(inner, torch.utils.data.DataLoader)
    assert {name: getattr(inner, name) for name in given} == given
    assert inner.persistent_workers
    epoch_of(loader)
    assert (tmp_path / "worker1").exists()


@pytest.mark.parametrize("name", ["sampler", "batch_sampler", "in_order"])
def test_options_that_the_plan_decides_are_refused_with_the_reason(make, tmp_path, name):
    with pytest.raises(ConfigError, match=f"{name}= .*plan"):
        make(**{name: None})
    assert not list(tmp_path.iterdir())


def test_instead_of_a_sampler_a_subset_is_named_and_its_repeats_are_samples_of_their_own(make):
    dataset = TensorDataset(torch.arange(N))
    chosen = [7, 7, 7, 30, 2, 49, 0, 0]
    sampler = torch.utils.data.SubsetRandomSampler(chosen)
    with pytest.raises(ConfigError, match=r"Subset\(dataset, indices\), in which an index may stand several times"):
        make(dataset, sampler=sampler)
    ((numbers,), picks), *rest = make(Subset(dataset, chosen), shuffle=False)
    assert numbers.tolist() == chosen
    assert picks.index.tolist() == list(range(8))
    assert not rest


@forks
@pytest.mark.parametrize("persistent", [False, True])
def test_a_loader_that_is_dropped_is_freed_with_its_workers(make, persistent):
    gc.disable()  # freed by reference counts, not some time later
    try:
        loader = make(num_workers=2, persistent_workers=persistent)
        for _, picks in loader:
            loader.update(loss_of(picks.index), picks)
            break
        assert len(multiprocessing.active_children()) == (2 if persistent else 0)
        gone = weakref.ref(loader)
        del loader
        assert gone() is None
        assert not multiprocessing.active_children()
    finally:
        gc.enable()


def test_nothing_warns_in_an_ordinary_run(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with make(policy=QuantilePruning(), epochs=3) as loader:
            run_of(loader)
            loader.state_dict()
