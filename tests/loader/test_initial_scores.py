"""Runs that begin with scores of elsewhere: what their first epoch prunes, and that they resume exactly."""

import shutil
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from infobatch_stream import BudgetPruning, ConfigError, FullData, InfoBatchLoader, ScoreStore, SoftPruning, StoreError
from infobatch_stream.sources import open_source
from infobatch_stream.sources.map_style import map_fingerprint

N = 1000
SCORES = np.random.default_rng(0).gamma(0.5, 1, N)
UNKNOWN = set(range(0, N, 10))
SCORES[list(UNKNOWN)] = np.nan


THIRD = BudgetPruning(0.3)


def make(path, policy=THIRD, epochs=2, **options):
    return InfoBatchLoader(list(range(N)), path, batch_size=10, epochs=epochs, policy=policy, **options)


def train(loader, until=None):
    """[epoch, index, weight] of every step; until (epoch, step), which is made still."""
    steps = []
    for epoch in range(loader.epoch, loader.epochs):
        for _, picks in loader:
            loader.update(torch.from_numpy(SCORES).nan_to_num(1.0)[picks.index] / (epoch + 2), picks)
            steps.append((epoch, picks.index.tolist(), picks.weight.tolist()))
            if (epoch, loader.step) == until:
                return steps
    return steps


def trained(steps, epoch):
    return {i for at, index, weight in steps if at == epoch for i, w in zip(index, weight, strict=True) if w > 0}


@pytest.mark.parametrize("delta", [1.0, 0.875])
def test_a_run_of_two_epochs_meets_its_budget_and_keeps_what_is_not_known(tmp_path, delta):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader = make(tmp_path / "s.zarr", delta=delta, initial_scores=SCORES)
        steps = train(loader)
    assert loader.stats["saved"] == pytest.approx(0.3, abs=0.03)
    first, second = (trained(steps, epoch) for epoch in (0, 1))
    assert first >= UNKNOWN
    assert len(first) == pytest.approx(N * (1 - 0.6 * (0.9 / 1.9 if delta == 1 else 1)), abs=60)
    assert (len(second) < N) == (delta == 1)


def test_the_first_epoch_weighs_by_what_is_known_so_that_sums_stay_unbiased(tmp_path):
    sums = []
    for seed in range(30):
        loader = make(tmp_path / f"{seed}.zarr", initial_scores=SCORES, seed=seed)
        sums.append(sum(picks.weight.sum().item() for _, picks in loader))
    assert np.mean(sums) == pytest.approx(N, abs=4 * np.std(sums) / np.sqrt(len(sums)))


def test_a_budget_that_only_scores_make_possible_is_refused_at_the_first_iteration_without_them(tmp_path):
    with pytest.raises(ConfigError, match=r"largest fraction is 0\. .*initial_scores="):
        iter(make(tmp_path / "s.zarr"))
    with pytest.raises(ConfigError, match=r"in the first the 90% that have a score.*largest fraction is 0\.3825"):
        iter(make(tmp_path / "t.zarr", BudgetPruning(0.4), initial_scores=SCORES))


@pytest.mark.parametrize("policy", [SoftPruning(), BudgetPruning(0.1)])
def test_a_run_of_one_epoch_that_may_prune_hears_of_nothing(tmp_path, policy):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader = make(tmp_path / "s.zarr", policy, initial_scores=SCORES)
        iter(loader)
    assert 0 < loader.stats["pruned"] < N


# ---- where the scores may be


def sources(tmp_path):
    """The same scores in each of the forms that are taken."""
    np.save(tmp_path / "s.npy", SCORES)
    order = np.random.default_rng(1).permutation([i for i in range(N) if i not in UNKNOWN])
    rows = {"index": order, "loss": SCORES[order], "other": order}
    pa.parquet.write_table(pa.table(rows), tmp_path / "rows.parquet")
    whole = pa.array(SCORES, mask=np.isnan(SCORES))
    pa.parquet.write_table(pa.table({"loss": whole, "other": whole}), tmp_path / "whole.parquet")
    pa.parquet.write_table(pa.table({"index": np.arange(N), "score": whole, "x": whole}), tmp_path / "export.parquet")
    earlier = ScoreStore.create(tmp_path / "e.zarr", N, map_fingerprint(N), scores=SCORES.astype("f4"), epoch=2)
    return {
        "array": SCORES, "tensor": torch.from_numpy(SCORES), "npy": tmp_path / "s.npy", "store": earlier,
        "path of a store": str(earlier.path), "by index": f"{tmp_path}/rows.parquet:loss",
        "in order": f"{tmp_path}/whole.parquet:loss", "as exported": tmp_path / "export.parquet",
    }  # fmt: skip


FORMS = ["array", "tensor", "npy", "store", "path of a store", "by index", "in order", "as exported"]


@pytest.mark.parametrize("form", FORMS)
def test_scores_are_taken_from_arrays_stores_and_files(tmp_path, form):
    loader = make(tmp_path / "s.zarr", initial_scores=sources(tmp_path)[form])
    iter(loader)
    np.testing.assert_array_equal(loader.store.scores, SCORES.astype(np.float32))
    assert loader.store.seeded.samples == N - len(UNKNOWN)


@pytest.mark.parametrize(
    ("columns", "given", "words"),
    [
        ({"index": [0, 1, 1], "loss": [1.0, 2, 3]}, ":loss", "has sample 1 more than once"),
        ({"index": [0, -1], "loss": [1.0, 2]}, ":loss", "has -1; the dataset has the samples 0 to 999"),
        ({"index": [N], "loss": [1.0]}, ":loss", "has 1000; the dataset has"),
        ({"index": [0.5], "loss": [1.0]}, ":loss", "by whole numbers"),
        ({"index": [0], "loss": ["a"]}, ":loss", "give one number for each of the samples"),
        ({"index": [0], "loss": [np.inf]}, ":loss", "1 are infinite"),
        ({"loss": [1.0, 2]}, ":loss", r"float64\[2\]; give one number for each"),
        ({"loss": [1.0], "other": [1.0]}, "", "has the columns loss, other; name one"),
        ({"loss": [1.0]}, ":los", "has the columns loss; name one"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_before_anything_is_written(tmp_path, columns, given, words):
    pa.parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    with pytest.raises(ConfigError, match=words):
        make(tmp_path / "s.zarr", initial_scores=f"{tmp_path}/t.parquet{given}")
    assert not (tmp_path / "s.zarr").exists()


def test_scores_of_another_dataset_and_files_of_other_kinds_are_refused(tmp_path):
    for number, other in enumerate([(N + 1, map_fingerprint(N + 1)), (N, "wds:1")]):
        store = ScoreStore.create(tmp_path / f"{number}.zarr", *other)
        with pytest.raises(StoreError, match="holds the scores of another dataset"):
            make(tmp_path / "s.zarr", initial_scores=store)
    for name in ("t.csv", "missing.npy", "missing.parquet:loss"):
        with pytest.raises(ConfigError, match=r"\.npy|cannot be read"):
            make(tmp_path / "s.zarr", initial_scores=tmp_path / name)


# ---- what stands at the place of the store


def test_a_run_that_goes_on_has_its_own_scores(tmp_path):
    first = make(tmp_path / "s.zarr", FullData(), epochs=3)
    train(first, (0, 100))
    first.commit()
    mine = np.array(first.store.scores)
    del first
    with pytest.raises(StoreError, match=r"already holds 1 epoch\(s\)"):
        iter(make(tmp_path / "s.zarr", initial_scores=SCORES))
    again = make(tmp_path / "s.zarr", SoftPruning(), epochs=3, existing="continue", initial_scores=SCORES)
    assert (again.epoch, again.store.seeded) == (1, None)
    np.testing.assert_array_equal(again.store.scores, mine)
    del again
    anew = make(tmp_path / "s.zarr", existing="overwrite", initial_scores=SCORES)
    iter(anew)
    assert (anew.epoch, anew.store.epoch, anew.store.seeded.samples) == (0, 0, 900)


def test_a_seeded_store_is_used_as_it_is_and_not_thrown_away_unasked(tmp_path):
    given = make(tmp_path / "given.zarr", initial_scores=SCORES)
    wanted = train(given)
    ScoreStore.seed(tmp_path / "s.zarr", SCORES, map_fingerprint(N))
    with pytest.raises(StoreError, match="holds no epochs yet, but scores to begin with"):
        iter(make(tmp_path / "s.zarr", existing="overwrite"))
    assert train(make(tmp_path / "s.zarr")) == wanted


def test_a_budget_goes_on_at_its_pace_without_a_checkpoint(tmp_path):
    policy = BudgetPruning(0.4)
    first = make(tmp_path / "s.zarr", policy, epochs=10, initial_scores=SCORES)
    train(first, (1, 1))
    del first
    again = make(tmp_path / "s.zarr", policy, epochs=10, existing="continue")
    assert again.epoch == 1
    iter(again)
    assert again.stats["pruned"] / N == pytest.approx(0.4 * 10 / 7.9, abs=0.05)


# ---- resume


@pytest.mark.parametrize("constant_steps", [False, True])
@pytest.mark.parametrize("step", [1, 7, 30])
def test_from_a_step_of_the_first_epoch_a_run_goes_on_exactly_also_when_its_store_is_gone(
    tmp_path, step, constant_steps
):
    options = {"constant_steps": constant_steps, "delta": 1.0}
    whole = train(make(tmp_path / "whole.zarr", initial_scores=SCORES, **options))
    first = make(tmp_path / "s.zarr", initial_scores=SCORES, **options)
    begun = train(first, (0, step))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    del first
    shutil.rmtree(tmp_path / "s.zarr")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    rest = make(tmp_path / "s.zarr", **options)
    rest.load_state_dict(state)
    assert rest.store.seeded.source == "an array"
    assert begun + train(rest) == whole
    other = make(tmp_path / "other.zarr", initial_scores=SCORES * 2, **options)
    other.load_state_dict(state)
    assert begun + train(other) == whole
    state["seeded"] = (1, *state["seeded"][1:])
    with pytest.raises(ConfigError, match="the state is damaged"):
        other.load_state_dict(state)


def test_a_state_of_format_3_is_read(tmp_path):
    """In it, masks and where scores came from had other forms; a state without a checksum is one of before that."""
    options = {"delta": 1.0}
    whole = make(tmp_path / "whole.zarr", initial_scores=SCORES, **options)
    iter(whole)
    whole.include = np.arange(0, len(SCORES), 2)
    state = whole.state_dict()
    (masks,) = state.pop("curriculum")
    del state["checksum"]
    state |= {"format": 3, "masks": masks, "seeded": dict(zip(("samples", "source"), state["seeded"], strict=True))}
    rest = make(tmp_path / "rest.zarr", **options)
    rest.load_state_dict(state)
    assert rest.store.seeded == whole.store.seeded
    assert train(rest) == train(whole)


@pytest.mark.usefixtures("few_open_files")
def test_shards_are_told_apart_by_their_fingerprint(shards, tmp_path):
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=str(shards), batch_size=4)
    scores = np.linspace(0.1, 1, 48)
    ScoreStore.seed(tmp_path / "s.zarr", scores, open_source(dataset).fingerprint)
    loader = InfoBatchLoader(dataset, tmp_path / "s.zarr", batch_size=4, epochs=2, collate_fn=list)
    iter(loader)
    assert loader.stats["pruned"] > 0
    ScoreStore.seed(tmp_path / "map.zarr", scores, map_fingerprint(48))
    with pytest.raises(StoreError, match="scores of another dataset"):
        InfoBatchLoader(dataset, tmp_path / "map.zarr", batch_size=4, epochs=2)
