"""What cannot work gives an error that names what was found and what to do, and leaves nothing half-made."""

import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import webdataset
import zarr
from support.ddp.data import Noisy, loss_of, wds, write_wds
from torch.utils.data import IterableDataset

from infobatch_stream import (
    ConfigError,
    DataError,
    FullData,
    IndexedWebDataset,
    InfoBatchLoader,
    ScoreStore,
    SoftPruning,
    StoreError,
)

N = 30


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "scores.zarr"


def loader_of(path, dataset=None, **options):
    return InfoBatchLoader(dataset or Noisy(N), path, **{"batch_size": 8, "epochs": 3, **options})


# ---- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"batch_size=0: .*at least 1"),
        ({"batch_size": 2.5}, r"batch_size=2.5: .*whole number"),
        ({"batch_size": True}, r"batch_size=True"),
        ({"epochs": 0}, r"epochs=0: .*at least 1"),
        ({"epochs": "90"}, r"epochs='90': .*whole number"),
        ({"seed": -1}, r"seed=-1: .*0\.\."),
        ({"seed": 2**64}, r"seed=18446744073709551616"),
        ({"seed": None}, r"seed=None"),
        ({"shuffle_window": 0}, r"shuffle_window=0"),
        ({"canonical_nodes": 0}, r"canonical_nodes=0"),
        ({"canonical_nodes": 3}, r"canonical_nodes=3 does not divide the global batch of 8.*divisor"),
        ({"delta": -0.1}, r"delta=-0.1: .*\[0, 1\]"),
        ({"delta": 1.01}, r"delta=1.01: .*\[0, 1\]"),
        ({"delta": float("nan")}, r"delta=nan"),
        ({"delta": "0.5"}, r"delta='0.5'"),
        ({"on_error": "skip"}, r"on_error='skip': choose one of 'raise', 'replace'"),
        ({"existing": "resume"}, r"existing='resume': choose one of 'error', 'overwrite', 'continue'"),
        ({"policy": 0.5}, r"policy=0.5 .*SoftPruning"),
        ({"policy": SoftPruning}, r"policy=.*SoftPruning"),
    ],
    ids=str,
)
def test_options_that_cannot_work(path, options, message):
    with pytest.raises(ConfigError, match=message):
        loader_of(path, **options)
    assert not path.parent.exists()


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.5, float("nan")])
def test_ratio_outside_of_0_to_1(ratio):
    with pytest.raises(ConfigError, match=rf"ratio={ratio}.*\[0, 1\)"):
        SoftPruning(ratio)


def test_a_policy_that_cannot_be_compared_is_refused(path):
    class Nameless:
        def rule(self, summary):
            return FullData().rule(summary)

    with pytest.raises(ConfigError, match=r"policy Nameless has no repr.*frozen dataclass"):
        loader_of(path, policy=Nameless())
    assert not path.parent.exists()


def test_whole_numbers_of_numpy_are_whole_numbers(path):
    loader = loader_of(path, batch_size=np.int64(8), epochs=np.int32(3), seed=np.uint64(5))
    assert len(list(loader)) == 4


# ---- datasets


class Endless(IterableDataset):
    def __iter__(self):
        yield 1


@pytest.mark.parametrize("of", ["torch", "webdataset"])
def test_iterable_datasets_are_refused_with_the_ways_out(path, tmp_path, of):
    dataset = Endless() if of == "torch" else webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)
    with pytest.raises(ConfigError, match="IterableDataset, which cannot be read by index") as caught:
        loader_of(path, dataset)
    for way_out in ("IndexedWebDataset(urls)", "StreamingDataset", "__getitem__", "infobatch-stream convert"):
        assert way_out in str(caught.value)
    assert not path.parent.exists()


@pytest.mark.parametrize("dataset", [object(), iter([1]), 5, {1, 2}], ids=lambda dataset: type(dataset).__name__)
def test_what_has_no_length_or_items_is_refused(path, dataset):
    with pytest.raises(ConfigError, match="has no __len__ and __getitem__"):
        loader_of(path, dataset)
    assert not path.parent.exists()


def test_an_empty_dataset_is_refused(path):
    with pytest.raises(ConfigError, match="Noisy is empty"):
        InfoBatchLoader(Noisy(0), path, batch_size=8, epochs=3)
    assert not path.parent.exists()


def test_a_module_of_the_user_that_is_called_streaming_does_no_harm(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "streaming", types.ModuleType("streaming"))
    assert len(loader_of(path)) == 4


def test_shards_without_samples_are_refused(path, tmp_path):
    with pytest.raises(DataError, match="no sample"):
        wds(write_wds(tmp_path / "shards", shards=2, samples=0))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # Python's own
@pytest.mark.parametrize(("damage", "workers"), [("missing", 0), ("truncated", 0), ("missing", 1)])
def test_a_shard_that_is_lost_under_way_is_named(path, tmp_path, damage, workers):
    folder = tmp_path / "shards"
    loader = loader_of(path, wds(write_wds(folder)), num_workers=workers)
    if damage == "missing":
        (folder / "s2.tar").unlink()
    else:
        with (folder / "s2.tar").open("r+b") as file:
            file.truncate(2048)
    with pytest.raises(DataError, match=r"s2\.tar"):
        list(loader)


class Stops(Noisy):
    """A dataset whose sample 11 asks an iterator for more than there is."""

    def __getitem__(self, index):
        return next(iter(())) if index == 11 else super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("where", ["the dataset", "collate_fn"])
def test_stop_iteration_of_the_users_code_does_not_end_the_epoch_silently(path, where, workers):
    options = {"collate_fn": lambda samples: next(iter(()))} if where == "collate_fn" else {}
    loader = loader_of(path, Noisy(N) if options else Stops(N), num_workers=workers, **options)
    with pytest.raises(DataError, match=f"{where}.* raised StopIteration"):
        list(loader)


def test_a_missing_extra_is_named(tmp_path):
    code = (
        "import sys; sys.modules['webdataset'] = None\n"  # as if it were not installed
        "from infobatch_stream import IndexedWebDataset, InfoBatchLoader\n"
        "print(len(InfoBatchLoader([1, 2], 'scores.zarr', batch_size=1, epochs=1)))\n"
        "try:\n    IndexedWebDataset('s0.tar')\nexcept ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout.startswith("2\nwebdataset is needed")
    assert "pip install 'infobatch-stream[wds]'" in done.stdout
    assert not list(tmp_path.iterdir())


# ---- stores


def files(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("existing", ["error", "continue"])
def test_a_store_of_another_dataset_is_refused(path, existing):
    ScoreStore.create(path, N + 1, fingerprint="map:other")
    before = files(path.parent)
    with pytest.raises(StoreError, match=r"another dataset: 31 samples \(map:other\).*30.*existing='overwrite'"):
        loader_of(path, existing=existing)
    assert files(path.parent) == before


def test_the_same_shards_in_another_order_are_another_dataset(path, tmp_path):
    shards = [str(tmp_path / "shards" / f"s{k}.tar") for k in range(4)]
    write_wds(tmp_path / "shards")
    list(loader_of(path, IndexedWebDataset(shards)).peek()[1].index)
    iter(loader_of(path, IndexedWebDataset(shards), collate_fn=list))
    with pytest.raises(StoreError, match="another dataset"):
        loader_of(path, IndexedWebDataset(shards[::-1]))


def test_shards_that_moved_are_the_same_dataset(path, tmp_path):
    iter(loader_of(path, wds(write_wds(tmp_path / "shards"))))
    shutil.move(tmp_path / "shards", tmp_path / "moved")
    iter(loader_of(path, wds(tmp_path / "moved")))


@pytest.mark.parametrize("existing", ["error", "continue", "overwrite"])
def test_a_foreign_store_is_refused_and_left_alone(path, existing):
    zarr.create_group(path, zarr_format=3).create_array("scores", shape=(N,), dtype="f4")
    before = files(path.parent)
    with pytest.raises(StoreError, match="is not a score store"):
        iter(loader_of(path, existing=existing))
    assert files(path.parent) == before


@pytest.mark.parametrize("existing", ["error", "continue", "overwrite"])
def test_a_folder_or_file_that_is_no_store_is_refused_and_left_alone(path, existing):
    path.mkdir(parents=True)
    (path / "thesis.txt").write_text("mine")
    with pytest.raises(StoreError, match="is not a score store"):
        iter(loader_of(path, existing=existing))
    assert (path / "thesis.txt").read_text() == "mine"
    with pytest.raises(StoreError, match="is not a score store"):
        iter(loader_of(path / "thesis.txt", existing=existing))
    assert (path / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("existing", ["error", "continue"])
def test_a_truncated_store_is_refused_until_overwritten(path, existing):
    loader = loader_of(path)
    iter(loader)
    with (path / "scores" / "c" / "0").open("r+b") as file:
        file.truncate(40)
    with pytest.raises(StoreError, match=r"truncated.*existing='overwrite'"):
        iter(loader_of(path, existing=existing))
    assert len(list(loader_of(path, existing="overwrite"))) == 4


def test_a_store_that_cannot_be_made_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot create the score store"):
        iter(loader_of(tmp_path / "file" / "scores.zarr"))
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


# ---- losses


@pytest.fixture
def begun(path):
    loader = loader_of(path)
    _, picks = next(iter(loader))
    return loader, picks


@pytest.mark.parametrize(
    ("losses", "found"),
    [
        (torch.tensor(0.5), r"float32\[\]"),
        (torch.ones(7), r"float32\[7\]"),
        (torch.ones(8, 1), r"float32\[8, 1\]"),
        (torch.ones(1, 8), r"float32\[1, 8\]"),
        (torch.ones(8, dtype=torch.int64), r"int64\[8\]"),
        (torch.ones(8, dtype=torch.complex64), r"complex64\[8\]"),
        (np.ones(8, np.float32), "ndarray"),
        (0.5, "float"),
        (None, "NoneType"),
    ],
    ids=str,
)
def test_losses_that_are_not_one_number_per_sample(begun, losses, found):
    loader, picks = begun
    with pytest.raises(
        ConfigError, match=rf"losses is (torch\.)?{found}; .*be a torch\.Tensor of .*\[8\].*reduction='none'"
    ):
        loader.update(losses, picks)
    if losses is not None:
        with pytest.raises(ConfigError, match=rf"score is (torch\.)?{found}"):
            loader.update(torch.ones(8), picks, score=losses)
    assert loader.step == 0
    assert np.isnan(ScoreStore.open(loader._run.scores.path).pending).all()


@pytest.mark.parametrize("picks", [None, torch.arange(8), (1, 2), {"index": 1}], ids=str)
def test_what_is_not_picks(begun, picks):
    loader, _ = begun
    with pytest.raises(ConfigError, match=f"picks that came with the batch, not {type(picks).__name__}"):
        loader.update(loss_of(torch.arange(8)), picks)


# ---- states


def change(**progress):
    return lambda state: state["progress"].update(progress)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": Noisy(N + 1)}, "num_samples=30, this loader has num_samples=31"),
        ({"batch_size": 4}, "global_batch=8, this loader has global_batch=4"),
        ({"seed": 1}, "seed=0, this loader has seed=1"),
        ({"policy": SoftPruning(0.3)}, r"policy='SoftPruning\(ratio=0.5\)', this loader has"),
        ({"delta": 0.5}, "delta=0.875"),
        ({"shuffle": False}, "shuffle=True"),
        ({"drop_last": True}, "drop_last=False"),
    ],
    ids=lambda value: value if isinstance(value, str) else ", ".join(value),
)
def test_a_state_of_another_run_is_refused_and_changes_nothing(path, tmp_path, options, message):
    state = loader_of(tmp_path / "first").state_dict()
    other = loader_of(path, **options)
    with pytest.raises(ConfigError, match=message):
        other.load_state_dict(state)
    assert not path.exists()
    assert (other.epoch, other.step) == (0, 0)
    assert list(other)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state.update(format=1), "has format 1; this version of infobatch-stream reads formats 2 to 4"),
        (lambda state: state.update(format=5), "has format 5; this version of infobatch-stream reads formats 2 to 4"),
        (lambda state: state.clear(), "not a loader state"),
        (lambda state: state.pop("scores"), "rank 0"),
        (lambda state: state.pop("pending"), "rank 0"),
        (lambda state: state.pop("progress"), "incomplete"),
        (lambda state: state.update(seeded=(3,)), "incomplete"),
        (lambda state: state.update(seeded=("three", "a model")), "incomplete"),
        (lambda state: state.update(seeded=(3, "a model")), "the checksum it says"),
        (lambda state: state.update(curriculum=([1, 2],)), "its masks are no bits in two rows"),
        (lambda state: state.update(scores=state["scores"][:-1]), "29 scores, 30 are needed"),
        (lambda state: state["progress"].pop("step"), "incomplete"),
        (lambda state: state["scores"].neg_(), "the checksum it says"),
        (lambda state: state["pending"].add_(1), "the checksum it says"),
        (lambda state: state["progress"].update(offered=31), "the checksum it says"),
        (lambda state: state.update(checksum=None), "the checksum it says"),
        (change(colour="red"), "incomplete"),
        (change(step=1, begun=10**30), "no place in a run"),
        (change(step=1, begun=0), "no place in a run"),
        (change(step=-1), "no place in a run"),
        (change(epoch=2**48), "no place in a run"),
        (change(offered=2**70), "no place in a run"),
        (change(offered=-1, kept=-1), "no place in a run"),
        (change(lanes=0), "no place in a run"),
        (change(epoch=0.0), "no place in a run"),
    ],
)
def test_a_damaged_or_newer_state_is_refused_and_changes_nothing(path, tmp_path, damage, message):
    first = loader_of(tmp_path / "first")
    for _, picks in first:
        first.update(loss_of(picks.index), picks)
    state = first.state_dict()
    damage(state)
    other = loader_of(path)
    iter(other)
    before = files(path)
    with pytest.raises(ConfigError, match=message):
        other.load_state_dict(state)
    assert files(path) == before
    assert (other.epoch, other.step) == (0, 0)


@pytest.mark.parametrize("state", [None, [], "state.pt", {"model": 1}], ids=str)
def test_what_is_no_state(path, state):
    with pytest.raises(ConfigError, match=r"not a loader state.*state_dict\(\)"):
        loader_of(path).load_state_dict(state)
    assert not path.exists()


def test_a_state_of_a_longer_run_is_refused_until_epochs_is_raised(path, tmp_path):
    longer = loader_of(tmp_path / "longer", epochs=5)
    for _ in range(4):
        for _, picks in longer:
            longer.update(loss_of(picks.index), picks)
            if (longer.epoch, longer.step) == (3, 2):
                break
    state, loader = longer.state_dict(), loader_of(path)
    with pytest.raises(ConfigError, match=r"saved in epoch 3; this run has 3: raise epochs"):
        loader.load_state_dict(state)
    loader.epochs = 5
    loader.load_state_dict(state)
    assert (loader.epoch, loader.step) == (3, 2)
