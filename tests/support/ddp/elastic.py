"""Save on four ranks of two nodes; go on from every state on other numbers of ranks and nodes.

    elastic.py CASE OUT EVERY   a case of CASES; EVERY: step of the states, except for two ranks of one node
    elastic.py refusals OUT     states that do not belong to the run, and one that is older than the stores

OUT: an empty folder, for facts.json or refusals-<rank>.json.
"""

import copy
import gc
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from infobatch_stream import FullData, InfoBatchLoader, ScoreStore
from support.ddp.data import Noisy, loss_of, wds, write_wds
from support.ddp.forked import Launch

N, GLOBAL_BATCH, EPOCHS = 144, 24, 4
SAVED_ON = (2, 2)  # nodes, ranks of each
GOES_ON = [(1, 2), (2, 1), (1, 1), (1, 3), (2, 4)]
TO_THE_END = 5  # of how many states one is followed to the end of the run, the others to that of the next epoch
CASES = {
    "map": ("map", {}),
    "wds": ("wds", {"drop_last": True, "canonical_nodes": 4}),
    "map, last step dropped": ("map", {"drop_last": True, "canonical_nodes": 8, "num_workers": 1}),
    "wds, last step filled up": ("wds", {"num_workers": 2}),
    "map, constant steps": ("map", {"constant_steps": True}),
    "wds, constant steps": ("wds", {"constant_steps": True, "canonical_nodes": 4, "num_workers": 1}),
}


def store_of(out, layout, rank):
    return out / f"scores-{rank // layout[1]}.zarr"


def make(out, layout, rank, kind="map", **options):
    data = Noisy(options.pop("size", N)) if kind == "map" else wds(out / "shards")
    options = {"batch_size": GLOBAL_BATCH // (layout[0] * layout[1]), **options}
    settings = {"epochs": EPOCHS, "delta": 0.75, "seed": 3, "shuffle_window": 16, "existing": "overwrite", **options}
    return InfoBatchLoader(data, store_of(out, layout, rank), **settings)


def steps_of(loader, epochs, states=None):
    """Those of the epochs before ``epochs``: [epoch, step, index, weight]; ``states`` takes the state before each."""
    found = []
    for epoch in range(loader.epoch, min(epochs, EPOCHS)):
        for _, picks in loader:
            if states is not None:
                states.append(loader.state_dict())
            found.append([epoch, loader.step, picks.index.tolist(), picks.weight.tolist()])
            loader.update(loss_of(picks.index, epoch), picks)
    return found


def to_the_end(loader):
    loader.commit()
    return np.nan_to_num(ScoreStore.open(loader._run.scores.path, mode="r").scores, nan=-1.0).tolist()


# ---- what ranks do


def reference(rank, out, case):
    kind, options = CASES[case]
    states = []
    loader = make(out, SAVED_ON, rank, kind, **options)
    steps = steps_of(loader, EPOCHS, states)
    states.append(loader.state_dict())
    torch.save({"steps": steps, "scores": to_the_end(loader)}, out / f"reference-{rank}.pt")
    torch.save(states, out / f"states-{rank}.pt")


def go_on(rank, out, case, layout, every):
    kind, options = CASES[case]
    states = torch.load(out / f"states-{min(rank, 1)}.pt", weights_only=True)  # 1: of a rank that has no scores
    found = {}
    for number in range(0, len(states), every):
        loader = make(out, layout, rank, kind, **{**options, "canonical_nodes": None})
        loader.load_state_dict(states[number])
        through = number % TO_THE_END == 0
        steps = steps_of(loader, EPOCHS if through else loader.epoch + 2)
        found[number] = {"steps": steps, "scores": to_the_end(loader) if through else None}
    torch.save(found, out / f"{layout[0]}x{layout[1]}-{rank}.pt")


# ---- and what is compared


def joined(ranks):
    """The steps of all ranks as those of one."""
    return [
        [*one[0][:2], [i for part in one for i in part[2]], [w for part in one for w in part[3]]]
        for one in zip(*ranks, strict=True)
    ]


def losses_after(steps):
    """Scores and pending that a run has after ``steps``."""
    scores, pending, at = torch.full((N,), torch.nan), torch.full((N,), torch.nan), 0
    for epoch, _, index, weight in steps:
        if epoch != at:
            scores, pending, at = torch.where(pending.isnan(), scores, pending), torch.full((N,), torch.nan), epoch
        recorded = torch.tensor(index)[torch.tensor(weight) > 0]
        pending[recorded] = loss_of(recorded, epoch)
    return scores, pending


def equal(one, other):
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


def compare(out, case, every):
    launched(out, "reference", SAVED_ON, reference, out, case)
    ranks = [torch.load(out / f"reference-{rank}.pt", weights_only=True) for rank in range(4)]
    steps, scores = joined([rank["steps"] for rank in ranks]), ranks[0]["scores"]
    states = torch.load(out / "states-0.pt", weights_only=True)
    wrong = []
    for number, state in enumerate(states):
        right = losses_after(steps[:number])
        if number == len(steps) or (number and steps[number][0] != steps[number - 1][0]):
            # Before the first step of an epoch what came before is committed; after the last one not yet.
            new = torch.where(right[1].isnan(), right[0], right[1])
            right = (new, torch.full((N,), torch.nan)) if number < len(steps) else right
        if not all(equal(state[name], part) for name, part in zip(("scores", "pending"), right, strict=True)):
            wrong.append(f"state {number} has other losses")
    tried = {}
    for layout in GOES_ON:
        name = "x".join(map(str, layout))
        launched(out, name, layout, go_on, out, case, layout, 1 if name == "1x2" else every)
        ranks = [torch.load(out / f"{name}-{r}.pt", weights_only=True) for r in range(layout[0] * layout[1])]
        tried[name] = len(ranks[0])
        for number in ranks[0]:
            found = joined([rank[number]["steps"] for rank in ranks])
            last = EPOCHS if ranks[0][number]["scores"] else found[-1][0] + 1 if found else EPOCHS
            if found != [step for step in steps[number:] if step[0] < last]:
                wrong.append(f"{name} makes other steps from state {number} on")
            if any(rank[number]["scores"] not in (None, scores) for rank in ranks):
                wrong.append(f"{name} ends with other scores from state {number} on")
    pruned = [N - sum(w > 0 for at, _, _, weight in steps if at == epoch for w in weight) for epoch in range(EPOCHS)]
    facts = {"states": len(states), "tried": tried, "wrong": wrong, "pruned": pruned}
    (out / "facts.json").write_text(json.dumps(facts))


def launched(out, name, layout, action, *args):
    launch = Launch(out, name, layout[0] * layout[1], action, *args, local=layout[1])
    assert not any(launch.wait(seconds=120)), launch.said()


# ---- states that do not belong to the run


def changed(state, *path, to):
    state = copy.deepcopy(state)
    part = state
    for name in path[:-1]:
        part = part[name]
    if to is KeyError:
        part.pop(path[-1], None)
    else:
        part[path[-1]] = to
    state.pop("checksum", None)  # as an earlier version had none; else that would tell of the change first
    return state


OPTIONS = {
    "global batch": {"batch_size": 2},
    "seed": {"seed": 4},
    "policy": {"policy": FullData()},
    "delta": {"delta": 0.5},
    "shuffle": {"shuffle": False},
    "shuffle_window": {"shuffle_window": 17},
    "drop_last": {"drop_last": True},
    "constant_steps": {"constant_steps": True},
    "another size": {"size": N + 4},
    "another dataset": {"kind": "wds"},
}
STATES = {
    "newer format": (("format",), 5),
    "older format": (("format",), 1),
    "no format": (("format",), KeyError),
    "no settings": (("settings",), KeyError),
    "settings of no kind": (("settings",), [1]),
    "no progress": (("progress",), KeyError),
    "no step": (("progress", "step"), KeyError),
    "unknown progress": (("progress", "more"), 1),
    "negative step": (("progress", "step"), -1),
    "step of no kind": (("progress", "step"), 1.5),
    "NaN epoch": (("progress", "epoch"), float("nan")),
    "NaN kept": (("progress", "kept"), float("nan")),
    "text for done": (("progress", "done"), "yes"),
    "step beyond the epoch": (("progress", "step"), 99),
    "epoch beyond the run": (("progress", "epoch"), EPOCHS + 1),
    "epoch beyond all runs": (("progress", "epoch"), 1 << 60),
    "lanes that do not divide": (("progress", "lanes"), 5),
    "too many lanes": (("progress", "lanes"), 1 << 40),
    "begun or not": (("progress", "begun"), None),
    "begun in a shorter run": (("progress", "begun"), 0),
    "text for what is known": (("progress", "knows_all"), "yes"),
    "no scores": (("scores",), KeyError),
    "no pending": (("pending",), KeyError),
    "too few scores": (("scores",), torch.zeros(N - 1)),
    "scores in a table": (("scores",), torch.zeros(N, 1)),
    "scores of no kind": (("scores",), "none"),
    "complex scores": (("scores",), torch.zeros(N, dtype=torch.complex64)),
}


def contents(out):
    files = sorted(file for file in out.glob("scores-*.zarr/**/*") if file.is_file())
    return {str(file): file.read_bytes() for file in files if file.name != "owner.json"}


def refusals(rank, out):
    """Into stores at the end of a run: states that are refused, then one of epoch 1, which is not."""
    states, loader = [], make(out, SAVED_ON, rank)
    steps_of(loader, EPOCHS, states)
    loader.commit()
    older = states[10]
    found = {"before": ScoreStore.open(loader._run.scores.path, mode="r").epoch}
    for name, options in OPTIONS.items():
        found[name] = outcome(out, rank, options, older)
    for name, (path, to) in STATES.items():
        gone = path[0] in ("scores", "pending") and rank  # which only rank 0 has
        found[name] = outcome(out, rank, {}, older if gone else changed(older, *path, to=to))
    loader = make(out, SAVED_ON, rank, existing="error")
    loader.load_state_dict(older)
    store = ScoreStore.open(loader._run.scores.path, mode="r")
    found["older"] = [loader.epoch, loader.step, store.epoch]
    found["loaded"] = [np.nan_to_num(part, nan=-1.0).tolist() for part in (store.scores, store.pending)]
    if rank == 0:
        found["saved"] = [torch.nan_to_num(older[name], nan=-1.0).tolist() for name in ("scores", "pending")]
    (out / f"refusals-{rank}.json").write_text(json.dumps(found))


def outcome(out, rank, options, state):
    """Kind and text of the error, the epoch of the loader, and whether all stores are as they were."""
    dist.barrier()
    before, error = contents(out), None
    loader = make(out, SAVED_ON, rank, **options)
    dist.barrier()
    try:
        loader.load_state_dict(state)
    except Exception as refusal:
        error = refusal
    dist.barrier()
    return type(error).__name__, str(error), loader.epoch, contents(out) == before


def main(case, out, every="1"):
    out = Path(out)
    gc.collect()
    gc.freeze()
    write_wds(out / "shards", samples=N // 4)
    if case == "refusals":
        launched(out, "refusals", SAVED_ON, refusals, out)
    else:
        compare(out, case, int(every))


if __name__ == "__main__":
    main(*sys.argv[1:])
