"""include= and sample_weight=: which samples a run is of, and what each counts; exact on resume."""

import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.ddp.data import Noisy, loss_of, wds, write_mds, write_wds

from infobatch_stream import BudgetPruning, ConfigError, FullData, InfoBatchLoader, OutOfStepError, SoftPruning
from infobatch_stream.curriculum import Curriculum
from infobatch_stream.per_sample import mask_of, weights_of
from infobatch_stream.policies import StepRule

N, BATCH, EPOCHS = 48, 4, 4
EVERY_THIRD = np.arange(0, N, 3)
MODES = {"published": {}, "constant": {"constant_steps": True}}


def mds(folder):
    from streaming import StreamingDataset

    write_mds(folder, samples=N)
    return StreamingDataset(local=str(folder), batch_size=BATCH)


DATASETS = {"map": lambda folder: Noisy(N), "wds": lambda folder: wds(write_wds(folder)), "mds": mds}


@pytest.fixture(params=MODES)
def make(request, tmp_path):
    def make(name="scores", dataset=None, **options):
        options = {"batch_size": BATCH, "epochs": EPOCHS, "delta": 1, **MODES[request.param], **options}
        return InfoBatchLoader(dataset or Noisy(N), tmp_path / f"{name}.zarr", **options)

    return make


def epoch_of(loader):
    """Index and weight of each step of the epoch that comes next."""
    steps = []
    for _, picks in loader:
        loader.update(loss_of(picks.index, loader.epoch), picks)
        steps.append((picks.index.tolist(), picks.weight.tolist()))
    return steps


def samples_of(steps):
    return sorted(i for index, weight in steps for i, w in zip(index, weight, strict=True) if w)


# ---- what is trained on


@pytest.mark.parametrize("kind", DATASETS)
@pytest.mark.usefixtures("no_stale_shared_memory")
def test_every_epoch_is_of_those_samples_alone(make, tmp_path, kind):
    loader = make(dataset=DATASETS[kind](tmp_path / "data"), include=EVERY_THIRD, policy=SoftPruning(0.5))
    assert len(loader) == loader.unpruned_steps == 4
    assert samples_of(epoch_of(loader)) == EVERY_THIRD.tolist()
    for _ in range(1, EPOCHS):
        assert set(samples_of(epoch_of(loader))) < set(EVERY_THIRD.tolist())
        assert loader.stats["kept"] + loader.stats["pruned"] == EVERY_THIRD.size
    loader.commit()
    assert np.flatnonzero(~np.isnan(loader.store.scores)).tolist() == EVERY_THIRD.tolist()


def test_a_policy_sees_the_scores_of_those_samples_alone(make):
    seen = make(epochs=1)
    epoch_of(seen)
    seen.commit()
    loader = make(existing="continue", include=EVERY_THIRD, policy=SoftPruning(0.5))
    iter(loader)
    assert loader.stats["threshold"] == pytest.approx(float(loss_of(torch.from_numpy(EVERY_THIRD)).mean()))


def test_a_budget_is_of_the_samples_that_are_included(make):
    loader = make(dataset=Noisy(4000), include=np.arange(0, 4000, 2), batch_size=50, policy=BudgetPruning(0.3))
    trained = sum(len(samples_of(epoch_of(loader))) for _ in range(EPOCHS))
    assert trained / (2000 * EPOCHS) == pytest.approx(0.7, abs=0.01)


@pytest.mark.usefixtures("no_stale_shared_memory")
def test_mixed_streams_have_their_repeats_of_those_samples(make, tmp_path):
    from streaming import Stream, StreamingDataset

    for first, name in ((0, "a"), (24, "b")):
        write_mds(tmp_path / name, first=first, samples=24)
    streams = [Stream(local=str(tmp_path / "a"), repeat=2), Stream(local=str(tmp_path / "b"), repeat=1)]
    loader = make(dataset=StreamingDataset(streams=streams, batch_size=BATCH), include=[1, 2, 30], policy=FullData())
    for _ in range(2):
        assert samples_of(epoch_of(loader)) == [1, 1, 2, 2, 30]


@pytest.mark.usefixtures("no_stale_shared_memory")
def test_where_streams_are_mixed_in_parts_each_epoch_draws_others_of_those_samples(tmp_path):
    from streaming import Stream, StreamingDataset

    for first, name in ((0, "a"), (24, "b")):
        write_mds(tmp_path / name, first=first, samples=24)
    streams = [Stream(local=str(tmp_path / "a"), proportion=0.7), Stream(local=str(tmp_path / "b"), proportion=0.3)]
    dataset = StreamingDataset(streams=streams, batch_size=1, epoch_size=16)
    options = {"batch_size": 1, "epochs": 6, "include": range(0, N, 2), "constant_steps": True}
    loader = InfoBatchLoader(dataset, tmp_path / "scores.zarr", **options)
    steps = [loader.unpruned_steps_of(epoch) for epoch in range(6)]
    assert len(set(steps)) > 1
    assert loader.total_steps == sum(steps)
    assert [len(epoch_of(loader)) for _ in range(6)] == steps


class KeepNone:
    def rule(self, summary):
        return StepRule((), (0.0,))

    def __repr__(self):
        return "KeepNone()"


def test_a_policy_that_keeps_none_of_them_is_told(make):
    loader = make(include=[5, 6], policy=KeepNone())
    epoch_of(loader)
    with pytest.raises(ConfigError, match="keeps none of the 2 entries of epoch 1"):
        iter(loader)


# ---- resume


def stage(epoch):
    """A curriculum: easy samples, then more, then all, then others."""
    return [np.arange(16), np.arange(32), None, np.arange(8, 48)][epoch]


def run(loader, states):
    """What a script with a curriculum does; a state before each step, and after the last."""
    steps = []
    for epoch in range(loader.epoch, loader.epochs):
        loader.include = stage(epoch)
        states.append((len(steps), loader.state_dict()))
        for _, picks in loader:
            loader.update(loss_of(picks.index, epoch), picks)
            steps.append((epoch, picks.index.tolist(), picks.weight.tolist()))
            states.append((len(steps), loader.state_dict()))
    return steps


def test_a_curriculum_goes_on_exactly_from_before_every_step(make):
    states = []
    steps = run(make(include=stage(0), policy=SoftPruning(0.5)), states)
    for epoch, samples in enumerate(map(stage, range(EPOCHS))):
        found = {i for e, index, _ in steps for i in index if e == epoch}
        assert len(found) > 8
        assert found <= set(range(N) if samples is None else samples.tolist())
    for number, (done, state) in enumerate(states):
        loader = make(f"resumed-{number}", include=stage(0), policy=SoftPruning(0.5))
        loader.load_state_dict(state)
        assert run(loader, []) == steps[done:], f"from step {done}"


def test_a_mask_that_is_set_early_is_in_the_state_too(make):
    loader = make(include=EVERY_THIRD)
    _, picks = next(iter(loader))
    loader.update(loss_of(picks.index), picks)
    loader.include = [1, 2]
    assert loader.include.nonzero()[0].tolist() == [1, 2]
    resumed = make("resumed", include=EVERY_THIRD)
    resumed.load_state_dict(loader.state_dict())
    rest = set(EVERY_THIRD.tolist()) - set(picks.index.tolist())
    assert set(samples_of(epoch_of(resumed))) == rest
    assert samples_of(epoch_of(resumed)) == [1, 2]


@pytest.mark.parametrize("other", [None, [0, 3]], ids=["all", "others"])
@pytest.mark.parametrize("option", ["include", "sample_weight"])
def test_another_mask_or_other_weights_are_refused_and_change_nothing(make, option, other):
    values = {"include": (EVERY_THIRD, other), "sample_weight": (np.ones(N), other and np.arange(N))}[option]
    loader = make(**{option: values[0]})
    epoch_of(loader)
    resumed = make("resumed", **({} if other is None else {option: values[1]}))
    with pytest.raises(ConfigError, match=f"saved with {option}='[0-9a-f]+', this loader has {option}="):
        resumed.load_state_dict(loader.state_dict())
    assert (resumed.epoch, resumed.step) == (0, 0)
    again = make("again", **{option: values[0]})
    again.load_state_dict(loader.state_dict())
    assert again.epoch == 1


def test_a_state_of_a_run_without_any_has_the_format_that_earlier_versions_read(make, tmp_path):
    plain = InfoBatchLoader(Noisy(N), tmp_path / "plain.zarr", batch_size=BATCH, epochs=EPOCHS)
    masked = make("masked", include=[1, 2])
    iter(plain), iter(masked)
    assert (plain.state_dict()["format"], masked.state_dict()["format"]) == (2, 3)


def test_an_epoch_that_goes_on_keeps_its_samples(make):
    loader = make(include=EVERY_THIRD)
    batches = iter(loader)
    _, picks = next(batches)
    loader.update(loss_of(picks.index), picks)
    resumed = make("resumed", include=EVERY_THIRD)
    resumed.load_state_dict(loader.state_dict())
    with pytest.raises(ConfigError, match=r"epoch 0 was begun with, of which 1 step\(s\) are done"):
        resumed.include = None
    resumed.include = EVERY_THIRD
    rest = epoch_of(resumed)
    assert samples_of([(picks.index.tolist(), picks.weight.tolist()), *rest]) == EVERY_THIRD.tolist()


@pytest.mark.parametrize("again", [False, True])
def test_picks_of_before_a_change_of_samples_are_refused(make, again):
    loader = make(include=EVERY_THIRD, policy=FullData())
    _, old = next(iter(loader))
    loader.include = [1, 2, 4]
    if again:
        iter(loader)
    with pytest.raises(OutOfStepError, match=r"or a change of loader\.include"):
        loader.update(loss_of(old.index), old)
    resumed = make("resumed", include=EVERY_THIRD, policy=FullData())
    resumed.load_state_dict(loader.state_dict())
    assert samples_of(epoch_of(resumed)) == samples_of(epoch_of(loader)) == [1, 2, 4]


def test_all_samples_are_no_mask(make):
    loader = make(include=np.ones(N, bool))
    assert loader.include is None
    epoch_of(loader)
    resumed = make("resumed")
    resumed.load_state_dict(loader.state_dict())
    assert resumed.epoch == 1


def test_damaged_masks_are_refused(make):
    loader = make()
    loader.include = [3]
    iter(loader)
    state = loader.state_dict()
    (masks,) = state["curriculum"]
    for damaged in (masks[:, :2], masks.float(), masks[0], ~masks):
        for saved in ({"curriculum": (damaged,)}, {"curriculum": None, "masks": damaged}):  # as of format 3
            with pytest.raises(ConfigError, match="damaged"):
                make("resumed").load_state_dict({**state, **saved})
    for curriculum in ((masks, masks), (), masks.tolist(), {"now": masks}):
        with pytest.raises(ConfigError, match="damaged"):
            make("resumed").load_state_dict({**state, "curriculum": curriculum})


# ---- what may be given


@given(st.lists(st.booleans(), min_size=2, max_size=70).filter(lambda mask: 0 < sum(mask) < len(mask)), st.randoms())
def test_a_mask_and_its_indices_say_the_same(mask, random):
    indices = [i for i, kept in enumerate(mask) if kept]
    random.shuffle(indices)
    whole, listed = mask_of(mask, len(mask)), mask_of(indices, len(mask))
    assert whole.values.tolist() == listed.values.tolist() == mask
    assert whole.digest == listed.digest
    assert mask_of([not kept for kept in mask], len(mask)).digest != whole.digest


@given(st.lists(st.lists(st.booleans(), max_size=5), min_size=1, max_size=9).filter(lambda found: any(map(any, found))))
def test_how_many_samples_of_each_shard_are_included(shards):
    mask = [kept for shard in shards for kept in shard]
    found = Curriculum(mask_of(mask, len(mask))).included_of(np.array([len(shard) for shard in shards]))
    assert found.tolist() == [len(shard) if all(mask) else sum(shard) for shard in shards]


def test_files_say_the_same_as_arrays(make, tmp_path):
    mask, weights = np.isin(np.arange(N), EVERY_THIRD), np.linspace(0, 2, N)
    np.save(tmp_path / "mask.npy", mask)
    np.save(tmp_path / "indices.npy", EVERY_THIRD)
    pq.write_table(pa.table({"good": mask, "w": weights}), tmp_path / "table.parquet")
    pq.write_table(pa.table({"index": EVERY_THIRD}), tmp_path / "few.parquet")
    for include in ("mask.npy", "indices.npy", "table.parquet:good", "few.parquet:index"):
        assert make(include=f"{tmp_path}/{include}").include.tolist() == mask.tolist()
    assert weights_of(f"{tmp_path}/table.parquet:w", N).digest == weights_of(weights, N).digest
    assert make(include=tmp_path / "mask.npy").include.tolist() == mask.tolist()


def test_the_rows_of_a_table_belong_to_the_samples_that_its_index_names(make, tmp_path):
    order = np.random.default_rng(0).permutation(N)
    weights = np.linspace(0, 2, N)
    table = pa.table({"index": order, "good": np.isin(order, EVERY_THIRD), "w": weights[order]})
    pq.write_table(table, tmp_path / "mixed.parquet")
    pq.write_table(table.slice(0, N // 2), tmp_path / "half.parquet")
    loader = make(include=f"{tmp_path}/mixed.parquet:good", sample_weight=f"{tmp_path}/mixed.parquet:w")
    assert np.flatnonzero(loader.include).tolist() == EVERY_THIRD.tolist()
    _, picks = loader.peek()
    assert picks.sample_weight.tolist() == weights[picks.index].astype(np.float32).tolist()
    loader.include = f"{tmp_path}/half.parquet:good"  # what has no row is left out
    assert np.flatnonzero(loader.include).tolist() == sorted({*EVERY_THIRD.tolist()} & {*order[: N // 2].tolist()})
    with pytest.raises(ConfigError, match="has no row for 24 of 48 samples"):
        make(sample_weight=f"{tmp_path}/half.parquet:w")
    pq.write_table(pa.table({"index": order, "loss": weights}), tmp_path / "loss.parquet")
    with pytest.raises(ConfigError, match="has the columns index, loss; name one"):  # and takes no other
        make(initial_scores=f"{tmp_path}/loss.parquet:score")
    pq.write_table(pa.table({"index": [1, 1], "good": [True, False]}), tmp_path / "twice.parquet")
    with pytest.raises(ConfigError, match="has sample 1 more than once"):
        make(include=f"{tmp_path}/twice.parquet:good")


def test_what_is_given_is_not_looked_at_again(make):
    mask = np.isin(np.arange(N), EVERY_THIRD)
    loader = make(include=mask, policy=FullData())
    mask[:] = True
    assert samples_of(epoch_of(loader)) == EVERY_THIRD.tolist()
    with pytest.raises(ValueError, match="read-only"):
        loader.include[0] = True


@pytest.mark.parametrize(
    ("include", "message"),
    [
        (np.ones(N - 1, bool), r"include is bool\[47\]; give bool\[48\]"),
        (np.ones(N), r"include is float64\[48\]"),
        (np.zeros(N, bool), "names no sample"),
        ([], "names no sample"),
        ([0, N], "indices from 0 to 48; the dataset has the samples 0 to 47"),
        ([-1], "indices from -1"),
        ([3, 3], "names 1 samples by 2 indices"),
        (np.ones(N, np.uint8), "or a mask as bool"),
        ([[0, 1]], r"include is int64\[1, 2\]"),
        ("here.txt", "give an array, a file .npy, or 'table.parquet:column'"),
        ("nowhere.npy", "cannot be read"),
        ("nowhere.parquet:x", "cannot be read"),
        ("{}/table.parquet:other", "has the columns good, gaps; name one"),
        ("{}/table.parquet", "has the columns good, gaps; name one"),
        ("{}/table.parquet:gaps", "has 1 empty rows"),
        ("{}/objects.npy", "cannot be read"),
    ],
    ids=str,
)
def test_what_names_no_samples_is_refused(make, tmp_path, include, message):
    pq.write_table(pa.table({"good": [True, False], "gaps": [1, None]}), tmp_path / "table.parquet")
    np.save(tmp_path / "objects.npy", np.array([{}, None], dtype=object))
    with pytest.raises(ConfigError, match=message):
        make(include=include.format(tmp_path) if isinstance(include, str) else include)
    assert not (tmp_path / "scores.zarr").exists()
    loader = make()
    with pytest.raises(ConfigError, match=message):
        loader.include = include.format(tmp_path) if isinstance(include, str) else include
    assert loader.include is None


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones(N - 1), r"sample_weight is float64\[47\]; give float\[48\]"),
        (np.ones(N, bool), "sample_weight is bool"),
        (np.where(np.arange(N) == 7, -1.0, 1), "of sample 7 is -1.0"),
        (np.where(np.arange(N) > 45, np.nan, 1), "of sample 46 is nan, and 2 in all"),
        (np.full(N, 1e300), "of sample 0 is 1e"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_what_are_no_weights_is_refused(make, weights, message):
    with pytest.raises(ConfigError, match=message):
        make(sample_weight=weights)


# ---- weights of samples


@pytest.mark.parametrize("workers", [{}, {"num_workers": 1, "multiprocessing_context": "fork"}], ids=["0", "1"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_they_multiply_the_losses_and_leave_picks_and_scores_as_they_are(make, workers):
    weights = np.linspace(0, 2, N, dtype=np.float32)
    weighted, plain = make("weighted", sample_weight=weights, **workers), make("plain")
    for _ in range(2):
        for (_, picks), (_, same) in zip(weighted, plain, strict=True):
            losses = loss_of(picks.index)
            assert picks.index.tolist() == same.index.tolist()
            assert torch.equal(picks.weight, same.weight)
            assert same.sample_weight is None
            assert picks.sample_weight.tolist() == weights[picks.index].tolist()
            share = (picks.weight * torch.from_numpy(weights[picks.index]) * losses).sum() / BATCH
            assert weighted.update(losses, picks).item() == pytest.approx(share.item())
            plain.update(losses, same)
    weighted.commit(), plain.commit()
    assert weighted.store.scores.tolist() == plain.store.scores.tolist()


def test_what_sorts_a_batch_has_them(make):
    def heaviest_first(samples, picks):
        order = picks.sample_weight.argsort(descending=True)
        return [samples[place][0] for place in order], picks[order]

    loader = make(sample_weight=np.arange(N), collate_with_picks=heaviest_first)
    for data, picks in loader:
        assert data == picks.index.tolist() == picks.sample_weight.tolist() == sorted(data, reverse=True)


def test_they_go_where_the_picks_go(make):
    loader = make(sample_weight=np.arange(N))
    _, picks = loader.peek()
    wanted = picks.index.tolist()
    assert picks.sample_weight.tolist() == wanted
    assert picks[[2, 0]].sample_weight.tolist() == [wanted[2], wanted[0]]
    assert picks.to("cpu").sample_weight.tolist() == wanted
    assert pickle.loads(pickle.dumps(picks)).sample_weight.tolist() == wanted
