"""What the processes do to which test_disk_faults.py, test_signals.py and others do something; see `children.Child`.

victims.py STORE HOW: a rank under torchrun, the second of which goes in its second epoch.
"""

import gc
import itertools
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from infobatch_stream import InfoBatchLoader, ScoreStore, StoreError, _files
from infobatch_stream.store import header, layout, mapped_array, staging
from support.ddp.children import members
from support.ddp.data import loss_of
from support.killed import in_a_fork, killed_at

N = 40
_TRACED = {module.__file__ for module in (_files, header, layout, mapped_array, staging)}
FORKED = {"num_workers": 2, "multiprocessing_context": "fork"}


class Numbers:
    """Map-style: sample i is i. Costs nothing."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return index

    def __getitems__(self, indices):
        return indices


def loader_of(path, size=N, **options):
    return InfoBatchLoader(Numbers(size), path, **{"batch_size": 8, "epochs": 5, "collate_fn": torch.tensor, **options})


def train(loader, steps=None):
    """One epoch, or so many steps of it."""
    for _, picks in loader:
        loader.update(loss_of(picks.index, loader.epoch), picks)
        if loader.step == steps:
            break


def race(link, path, rounds, options):
    """Begin to train when told, on another store in each round; tell of the error, and leave when told."""
    for number in range(rounds):
        loader = loader_of(path.with_name(f"{path.name}-{number}"), **options) if not options.get("existing") else None
        link.send("ready" if number == 0 else "left")
        link.recv()
        said = ""
        try:
            loader = loader or loader_of(path.with_name(f"{path.name}-{number}"), **options)
            iter(loader)
        except StoreError as error:
            said = str(error)
        link.send(said)
        link.recv()
        del loader
        gc.collect()
    link.send("left")


def losses(epoch, index=N):
    """float32[k]: what `train` records of the samples ``index`` (or so many) in ``epoch``."""
    return loss_of(torch.arange(index) if isinstance(index, int) else torch.tensor(index), epoch).numpy()


def finish(loader):
    for _ in range(loader.epoch, loader.epochs):
        train(loader)
    loader.commit()


def error_of(action):
    """(type, text, notes) of what ``action`` raises, or None."""
    try:
        action()
    except Exception as error:
        return type(error).__name__, str(error), getattr(error, "__notes__", [])
    return None


# ---- one process


def hold(link, path, options):
    """Train two steps, say which processes take part, and be there until told."""
    loader = loader_of(path, **options)
    batches = iter(loader)
    for _, picks in batches:
        loader.update(loss_of(picks.index), picks)
        if loader.step == 2:
            break
    link.send(members(os.getpid()))
    link.recv()


def hold_with_a_child(link, path, how):
    """As `hold`; another process, which the user's script began, lives longer. Its number is told."""
    loader = loader_of(path)
    train(loader, 2)
    if how == "fork":
        other = os.fork()
        if other == 0:
            signal.pause()
    else:
        other = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]).pid
    link.send(other)
    link.recv()


def fork_and_use(link, path):
    """A forked process makes a loader for the store of its parent."""
    loader = loader_of(path)
    train(loader, 2)
    child = os.fork()
    if child == 0:
        link.send(error_of(lambda: iter(loader_of(path, existing="continue"))))
        os._exit(0)
    os.waitpid(child, 0)


def go_on(link, path, options):
    """Continue to the end; -> (epoch at which it began, losses that were there)."""
    found = int(np.isfinite(ScoreStore.open(path, "r").pending).sum())
    with loader_of(path, existing="continue", **options) as loader:
        began = loader.epoch
        finish(loader)
    return began, found


def long_epoch(link, path, size, within, options):
    """An epoch of which each step is told, before and after its update."""
    loader = loader_of(path, size, **options)

    def epoch():
        for _, picks in loader:
            link.send(("begin", picks.index.tolist()))
            loader.update(loss_of(picks.index), picks)
            link.send(("done", members(os.getpid()) if loader.step == 1 else None))

    if within == "plain":
        epoch()
        return
    if within == "handler":  # as of a script that puts things in order before it goes

        def leave(*_):
            raise SystemExit(3)

        signal.signal(signal.SIGTERM, leave)
    with loader:
        epoch()


def many_commits(link, path, size, epochs):
    """Epochs one after the other, while others look."""
    loader = loader_of(path, size, epochs=epochs, batch_size=size // 2, delta=0)
    iter(loader)
    link.send("ready")
    finish(loader)
    return loader.epoch


def lose_a_worker(link, path, options, where):
    """A worker is killed in an epoch; -> (error, epochs and steps then, epochs of the same loader afterwards)."""
    loader = loader_of(path, 4000, **FORKED, **options)

    def epoch():
        with loader:
            for _, picks in loader:
                loader.update(loss_of(picks.index), picks)
                if loader.step == 3:
                    worker = next(pid for pid in members(os.getpid()) if pid != os.getpid())
                    os.kill(worker, signal.SIGKILL)
                    if where == "user code":  # torch raises it from a signal, wherever we are
                        deadline = time.monotonic() + 30
                        while time.monotonic() < deadline:
                            time.sleep(0.01)

    error = error_of(epoch)
    then = loader.epoch, loader.step, ScoreStore.open(path, "r").epoch
    loader.epochs = 2
    loader.commit()
    finish(loader)
    return error, then, loader.epoch


# ---- a disk that fills up, a store that is damaged


def meet_a_full_disk(link, path, checkpoint):
    """In the middle of an epoch the disk fills up; -> what commit and iter raise, and the epoch then."""
    loader = loader_of(path)
    for _, picks in loader:
        loader.update(loss_of(picks.index), picks)
        if loader.step == 2:
            link.send("ready")
            link.recv()
    errors = [error_of(loader.commit), error_of(loader.__iter__)]
    torch.save(loader.state_dict(), checkpoint)  # it needs no room on the disk of the store
    return errors, loader.epoch


def meet_damage(link, path, size):
    """In the middle of a pruned epoch the store is damaged; -> what each call raises, and the scores of the run that
    a checkpoint mended.
    """
    loader = loader_of(path, size, batch_size=size // 8)
    train(loader)
    batches = iter(loader)
    for _ in range(2):
        _, picks = next(batches)
        loader.update(loss_of(picks.index, loader.epoch), picks)
    state = loader.state_dict()
    _, picks = next(batches)
    link.send("ready")
    link.recv()
    calls = {
        "len": lambda: len(loader),
        "stats": lambda: loader.stats,
        "progress": lambda: loader.progress,
        "update": lambda: loader.update(loss_of(picks.index, loader.epoch), picks),
        "next": lambda: next(batches),
        "peek": loader.peek,
        "state_dict": loader.state_dict,
        "commit": loader.commit,
        "with": lambda: loader.__exit__(None, None, None),
        "with an error": lambda: loader.__exit__(KeyError, KeyError("mine"), None),
        "iter": lambda: iter(loader),
    }
    found = {name: error_of(call) for name, call in calls.items()}
    loader.load_state_dict(state)
    finish(loader)
    return found, np.array(loader.store.scores)


# ---- a process that is killed while it makes a store


def die_making(link, path, replace, every):
    """A store is made in processes of which each dies one line later; -> what each left, and whether it can go on.

    Left at the path: nothing, ["old"] or ["new"]. every: of how many lines one is tried.
    """
    found = []  # Zarr's thread is not there after a fork, so each use of it gets a process that has not used it before
    for line in itertools.count(0, every):
        folder = path / str(line)
        folder.mkdir()
        make = partial(ScoreStore.create, folder / "scores.zarr", N)
        if replace:
            in_a_fork(partial(make, "old"))
        status = in_a_fork(partial(killed_at, line, partial(make, "new", replace=replace), _TRACED))
        left = [ScoreStore.open(store, "r").fingerprint for store in folder.glob("scores.zarr")]
        hidden = [file.name for file in folder.glob(".*")]
        mended = in_a_fork(partial(make, "last", replace=bool(left)))
        stays = [file.name for file in (*folder.iterdir(), *folder.glob("scores.zarr/.*"))]
        found.append((left, hidden, mended, stays, ScoreStore.open(folder / "scores.zarr", "r").fingerprint))
        if status == 0:
            return found


# ---- several processes, without an agent that looks after them


def join(link, rank, seconds):
    """Make the process group of two plain processes, with nobody to end one when the other is gone."""
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), WORLD_SIZE="2", GLOO_SOCKET_IFNAME="lo")
    wait = timedelta(seconds=30)
    port = 0 if rank == 0 else link.recv()  # the first finds a free one, so no two tests can want the same
    store = dist.TCPStore("127.0.0.1", port, 2, rank == 0, wait, wait_for_workers=False)
    if rank == 0:
        link.send(store.port)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=seconds))


def go(rank, how, link=None):
    """What befalls the second rank."""
    if rank != 1:
        return
    if how == "raises":
        raise KeyError("mine")
    if how == "exits":
        raise SystemExit(0)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stuck":
        link.send("stuck")
        link.recv()


def faulty_rank(link, path, rank, how, seconds):
    """Rank 1 goes in its second epoch; -> of the rank that is left, its error and the seconds that it took."""
    join(link, rank, seconds)
    loader = loader_of(path, batch_size=4)

    def epochs():
        with loader:
            train(loader)
            for _, picks in loader:
                loader.update(loss_of(picks.index, loader.epoch), picks)
                if loader.step == 2:
                    go(rank, how, link)

    begin = time.monotonic()
    error = error_of(epochs)
    return error, time.monotonic() - begin


def hold_by_two(link, path, rank):
    """As `hold`, by two ranks."""
    join(link, rank, 60)
    loader = loader_of(path, batch_size=4)
    train(loader, 2)
    link.send("holds")
    link.recv()


def two_loaders(link, path, rank, existing):
    """A second loader of the same run, while rank 1 still has the first; -> its epochs, and what the first says."""
    join(link, rank, 30)
    first = loader_of(path, batch_size=4)
    train(first)
    train(first, 1)
    cycle = [first]
    cycle.append(cycle)
    if rank == 0:
        cycle.clear()
    del first
    loader = loader_of(path, batch_size=4, existing=existing)
    began = None if loader.store is None else loader.epoch
    finish(loader)
    old = error_of(cycle[0].peek) if rank else None  # which talks to nobody
    dist.barrier()  # the group outlives both
    return began, loader.epoch, old


# ---- under torchrun


def main(path, how):
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    with loader_of(path, batch_size=4) as loader:
        train(loader)
        for _, picks in loader:
            loader.update(loss_of(picks.index, loader.epoch), picks)
            if loader.step == 2:
                go(dist.get_rank(), how)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
