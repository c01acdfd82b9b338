"""What a run holds does not grow with its epochs, and what it drops is freed at once."""

import gc
import json
import tempfile
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from support.ddp.data import Noisy, loss_of, write_mds, write_wds
from support.ddp.launch import start

from infobatch_stream import InfoBatchLoader
from infobatch_stream.planning.epoch_plan import EpochPlan
from infobatch_stream.policies.pruning import SoftPruning

EPOCHS = 50
GROWTH = 2048  # KiB from epoch 10 to the last: 51 an epoch; measured: 160 in all
HELD = [
    "descriptors",
    "descriptors of workers",
    "mapped segments",
    "left segments",
    "maps of the store",
    "threads",
    "children",
    "temporary files",
]
KINDS = ["map", "wds", "mds"]
kinds = pytest.mark.parametrize("kind", KINDS)
ways = pytest.mark.parametrize("way", ["persistent", "fresh", "threads", "reload"])


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """For each kind of data and way of training, what was held at the end of each epoch. The kinds run side by side."""

    def run(kind):
        folder = folders[kind]
        with tempfile.TemporaryDirectory() as temporary:  # with a short name, for sockets
            start("leaks.py", kind, folder, temporary, seconds=240)
        return json.loads((folder / "facts.json").read_text())

    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    write_wds(folders["wds"] / "shards", samples=24)
    write_mds(folders["mds"] / "shards", samples=96, per_shard=24)
    with ThreadPoolExecutor() as threads:
        return dict(zip(KINDS, threads.map(run, KINDS), strict=True))


def growth(epochs, name, first):
    """From the most of five epochs, from ``first`` on, to the least of the last five.

    What a worker or a pipe still holds for a moment comes and goes; a leak stays, and grows with every epoch.
    """
    before, after = ([held[name] for held in part] for part in (epochs[first : first + 5], epochs[-5:]))
    return min(after) - max(before)


def test_a_run_holds_as_much_after_eight_epochs_as_after_four(tmp_path):
    with tempfile.TemporaryDirectory() as temporary:
        start("leaks.py", "map", tmp_path, temporary, 8, seconds=120)
    for way, epochs in json.loads((tmp_path / "facts.json").read_text()).items():
        assert len(epochs) == 8
        for name in ("left segments", "maps of the store", "children", "temporary files"):
            assert epochs[-1][name] <= max(held[name] for held in epochs[:4]), way
        assert all((held["resident in workers"] > 0) == (way == "persistent") for held in epochs)


@pytest.mark.slow(short="test_a_run_holds_as_much_after_eight_epochs_as_after_four")
@kinds
@ways
def test_what_a_run_holds_does_not_grow_with_its_epochs(facts, kind, way):
    epochs = facts[kind][way]
    assert len(epochs) == EPOCHS
    grown = {name: growth(epochs, name, 4) for name in HELD}
    assert {name: more for name, more in grown.items() if more > 0} == {}


@pytest.mark.slow(short="test_a_run_holds_as_much_after_eight_epochs_as_after_four")
@kinds
@ways
@pytest.mark.parametrize("name", ["resident", "resident in workers"])
def test_the_memory_of_a_run_does_not_grow_with_its_epochs(facts, kind, way, name):
    epochs = facts[kind][way]
    assert growth(epochs, name, 9) < GROWTH


@pytest.mark.slow(short="test_a_run_holds_as_much_after_eight_epochs_as_after_four")
@kinds
@ways
def test_every_way_of_training_had_its_workers(facts, kind, way):
    """Or the other tests would look at nothing."""
    epochs = facts[kind][way]
    assert all((held["resident in workers"] > 0) == (way == "persistent") for held in epochs)


# Python's own warning that forking a process with threads is risky; workers are forked here as users fork them.
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize(
    "options", [{}, {"num_workers": 1}, {"num_workers": 1, "persistent_workers": True}, {"num_threads": 2}], ids=str
)
def test_a_dropped_loader_is_freed_at_once(tmp_path, options):
    """Its store with it: the maps and the lock."""
    loader = InfoBatchLoader(Noisy(16), tmp_path / "scores.zarr", batch_size=8, epochs=2, **options)
    for _ in range(2):
        for _, picks in loader:
            loader.update(loss_of(picks.index), picks)
    dropped = weakref.ref(loader)
    gc.collect()
    gc.disable()
    try:
        del loader
        assert dropped() is None
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    finally:
        gc.enable()
    held = [file.readlink() for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
    assert not [file for file in held if str(tmp_path) in str(file)]


@pytest.mark.parametrize("data", ["shards", "map", "pool"])
def test_a_dropped_plan_is_freed_at_once(data):
    """Not when the garbage collector comes by: a plan holds windows of entries, and counts of shards."""
    sizes = {
        "shards": {"shard_sizes": np.full(10, 100)},
        "pool": {"pool": (np.arange(1000), np.full(10, 100))},
        "map": {},
    }[data]
    scores = np.arange(1000, dtype=np.float32)
    plan = EpochPlan(scores, SoftPruning(), seed=0, epoch=1, global_batch=10, lanes=2, window=64, **sizes)
    for step in range(plan.steps):
        plan.step(step)
    parts = [weakref.ref(part) for part in (plan, *plan._lanes)]
    gc.collect()
    gc.disable()
    try:
        del plan
        assert [part() for part in parts] == [None] * len(parts)
    finally:
        gc.enable()
