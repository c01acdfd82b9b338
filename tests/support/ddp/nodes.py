"""What the ranks of test_nodes.py do while nothing fails: ``nodes.py OUT HERE CASE...``.

OUT is seen by all nodes, and gets <rank>.pt with what each case found; HERE is a folder that is local to each node.
"""

import hashlib
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from infobatch_stream import BudgetPruning, InfoBatchLoader, ScoreStore
from infobatch_stream._platform import fill_in_node
from infobatch_stream.distributed import Groups
from infobatch_stream.store import bootstrap, replicated, score_store
from support.ddp.cases import FORK, RUN, error_of, train
from support.ddp.data import Noisy, loss_of, wds
from support.ddp.launch import end_with_parent, process_group

N = 44
EPOCHS = 3
RUN_LOCK = "pending/owner.json"


def local(here):
    return Path(fill_in_node(str(here)))


def make(here, name, size=N, data=None, **options):
    world = int(os.environ.get("WORLD_SIZE", "1"))
    options = {**RUN, "batch_size": 8 // world, "epochs": EPOCHS, "canonical_nodes": 2, **options}
    return InfoBatchLoader(Noisy(size) if data is None else data, Path(here, f"{name}.zarr"), **options)


def digest(path):
    """By file of a store, what is in it; without the process that has it, and its history, which may be of its own."""
    files = (file for file in sorted(path.rglob("*")) if file.is_file())
    found = {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    return {name: digest for name, digest in found.items() if name != RUN_LOCK and not name.startswith("history/")}


def digest_of(loader):
    """While no rank writes. What else lies beside the store, too."""
    if dist.is_initialized():
        dist.barrier()
    found = (
        digest(loader._run.scores.path),
        sorted(path.name for path in loader._run.scores.path.parent.glob(f".{loader._run.scores.path.name}*")),
    )
    if dist.is_initialized():
        dist.barrier()
    return found


def train_noting(loader):
    """As `train`, with the files of the store after every commit."""
    return train(loader, note=digest_of)


@contextmanager
def small_blocks(size):
    """Exchange ``size`` scores at once; gives the number of entries of each exchange of this rank."""
    sent, merge = [], Groups.merge

    def note(groups, values):
        sent.append(len(values))
        return merge(groups, values)

    bootstrap.BLOCK = replicated.BLOCK = size
    Groups.merge = note
    try:
        yield sent
    finally:
        bootstrap.BLOCK = replicated.BLOCK = 1 << 22
        Groups.merge = merge


# ---- whole runs


def map_style(out, here, rank):
    """Without canonical_nodes: how many nodes there are is found out."""
    return train_noting(make(here, "map", canonical_nodes=None))


def by_wds(out, here, rank):
    return train_noting(make(here, "wds", data=wds(out / "wds")))


def wds_workers(out, here, rank):
    return train_noting(make(here, "wds-workers", data=wds(out / "wds"), **FORK))


def sizes(out, here, rank):
    """Numbers of samples that the ranks cannot share evenly, or that are fewer than they: steps, files, entries."""
    found = {}
    for size in (1, 3, 45):
        with small_blocks(5) as sent:
            epochs = train_noting(make(here, f"size-{size}", size))
        found[size] = ([epoch["scores"] for epoch in epochs], [epoch["note"] for epoch in epochs], sent)
    return found


# ---- states


def state_in_the_middle(out, here, rank):
    """Save after step 2 of epoch 1, train on to the end; then do so again from what was saved."""
    loader, steps, digests = make(here, "state"), [], []
    for epoch in range(EPOCHS):
        for _, picks in loader:
            loader.update(loss_of(picks.index, epoch), picks)
            steps.append((epoch, loader.step, picks.index.tolist(), picks.weight.tolist()))
            if (epoch, loader.step) == (1, 2):
                state = loader.state_dict()
                digests.append(digest_of(loader))
    loader.commit()
    digests.append(digest_of(loader))
    if rank == 0:
        torch.save(state, out / "state.pt")
    return {
        "steps": steps,
        "pending": state["pending"] if rank == 0 else None,
        "again": go_on(make(here, "state-new"), state),
        "elsewhere": go_on(make(here, "state", existing="overwrite"), state),
        "digests": digests,
    }


def go_on(loader, state):
    """From ``state`` to the end: the steps, and the files after loading and at the end."""
    loader.load_state_dict(state)
    loaded, steps = digest_of(loader), []
    for epoch in range(loader.epoch, loader.epochs):
        for _, picks in loader:
            loader.update(loss_of(picks.index, epoch), picks)
            steps.append((epoch, loader.step, picks.index.tolist(), picks.weight.tolist()))
    loader.commit()
    return steps, loaded, digest_of(loader)


# ---- stores that are not equally far


# What the two nodes have at the start: the epoch, with the state of a commit that was broken off; None is nothing.
STARTS = {
    "missing": (None, 2),
    "missing on the first": (2, None),
    "behind": (1, 2),
    "far behind on the first": (0, 2),
    "empty beside nothing": (None, 0),
    "half applied": ("1 apply", 1),
    "half applied ahead of": ("1 apply", 2),
    "applied": (1, "2 reset"),
    "torn losses": ("1 losses", "1 losses"),
}


@contextmanager
def snapshots(here, name):
    """Keep a copy of the store for each of its states during commits, as a kill there would leave it."""
    write, folder = score_store.write_header, local(here) / "snapshots"

    def keep(path, header):
        write(path, header)
        state = "" if header.state == "ready" else f" {header.state}"
        shutil.copytree(path, folder / f"{header.epoch}{state}", dirs_exist_ok=True)

    score_store.write_header = keep
    try:
        yield folder
    finally:
        score_store.write_header = write


def starts(out, here, rank):
    """For each of STARTS: the loader's epoch when it was made, the files then, and those after each epoch."""
    node = int(os.environ["GROUP_RANK"])
    leads = os.environ["LOCAL_RANK"] == "0"
    loader, found = make(here, "before"), {}
    with snapshots(here, "before") as folder:
        iter(loader)
        if leads:
            shutil.copytree(loader._run.scores.path, folder / "0")
        for epoch in range(2):
            for _, picks in loader:
                loader.update(loss_of(picks.index, epoch), picks)
                if (epoch, loader.step, leads) == (1, 2, True):
                    shutil.copytree(loader._run.scores.path, folder / "1 losses")
            loader.commit()
    found["whole"] = [epoch["note"] for epoch in train_noting(loader)]
    for name, there in STARTS.items():
        path = local(here) / f"{name}.zarr"
        if leads and there[node] is not None:
            shutil.copytree(folder / str(there[node]), path)
        dist.barrier()
        with small_blocks(7):
            loader = make(here, name, existing="continue")
            first = loader.epoch, digest_of(loader)
            found[name] = (*first, [epoch["note"] for epoch in train_noting(loader)])
    return found


def refused(out, here, rank):
    """What must stop the run on all ranks: the errors, and whether the store of this node is as it was."""
    found = {}
    for name, prepare, options in (
        ("epochs", lambda path, mine: ScoreStore.create(path, N, mine, epoch=2), {}),
        ("no store", lambda path, mine: (path.mkdir(), Path(path, "thesis.txt").touch()), {"existing": "overwrite"}),
    ):
        found[name] = attempt(here, name, prepare, **options)
    return found


def attempt(here, name, prepare, **options):
    """(the error of a loader with a store that ``prepare`` made on node 1, whether that was left as it was)."""
    path = local(here) / f"{name}.zarr"
    if (os.environ["GROUP_RANK"], os.environ["LOCAL_RANK"]) == ("1", "0"):
        path.parent.mkdir(exist_ok=True)
        prepare(path, make(path.parent, "any")._run.source.fingerprint)
    dist.barrier()
    before = digest(path)
    dist.barrier()
    error = error_of(lambda: iter(make(here, name, **options)))
    return error, digest(path) == before


def foreign(out, here, rank, existing="error"):
    """Node 1 has the scores of another dataset."""
    prepare = lambda path, mine: ScoreStore.create(path, N + 1, mine)  # noqa: E731
    return attempt(here, f"foreign-{existing}", prepare, existing=existing)


# ---- stores that begin with scores

SCORES = loss_of(torch.arange(N)).numpy()
SCORES[::7] = np.nan
BEGINS = {"policy": BudgetPruning(0.3), "delta": 1.0}
# What the stores of the two nodes begin with: none is nothing, and 0 a store without scores.
SEEDS = {"one": (None, 1), "the first": (1, 0), "equal": (1, 1), "different": (1, 2)}


def seeded(out, here, rank):
    """For each of SEEDS the error, or what was trained; of one the rest too, from its first epoch on other stores."""
    node, leads, found = int(os.environ["GROUP_RANK"]), os.environ["LOCAL_RANK"] == "0", {}
    for name, there in SEEDS.items():
        path = local(here) / f"seeds-{name}.zarr"
        if leads and (factor := there[node]) is not None:
            mine = make(here, "any")._run.source.fingerprint
            ScoreStore.seed(path, SCORES * factor, mine, source="a model") if factor else ScoreStore.create(
                path, N, mine
            )
        dist.barrier()
        before = digest(path)
        dist.barrier()
        loader = make(here, path.stem, **BEGINS)
        if name == "different":
            found[name] = error_of(lambda loader=loader: iter(loader)), digest(path) == before
            continue
        for _, picks in loader:
            loader.update(loss_of(picks.index, 0), picks)
            if loader.step == 1:
                break
        state = loader.state_dict()
        found[name] = go_on(make(here, f"seeds-{name}-new", **BEGINS), state), loader.store.seeded
    if rank == 0:
        torch.save(state, out / "seeded.pt")
    return found


CASES = {
    "map": map_style,
    "wds": by_wds,
    "wds workers": wds_workers,
    "sizes": sizes,
    "state": state_in_the_middle,
    "starts": starts,
    "refused": refused,
    "seeded": seeded,
}

if __name__ == "__main__":
    end_with_parent()
    _, out, here, *names = sys.argv
    with process_group() as (rank, _):
        found = {}
        for name in names:
            found[name] = CASES[name](Path(out), Path(here), rank)
            dist.barrier()
        torch.save(found, Path(out, f"{rank}.pt"))
