"""Batches made by threads: the same ones, in order, not too far ahead; and threads that end."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from support.ddp.children import until
from support.ddp.data import Faulty, Noisy, loss_of, state_of_rngs, write_mds, write_wds
from support.ddp.launch import environment

from infobatch_stream import ConfigError, DataError, IndexedWebDataset, InfoBatchLoader
from infobatch_stream.sources.mds import reader

SIZE = 48
THREADS = {"num_threads": 3}


class Numbers:
    """Map-style: sample i is i. It notes which were read, and by which thread."""

    def __init__(self, size=SIZE):
        self.size = size
        self.read, self.threads = [], set()

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        self.read.append(index)
        self.threads.add(threading.current_thread().name)
        time.sleep(1e-4 * (index % 3))  # so that threads overtake each other
        return index


def tars(folder):
    return IndexedWebDataset(write_wds(folder / "tars")).map(lambda sample: int(sample["cls"]))


def mds(folder):
    from streaming import StreamingDataset

    class Doubled(StreamingDataset):
        def __getitem__(self, index):
            return super().__getitem__(index)["i"]

    return Doubled(local=write_mds(folder / "mds", samples=SIZE))


def remote_mds(folder):
    """With room for some of the shards only."""
    from streaming import StreamingDataset

    write_mds(folder / "remote", samples=SIZE, per_shard=6)
    return StreamingDataset(
        remote=str(folder / "remote"), local=str(folder / "local"), cache_limit=6_000, shuffle=True, batch_size=4
    )


SOURCES = {"map": lambda folder: Numbers(), "tars": tars, "mds": mds, "remote mds": remote_mds}
sources = pytest.mark.parametrize("source", SOURCES)


@pytest.fixture
def make(tmp_path):
    def make(dataset, name="scores", **options):
        return InfoBatchLoader(dataset, tmp_path / f"{name}.zarr", **{"batch_size": 4, "epochs": 3, **options})

    return make


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    until(lambda: not alive(), 10)


def alive():
    return [thread for thread in threading.enumerate() if thread.name == "infobatch-batches"]


def steps_of(loader, steps=None):
    """Train to the end, or so many steps: numbers, indices and weights of each step."""
    found = []
    for epoch in range(loader.epoch, loader.epochs):
        for data, picks in loader:
            numbers = data["i"] if isinstance(data, dict) else data
            found.append((epoch, numbers.tolist(), picks.index.tolist(), picks.weight.tolist()))
            loader.update(loss_of(picks.index, epoch), picks)
            if len(found) == steps:
                return found
    return found


# ---- the same batches


@sources
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_batches_are_those_of_a_loop_without_threads(tmp_path, make, source):
    wanted = steps_of(make(SOURCES[source](tmp_path / "one")))
    found = steps_of(make(SOURCES[source](tmp_path / "other"), "threads", **THREADS))
    assert found == wanted
    assert all(numbers == index for _, numbers, index, _ in found)


@sources
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_a_run_goes_on_with_threads_where_one_without_stood(tmp_path, make, source):
    dataset = SOURCES[source](tmp_path)
    wanted = steps_of(make(dataset))
    loader = make(dataset, "part")
    begun = steps_of(loader, 17)
    again = make(dataset, "again", **THREADS)
    again.load_state_dict(loader.state_dict())
    assert begun + steps_of(again) == wanted


def test_each_thread_makes_batches_and_none_is_far_ahead(make):
    dataset = Numbers(400)
    loader = make(dataset, num_threads=3, prefetch_factor=2)
    for step, _ in enumerate(loader, 1):
        time.sleep(0.002)
        assert len(dataset.read) <= 4 * (step + 6)
    assert dataset.threads == {"infobatch-batches"}
    assert sorted(dataset.read) == list(range(400))


def test_a_dataset_of_streaming_is_as_it_was_before(tmp_path, make):
    dataset = mds(tmp_path)
    before = dict(vars(dataset))
    steps_of(make(dataset, **THREADS))
    assert vars(dataset).keys() == before.keys()


def test_the_global_random_state_is_left_alone(make):
    """Also by peek(), which seeds it for the samples and puts it back."""
    before = state_of_rngs()
    loader = make(Numbers(), **THREADS)
    for _, picks in loader:
        loader.update(loss_of(picks.index), picks)
        loader.peek()
    assert state_of_rngs() == before


# ---- errors


def test_an_error_comes_when_its_batch_is_due(make):
    loader = make(Faulty(SIZE, [7]), shuffle=False, **THREADS)
    batches = iter(loader)
    assert next(batches)[1].index.tolist() == [0, 1, 2, 3]
    with pytest.raises(OSError, match="sample 7 is rotten") as error:
        next(batches)
    assert "sample 7 of the Faulty could not be read" in error.value.__notes__[0]


def test_a_sample_that_cannot_be_read_is_replaced(make):
    loader = make(Faulty(SIZE, [7]), on_error="replace", epochs=1, **THREADS)
    with pytest.warns(RuntimeWarning, match="was replaced: sample 7"):
        weights = [float(weight) for _, picks in loader for weight in picks.weight]
    assert weights.count(0) == 1
    assert loader.stats["unreadable"] == 1


def test_a_stop_iteration_of_the_datasets_does_not_end_the_epoch(make):
    class Ends(Noisy):
        def __getitem__(self, index):
            return next(iter(()))

    with pytest.raises(DataError, match="raised StopIteration"):
        next(iter(make(Ends(SIZE), **THREADS)))


def test_a_collate_function_that_sorts_a_copy_is_refused(make):
    loader = make(Numbers(), collate_fn=lambda samples: torch.tensor(sorted(samples)), **THREADS)
    with pytest.raises(ConfigError, match="not in the order of its samples"):
        next(iter(loader))


@pytest.mark.parametrize(
    "options",
    [
        {"num_workers": 2},
        {"timeout": 3},
        {"persistent_workers": True},
        {"worker_init_fn": print},
        {"multiprocessing_context": "fork"},
    ],
    ids=str,
)
def test_options_of_worker_processes_are_refused(make, options):
    with pytest.raises(ConfigError, match=f"{next(iter(options))}=.* is for worker processes"):
        make(Numbers(), **THREADS, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"num_threads": -1},
        {"num_threads": 2.5},
        {"num_threads": 2, "prefetch_factor": 0.5},
        {"num_threads": 2, "prefetch_factor": 0},
    ],
)
def test_numbers_that_are_none_are_refused(make, options):
    with pytest.raises(ConfigError, match=r"must be a whole number"):
        make(Numbers(), **options)


# ---- the end


@pytest.mark.parametrize("left", ["dropped", "committed", "error"])
def test_threads_end_when_the_loop_is_left(make, left):
    dataset = Numbers(4_000)
    loader = make(dataset, **THREADS)
    batches = iter(loader)
    _, picks = next(batches)
    loader.update(loss_of(picks.index), picks)
    assert alive()
    if left == "committed":
        loader.commit()
        with pytest.raises(Exception, match="an epoch that was left"):
            next(batches)
    if left == "error":
        with pytest.raises(ValueError, match="mine"), loader:
            raise ValueError("mine")
    del batches
    until(lambda: not alive(), 10)
    assert len(dataset.read) < 100


PROGRAM = """
import sys, time
import torch
from infobatch_stream import InfoBatchLoader

class Slow:
    def __len__(self):
        return 400
    def __getitem__(self, index):
        if index > 10 and sys.argv[2] == "hangs":
            time.sleep(1000)
        return torch.ones(1000) * index

loader = InfoBatchLoader(Slow(), sys.argv[1], batch_size=4, epochs=3, num_threads=3, shuffle=False)
batches = iter(loader)
next(batches)
if sys.argv[2] == "fails":
    raise ValueError("mine")
print("end", flush=True)
"""


@pytest.mark.parametrize(("how", "code"), [("goes on", 0), ("fails", 1), ("hangs", 0)])
def test_an_interpreter_ends_in_the_midst_of_an_epoch(tmp_path, how, code):
    """Without an abort by a thread that comes back from torch, and also where one never comes back."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "scores.zarr"), how]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert "ValueError: mine" in done.stderr if how == "fails" else done.stderr == ""


# ---- several


def test_two_loaders_may_share_a_dataset(tmp_path, make):
    dataset = mds(tmp_path)
    loaders = [make(dataset, name, **THREADS) for name in ("one", "other")]
    for (one, picks), (other, others) in zip(*loaders, strict=True):
        assert one.tolist() == picks.index.tolist()
        assert other.tolist() == others.index.tolist()
    assert "get_item" not in vars(dataset)


def test_a_loader_that_is_made_while_threads_read_reads_as_the_first(tmp_path, make):
    dataset = mds(tmp_path)
    batches = iter(make(dataset, **THREADS))
    next(batches)
    vars(dataset)["get_item"] = reader._Lent(dataset)  # as while they read
    other = make(dataset, "other")
    assert all(other._run.source._open.shards)


def test_a_second_pass_has_threads_of_its_own(make):
    loader = make(Numbers(), epochs=4, **THREADS)
    seen = []
    for _ in range(4):
        batches = iter(loader)
        _, picks = next(batches)
        loader.update(loss_of(picks.index), picks)
        seen.append(picks.index.tolist())
    assert len(np.unique(seen, axis=0)) == 4
