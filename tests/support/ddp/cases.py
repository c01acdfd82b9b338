"""What the ranks of test_ddp.py do: ``cases.py OUT CASE...``; what each case found goes to OUT/<rank>.pt."""

import shutil
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from infobatch_stream import InfoBatchLoader, ScoreStore
from support.ddp.data import Noisy, loss_of, wds
from support.ddp.launch import process_group

N = 44


def plain(out, name, **options):
    return InfoBatchLoader(Noisy(N), Path(out, f"{name}.zarr"), **{"batch_size": 4, "epochs": 4, **options})


def step(loader, picks):
    loader.update(loss_of(picks.index, loader.epoch), picks)


def train(loader, epochs=None, note=lambda loader: None):
    """To the end: for every epoch its steps (index, weight, recorded, noise), stats and scores after its commit.

    note: what else to tell of the loader then.
    """
    found = []
    for epoch in range(loader.epoch, epochs or loader.epochs):
        steps = []
        for (_, noise), picks in loader:
            step(loader, picks)
            steps.append((picks.index, picks.weight, picks._record, noise))
        stats = loader.stats
        loader.commit()
        scores = torch.tensor(ScoreStore.open(loader._run.scores.path, mode="r").scores)
        facts = {"stats": stats, "scores": scores, "len": len(loader), "note": note(loader)}
        found.append({"epoch": epoch, "steps": steps, **facts})
    return found


def error_of(action):
    """(type, text) of what ``action`` raises, with the seconds it took."""
    begin = time.monotonic()
    try:
        action()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - begin
    return "nothing", "", 0


# ---- whole runs


def runs(dataset_of, modes):
    def case(out, rank):
        found = {}
        for name, options in modes.items():
            loader = InfoBatchLoader(dataset_of(out, name), Path(out, f"{name}.zarr"), **RUN, **options)
            found[name] = train(loader)
        return found

    return case


RUN = {"batch_size": 4, "epochs": 3, "delta": 1, "shuffle_window": 16}
FORK = {"num_workers": 2, "multiprocessing_context": "fork"}
SPAWN = {"num_workers": 1, "multiprocessing_context": "spawn"}
PERSISTENT = {"persistent_workers": True}
WDS_MODES = {
    "wds": {},
    "wds fork": FORK,
    "wds fork persistent": {**FORK, **PERSISTENT},
    "wds spawn": SPAWN,
}
MDS_MODES = {
    "mds": {},
    "mds fork": FORK,
    "mds fork persistent": {**FORK, **PERSISTENT},
    "mds spawn persistent": {**SPAWN, **PERSISTENT},
}
whole_wds = runs(lambda out, name: wds(Path(out, "wds")), WDS_MODES)


def mds(out, name, remote="mds"):
    from support.ddp.mds import Augmented

    return Augmented(remote=str(Path(out, remote)), local=str(Path(out, f"local {name}")), download_retry=1)


whole_mds = runs(mds, MDS_MODES)


def failed_download(out, rank):
    """A shard that the remote has lost: every rank hears of it, and soon."""
    loader = InfoBatchLoader(mds(out, "lost", "lost"), Path(out, "lost.zarr"), batch_size=8, epochs=1)
    dist.barrier()
    return error_of(lambda: train(loader))


# ---- the rules of epochs


def peek_on_one(out, rank):
    loader, untouched = plain(out, "peek"), plain(out, "no-peek")
    if rank == 1:
        loader.peek()
    found = []
    for one in (loader, untouched):
        steps = []
        for epoch in range(2):
            for _, picks in one:
                step(one, picks)
                if rank == 1 and one is loader:
                    one.peek()
                steps.append((epoch, picks.index.tolist()))
        found.append(steps)
    return found


def break_on_both(out, rank):
    loader = plain(out, "break")
    for _, picks in loader:
        step(loader, picks)
        if loader.step == 2:
            break
    iter(loader)
    return loader.epoch, loader.step, int(torch.isfinite(torch.tensor(loader.store.scores)).sum())


def break_earlier(out, rank):
    loader = plain(out, "earlier")
    for _, picks in loader:
        step(loader, picks)
        if loader.step == 3 - rank:
            break
    return error_of(lambda: iter(loader)), loader.epoch, ScoreStore.open(loader._run.scores.path).epoch


def forgotten_update(out, rank):
    loader = plain(out, "forgotten")
    for _, picks in loader:
        if rank == 0:
            step(loader, picks)
    return error_of(lambda: iter(loader)), loader.epoch, ScoreStore.open(loader._run.scores.path).epoch


def another_call(out, rank):
    loader = plain(out, "call")
    iter(loader)
    found = error_of(lambda: loader.commit() if rank else loader.state_dict())
    return found, len(train(loader, 1)[0]["steps"])  # and goes on


def state_on_one(out, rank):
    """``if rank == 0: loader.load_state_dict(...)``, as is often written."""
    state = plain(out, "state").state_dict()
    loader = plain(out, "state-one")
    return error_of(lambda: loader.load_state_dict(state) if rank == 0 else iter(loader))


def state_on_the_other(out, rank):
    state = plain(out, "state2").state_dict()
    loader = plain(out, "state-other")
    return error_of(lambda: loader.load_state_dict(state) if rank == 1 else iter(loader))


def different_states(out, rank):
    loader = plain(out, "states")
    iter(loader)
    first = loader.state_dict()
    train(loader, 1)
    second = loader.state_dict()
    if rank:
        second.pop("scores", None)
    fresh = plain(out, "states-fresh")
    return error_of(lambda: fresh.load_state_dict(second if rank == 0 else first))


def state_without_scores(out, rank):
    state = plain(out, "scoreless").state_dict()
    has = "scores" in state
    state.pop("scores", None)
    fresh = plain(out, "scoreless-fresh")
    return has, error_of(lambda: fresh.load_state_dict(state)), fresh._run.scores.path.exists()


def different(**options):
    def case(out, rank):
        name = next(iter(options))
        loader = plain(out, f"different-{name}", **{name: options[name][rank]})
        found = error_of(lambda: iter(loader))
        return found, loader._run.scores.path.exists()

    return case


def different_curricula(out, rank):
    """The same samples in the first epoch, and others on each rank in the next; then the same again."""
    loader = plain(out, "curricula", include=range(8))
    train(loader, 1)
    loader.include = [rank]
    found = error_of(lambda: iter(loader))
    loader.include = [3]
    train(loader, 2)
    return found, loader.epoch


def different_datasets(out, rank):
    loader = InfoBatchLoader(Noisy(N + rank), Path(out, "datasets.zarr"), batch_size=4, epochs=2)
    return error_of(lambda: iter(loader)), loader._run.scores.path.exists()


def different_stores(out, rank):
    """Each rank has a store of its own, as ranks of different machines have."""
    return train(plain(out, "own-{node}" if rank else "own", batch_size=4))


def existing_store(out, rank):
    train(plain(out, "existing"), 1)
    return error_of(lambda: iter(plain(out, "existing")))


def failing_commit(out, rank):
    loader = plain(out, "failing")
    for _, picks in loader:
        step(loader, picks)
    dist.barrier()
    if rank == 1:
        shutil.rmtree(loader._run.scores.path)
    dist.barrier()
    return error_of(loader.commit), loader.epoch


def error_in_the_block(out, rank):
    loader = plain(out, "block")

    def block():
        with loader:
            for _, picks in loader:
                step(loader, picks)
            raise KeyError("mine")

    found = error_of(block)  # on every rank; leaving the block communicates nothing
    dist.barrier()
    return found, int(torch.isfinite(torch.tensor(ScoreStore.open(loader._run.scores.path).pending)).sum())


def epochs_on_one(out, rank):
    """``if rank == 0: loader.epochs = 100``, in the middle of a run."""
    loader = plain(out, "raised")
    train(loader, 1)
    if rank == 0:
        loader.epochs = 100
    return error_of(lambda: iter(loader))


def outside_its_group(out, rank):
    group = dist.new_group([0])
    return error_of(lambda: plain(out, "outside", process_group=group))


# ---- a model


def train_model(loader):
    """The parameters of a small model after its training, under DDP where there are several processes."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1, dtype=torch.float64)
    wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruned = 0
    for _ in range(loader.epoch, loader.epochs):
        for _, picks in loader:
            x = torch.stack([torch.sin(picks.index * k) for k in (1.0, 2.0, 3.0)], 1).double()
            losses = (wrapped(x)[:, 0] - loss_of(picks.index)).square()
            optimizer.zero_grad()
            loader.update(losses, picks).backward()
            optimizer.step()
        pruned += loader.stats["pruned"]
    loader.commit()
    return [parameter.detach() for parameter in model.parameters()], pruned


def trained_model(out, rank):
    return train_model(plain(out, "model"))


def trained_with_constant_steps(out, rank):
    return train_model(plain(out, "constant", constant_steps=True))


# ---- peers


def peers(out, rank):
    """Four processes: 2 x data parallel, 2 x tensor parallel; 0 and 1 are peers, 2 and 3 are."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    loader = plain(out, "peers", process_group=groups[rank % 2])
    recorded = []
    record = ScoreStore.record

    def note(store, index, loss):
        recorded.append(torch.tensor(index))
        return record(store, index, loss)

    ScoreStore.record = note
    try:
        found = train(loader, 3)
    finally:
        ScoreStore.record = record
    return found, recorded


# Cases that start and end with all ranks equally far, so that they follow one another in one launch.
RULES = {
    "peek_on_one": peek_on_one,
    "break_on_both": break_on_both,
    "break_earlier": break_earlier,
    "forgotten_update": forgotten_update,
    "another_call": another_call,
    "different_states": different_states,
    "state_without_scores": state_without_scores,
    "batch_size": different(batch_size=(4, 2)),
    "seed": different(seed=(1, 2)),
    "include": different(include=([1, 2], [1, 3])),
    "next_include": different_curricula,
    "epochs": different(epochs=(4, 5)),
    "delta": different(delta=(0.5, 0.75)),
    "different_datasets": different_datasets,
    "different_stores": different_stores,
    "existing_store": existing_store,
    "failing_commit": failing_commit,
    "error_in_the_block": error_in_the_block,
    "epochs_on_one": epochs_on_one,
    "outside_its_group": outside_its_group,
    "trained_model": trained_model,
    "trained_with_constant_steps": trained_with_constant_steps,
    "state_on_one": state_on_one,
    "state_on_the_other": state_on_the_other,
}
CASES = {**RULES, "wds": whole_wds, "mds": whole_mds, "failed_download": failed_download, "peers": peers}

if __name__ == "__main__":
    _, out, *names = sys.argv
    with process_group() as (rank, _):
        found = {}
        for name in names:
            found[name] = CASES[name](out, rank)
            dist.barrier()
        torch.save(found, Path(out, f"{rank}.pt"))
