"""What ranks do that meet with a fault: a link that is cut, a rank that is killed, a disk that is full.

``faults.py OUT HERE CASE OPTIONS`` under torchrun, as nodes.py; OPTIONS are JSON. Else crew.py runs the cases.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from infobatch_stream import ScoreStore
from infobatch_stream.distributed import Groups, Ranks
from infobatch_stream.store import bootstrap, layout, replicated
from infobatch_stream.store.run_lock import RunLock
from support.ddp import nodes
from support.ddp.cases import error_of
from support.ddp.data import loss_of
from support.ddp.launch import end_with_parent, note_error, process_group, wait_for
from support.ddp.nodes import digest_of, local, make, train_noting

CHUNK = 5  # scores exchanged at once

# ---- the moment of the fault


def here_and_now(out, rank, victim):
    """The moment has come: be killed, or wait until the test has cut the link."""
    if victim is not None:
        if rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return
    (out / f"ready-{rank}").touch()
    wait_for([out / "go"])


class Calls:
    """The ``number``-th call (from 1) of the functions ``names``, after `begin`, is the moment."""

    def __init__(self, names, number, act):
        self.begun, self.calls = True, 0
        for holder, name in names:
            setattr(holder, name, self._wrapped(getattr(holder, name), number, act))

    def _wrapped(self, original, number, act):
        def call(*arguments, **options):
            if self.begun:
                self.calls += 1
                if self.calls == number:
                    act()
            return original(*arguments, **options)

        return call


MERGE = [(Groups, "merge")]
COPY = [(Groups, "from_group")]
COLUMNS = [(dist, "new_group")]
ALL = [(Ranks, "gather"), *MERGE, *COPY, *COLUMNS]
MOMENTS = {"epoch 1": [], "merge": MERGE, "copy": COPY, "columns": COLUMNS, "any": ALL}


def broken(out, here, rank, name, moment, number=0, victim=None, gradients=False, epochs=3):
    """Train, and meet the fault at ``moment``: in "epoch 1", in the "merge" at its end, or (before the first) when
    the "columns" are made or a store is brought up by a "copy"; or at "any" exchange.

    number: of the exchange. victim: the rank that is killed; None waits for the test. gradients: the ranks also
    exchange something at each step, as with DDP. The state of epoch 1 after its first step goes to OUT/state.pt.
    """
    bootstrap.BLOCK = replicated.BLOCK = CHUNK
    act = lambda: here_and_now(out, rank, victim)  # noqa: E731
    calls = Calls(MOMENTS[moment], number, act)
    calls.begun = moment != "merge"
    loader = make(here, name, existing="continue", epochs=epochs)
    for epoch in range(loader.epoch, epochs):
        for _, picks in loader:
            loader.update(loss_of(picks.index, epoch), picks)
            if gradients:
                dist.all_reduce(torch.zeros(1))
            if (epoch, loader.step) == (1, 1) and moment != "any":
                state = loader.state_dict()
                if rank == 0:
                    torch.save(state, out / "state.pt")
                dist.barrier()
            if (epoch, loader.step, moment) == (1, 2, "epoch 1"):
                act()
            calls.begun = calls.begun or (epoch, loader.step) == (1, 2)
        loader.commit()
    return calls.calls


def finish(out, here, rank, names, states=None, epochs=3):
    """Go on with each of the stores ``names``, and each of the files ``states`` by name: see to_the_end."""
    found = {}
    for name in names:
        found[name] = to_the_end(make(here, name, existing="continue", epochs=epochs))
    for name, file in (states or {}).items():
        loader = make(here, f"loaded-{name}", existing="overwrite", epochs=epochs)
        loader.load_state_dict(torch.load(file, weights_only=True))
        found[name] = to_the_end(loader)
    return found


def to_the_end(loader):
    """(the epoch that it stood at, its files and its scores at the end)."""
    first = loader.epoch
    train_noting(loader)
    return first, digest_of(loader), torch.tensor(ScoreStore.open(loader._run.scores.path, mode="r").scores)


# ---- groups


def absent(out, here, rank):
    """A process that does not come to an exchange in its column: the error of the one that waits for it."""
    groups = Ranks().grouped([[0], [1]])
    found = None
    if rank == 0:
        found = error_of(lambda: groups.merge(np.zeros(3, np.float32)))
        (out / "given-up").touch()
    wait_for([out / "given-up"])
    os._exit(0) if rank else None
    torch.save(found, out / "0.pt")
    os._exit(0)


def exchanged(out, here, rank, name, torchrun=True):
    """A whole run in small blocks: its scores and files, and the sizes of this rank's exchanges.

    torchrun: whether the launcher tells how many nodes there are.
    """
    if not torchrun:
        os.environ["NODE_RANK"] = os.environ.pop("GROUP_RANK")
        del os.environ["GROUP_WORLD_SIZE"]
    with nodes.small_blocks(CHUNK) as sent:
        epochs = train_noting(make(here, name, batch_size=2, canonical_nodes=None))
    return [epoch["scores"] for epoch in epochs], [epoch["note"] for epoch in epochs], sent


MERGED_SIZES = (1, 31, 32, 33, 1000, 4097)
MERGED_SHARES = (0.0, 0.3, 1.0)


def losses_of(group, size, share):
    """What a group has seen: a ``share`` of losses of every size, at random; NaN elsewhere."""
    rng = np.random.default_rng([group, size])
    limits = np.finfo(np.float32)
    special = np.array([0, limits.max, -limits.max, limits.smallest_subnormal, -1.5], np.float32)
    losses = np.where(rng.random(size) < 0.2, rng.choice(special, size), rng.normal(size=size).astype(np.float32))
    losses[rng.random(size) >= share] = -np.float32(np.nan)  # of either sign: not seen
    return losses


def merged(out, here, rank, groups):
    """What a merge among the processes of these groups gives this rank, for each size and share."""
    merge = Ranks().grouped(groups).merge
    return [merge(losses_of(rank, size, share)) for size in MERGED_SIZES for share in MERGED_SHARES]


# ---- what must be refused


def on_machines(out, here, rank, folders, machines, file_systems):
    """Ranks that seem to be on these machines and file systems: an error, or nothing."""
    node = int(os.environ["GROUP_RANK"])
    bootstrap.kernel = lambda: machines[node]
    bootstrap.name_of_file_system = lambda path: file_systems[node]
    return error_of(lambda: iter(make(Path(folders[node]), "scores")))


def private_map(out, here, rank, name, stranger):
    """One rank maps a copy of its own."""
    if rank == stranger:
        shape = layout.map_array

        def copy(path, array, num_samples, mode):
            found = shape(path, array, num_samples, "r")
            return np.memmap(found.filename, "<f4", "c", 0, (num_samples,))

        layout.map_array = copy
    return error_of(lambda: iter(make(here, name)))


def one_store_by_two_paths(out, here, rank, locks=True):
    """The store of node 1 is that of node 0, mounted at another place (a link would be resolved)."""
    name = f"linked-{locks}"
    places = [out / f"linked-{locks}-{node}" for node in (0, 1)]
    if rank == 0:
        for place in places:
            place.mkdir()
        ScoreStore.create(places[0] / f"{name}.zarr", nodes.N, make(places[0], "any")._run.source.fingerprint)
        (places[1] / f"{name}.zarr").mkdir()
        subprocess.run(["mount", "--bind", places[0] / f"{name}.zarr", places[1] / f"{name}.zarr"], check=True)
    dist.barrier()
    if not locks:
        RunLock._lock = lambda *_, **__: True  # a file system without
    try:
        return error_of(lambda: iter(make(places[int(os.environ["GROUP_RANK"])], name)))
    finally:
        dist.barrier()
        if rank == 0:
            subprocess.run(["umount", "-l", places[1] / f"{name}.zarr"], check=True)


def opened(out, here, rank, name, samples=nodes.N, **options):
    """The error of opening, and what lies in the folder then."""
    error = error_of(lambda: iter(make(here, name, samples, **options)))
    dist.barrier()
    folder = local(here)
    return error, sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def continue_on_one(out, here, rank):
    """``existing=`` differs among the ranks."""
    train_noting(make(here, "differs", epochs=1))
    return error_of(lambda: iter(make(here, "differs", existing="continue" if rank == 0 else "error")))


def full_at_the_commit(out, here, rank, name):
    """The disk of node 1 is full when epoch 0 is committed; then there is room again, and the commit is repeated."""
    loader = make(here, name, epochs=2)
    for _, picks in loader:
        loader.update(loss_of(picks.index), picks)
    filler, leads = local(here) / "filler", (os.environ["GROUP_RANK"], os.environ["LOCAL_RANK"]) == ("1", "0")
    dist.barrier()
    if leads:
        fill(filler)
    dist.barrier()
    error, epoch = error_of(loader.commit), loader.epoch
    state = error_of(loader.state_dict)
    if leads:
        filler.unlink()
    dist.barrier()
    loader.commit()
    return error, state, epoch, digest_of(loader), to_the_end(loader)[2]


def fill(filler):
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass


CASES = {
    **nodes.CASES,
    "broken": broken,
    "finish": finish,
    "foreign": nodes.foreign,
    "absent": absent,
    "exchanged": exchanged,
    "merged": merged,
    "on_machines": on_machines,
    "private_map": private_map,
    "one_store_by_two_paths": one_store_by_two_paths,
    "opened": opened,
    "continue_on_one": continue_on_one,
    "full_at_the_commit": full_at_the_commit,
}

if __name__ == "__main__":
    end_with_parent()
    _, out, here, case, options = sys.argv
    options = json.loads(options)
    rank = os.environ["RANK"]
    try:
        with process_group(options.pop("timeout")) as (rank, _):
            CASES[case](Path(out), Path(here), rank, **options)
    except Exception as error:
        note_error(Path(out), rank, error)
        raise
