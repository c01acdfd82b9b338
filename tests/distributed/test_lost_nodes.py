"""Nodes that lose each other: the link is cut in several ways, a node stands still, ranks are killed.

All ways, and a rank killed at every exchange, in 10 minutes::

    pytest -m "slow or not slow" tests/distributed/test_lost_nodes.py
"""

import json
import os
import shutil
import signal
import time
from contextlib import ExitStack

import pytest
import torch
from support.ddp.cases import train
from support.ddp.launch import Run, Torchrun, wait_for
from support.ddp.network import network_is_possible, nodes_of
from support.ddp.nodes import make

from infobatch_stream import ScoreStore

pytestmark = pytest.mark.ddp
TIMEOUT = 10  # of the process groups
MARGIN = 15  # for a machine that is busy
EPOCHS = 3

# By name: what the ranks do, and those that wait for the cut.
ALL = (0, 1, 2, 3)
BREAKS = {
    "torchrun": ({"moment": "epoch 1"}, ALL),
    "epoch": ({"moment": "epoch 1"}, ALL),
    "gradients": ({"moment": "epoch 1", "gradients": True}, ALL),
    "merge": ({"moment": "merge", "number": 1}, ALL),
    "merge-begun": ({"moment": "merge", "number": 3}, ALL),
    "copy": ({"moment": "copy", "number": 2}, (0, 2)),
}
# How the nodes lose each other: where, and in which of the breaks.
WAYS = {
    "silent": ("namespaces", ["torchrun", "gradients", "merge-begun", "copy"]),  # what is sent is lost: nobody is told
    "stopped": ("loopback", ["epoch"]),  # one node stands still
    "down": ("namespaces", list(BREAKS)),  # the link is
    "killed": ("loopback", list(BREAKS)[1:]),  # all ranks of a node are
}
SLOW = ("down", "killed")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """By epoch the scores of a run that nothing happened to."""
    epochs = train(make(tmp_path_factory.mktemp("alone"), "alone", epochs=EPOCHS))
    return [torch.full_like(epochs[0]["scores"], torch.nan), *(epoch["scores"] for epoch in epochs)]


class Broken:
    """Runs on two nodes that lose each other in one way, and what comes of them.

    Attributes: ends: by break, how each rank ended. stores: by break and node, a store as it was left. left: by node,
    what else was. found: by break, what each rank found that went on.
    """

    def __init__(self, stack, way, out):
        self._way, self._out = way, out
        kind, self._breaks = WAYS[way]
        self._nodes, self._network = stack.enter_context(nodes_of(kind, out))
        self._folders = self._network.folders if self._network else [out / "node0", out / "node1"]

    def start(self):
        self._runs = {name: self._begin(name) for name in self._breaks if name == "torchrun"}
        self._nodes.make_ready()

    def train(self):
        if "copy" in self._breaks:  # node 1 has no store when that run begins, so it gets the scores of node 0
            self._nodes.run("broken", self._out / "before", name="copy", moment="epoch 1", victim=-1, epochs=2)
            shutil.rmtree(self._folders[1] / "copy.zarr")
        self._runs |= {name: self._begin(name) for name in self._breaks if name != "torchrun"}

    def _begin(self, name):
        out, options = self._out / name, {"name": name, "timeout": TIMEOUT, **BREAKS[name][0]}
        if name == "torchrun":
            return Torchrun(self._nodes, "faults.py", out, "broken", json.dumps(options))
        return self._nodes.begin("broken", out, to_the_end=name == "epoch", **options)

    def cut(self):
        for name, run in self._runs.items():
            wait_for([run.out / f"ready-{rank}" for rank in BREAKS[name][1]])
        if self._network:
            self._network.cut("silent" if self._way == "silent" else "down")
        else:
            self._signal(signal.SIGKILL if self._way == "killed" else signal.SIGSTOP)
        self.begin = time.monotonic()
        for run in self._runs.values():
            (run.out / "go").touch()

    def _signal(self, number):
        for run in self._runs.values():
            for rank in (2, 3):
                os.kill(run.pid(rank), number)

    def mend(self):
        if self._way == "stopped":
            for run in self._runs.values():
                wait_for([run.out / f"end-{rank}.json" for rank in (0, 1)])
            self._signal(signal.SIGCONT)
        self.ends = {name: run.wait() for name, run in self._runs.items()}
        self.stores = {}
        for name in self._breaks:
            for node, folder in enumerate(self._folders):
                if (folder / f"{name}.zarr").exists():
                    shutil.copytree(folder / f"{name}.zarr", self._out / f"{name}-{node}.zarr")
                    self.stores[name, node] = ScoreStore.open(self._out / f"{name}-{node}.zarr")
        self.left = [sorted(path.name for path in folder.glob(".*")) for folder in self._folders]
        if self._network:
            self._network.restore()

    def go_on(self):
        states = {f"{name} state": str(self._out / name / "state.pt") for name in self._breaks if name != "copy"}
        found = self._nodes.run("finish", self._out / "finish", names=self._breaks, states=states)
        self.found = {name: [rank[name] for rank in found] for name in found[0]}


@pytest.fixture(scope="module")
def all_broken(request, tmp_path_factory):
    """By way. All at once, since each waits for its timeout."""
    mine = (item for item in request.session.items if item.path == request.path)  # other files have ways of their own
    wanted = {item.callspec.params["way"] for item in mine if "way" in item.fixturenames}
    with ExitStack() as stack:
        found = {}
        for way in WAYS:
            if way in wanted and (WAYS[way][0] == "loopback" or network_is_possible()):
                found[way] = Broken(stack, way, tmp_path_factory.mktemp(way))
        for step in (Broken.start, Broken.train, Broken.cut, Broken.mend, Broken.go_on):
            for one in found.values():
                step(one)
        yield found


@pytest.fixture
def broken(all_broken, way):
    if way not in all_broken:
        pytest.skip("network namespaces cannot be made here")
    return all_broken[way]


CASES = [
    pytest.param(way, name, marks=[pytest.mark.slow] if way in SLOW else [])
    for way, (_, names) in WAYS.items()
    for name in names
]


@pytest.mark.parametrize(("way", "name"), CASES)
def test_every_process_ends_with_an_error_within_the_timeout(broken, way, name):
    for rank, end in enumerate(broken.ends[name]):
        if way == "killed" and rank in (2, 3):
            assert end["code"] == -signal.SIGKILL
            continue
        assert end["code"] == 1
        kind, text, at = end["error"]
        # Those of a node that stood still begin to wait when it goes on.
        assert at - broken.begin < TIMEOUT * (2 if way == "stopped" else 1) + MARGIN
        if name == "gradients":  # torch's own, as DDP raises it
            assert kind in ("RuntimeError", "DistBackendError")
        else:
            assert kind == "LostRanksError"
            assert "start the run again" in text


@pytest.mark.parametrize(("way", "name"), CASES)
def test_no_store_is_damaged(broken, way, name, alone):
    epoch = 2 if name == "copy" else 1
    assert [node for node in (0, 1) if (name, node) in broken.stores] == ([0] if name == "copy" else [0, 1])
    for node in (0, 1):
        if (name, node) in broken.stores:
            store = broken.stores[name, node]
            assert store.epoch == epoch
            assert torch.equal(torch.tensor(store.scores), alone[epoch])
    if way != "killed":  # the next opening removes what those leave
        assert broken.left == [[], []]


@pytest.mark.parametrize(("way", "name"), CASES)
def test_the_run_goes_on_to_the_scores_of_one_that_was_not_broken(broken, way, name, alone):
    for case in (name, f"{name} state"):
        if case == "copy state":  # of no step there is one
            continue
        files = {str(digest) for _, digest, _ in broken.found[case]}
        assert len(files) == 1
        for first, (_, stale), scores in broken.found[case]:
            assert first == (2 if name == "copy" else 1)
            assert not stale
            assert torch.equal(scores, alone[EPOCHS])


# ---- a rank is killed


@pytest.mark.parametrize(
    ("victim", "every"), [(1, 12), *(pytest.param(rank, 1, marks=pytest.mark.slow) for rank in (0, 1, 3))]
)
def test_a_rank_may_be_killed_before_any_exchange(tmp_path, alone, victim, every):
    with nodes_of("loopback", tmp_path) as (nodes, _):
        counted = nodes.run("broken", tmp_path / "all", name="all", moment="any", epochs=2)[victim]
        runs, numbers = {}, list(range(every, counted + 1, every))
        assert numbers
        for number in numbers:
            name, out = f"killed-{number}", tmp_path / f"run-{number}"
            runs[name] = nodes.begin(
                "broken", out, name=name, moment="any", number=number, victim=victim, epochs=2, timeout=30
            )
            if number % 3 == 0 or number == numbers[-1]:
                check_killed(runs, victim)
                check_left(runs, tmp_path, alone)
                for rank in nodes.run("finish", tmp_path / f"then-{number}", names=list(runs)):
                    for name in runs:
                        _, (_, stale), scores = rank[name]
                        assert not stale
                        assert torch.equal(scores, alone[EPOCHS])
                runs = {}


def check_killed(runs: dict[str, Run], victim):
    for name, run in runs.items():
        ends = run.wait()
        assert ends[victim]["code"] == -signal.SIGKILL, (name, ends)
        for end in ends[:victim] + ends[victim + 1 :]:
            if end["code"]:  # else it needed nobody any more
                assert (end["code"], end["error"][0]) == (1, "LostRanksError"), (name, end)
                assert end["error"][2] - ends[victim]["time"] < MARGIN, name


def check_left(runs, folder, alone):
    for name in runs:
        for node in (0, 1):
            path = folder / f"node{node}" / f"{name}.zarr"
            if path.exists():
                store = ScoreStore.open(shutil.copytree(path, folder / f"{name}-{node}"))
                assert torch.equal(torch.tensor(store.scores).nan_to_num(-1), alone[store.epoch].nan_to_num(-1)), name
