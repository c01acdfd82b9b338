"""Continue from each of the states of a run, to its end; under torchrun, also make such a run.

    resume.py KIND DATA STATES OUT [NEW_STATES]

KIND: map or wds. DATA: number of samples, or folder of shards. STATES: file with a list of states. OUT: folder for
<rank>.pt, for each state the list of steps that followed. NEW_STATES: file for the states of a run by these ranks.
"""

import os
import sys
from pathlib import Path

import torch
from ddp_scripts.data import Noisy, loss_of, wds
from ddp_scripts.launch import process_group

from infobatch_stream import InfoBatchLoader

GLOBAL_BATCH = 8
EPOCHS = 5


def make(kind, data, store, world_size=1, **options):
    dataset = Noisy(int(data)) if kind == "map" else wds(data)
    options = {"delta": 0.8, "shuffle_window": 16, "seed": 3, "canonical_nodes": 2, **options}
    return InfoBatchLoader(dataset, store, batch_size=GLOBAL_BATCH // world_size, epochs=EPOCHS, **options)


def train(loader, states=None):
    """To the end: for every step (epoch, index, weight, noise). ``states`` takes the state before each, and after."""
    steps = []
    for epoch in range(loader.epoch, loader.epochs):
        for (_, noise), picks in loader:
            if states is not None:
                states.append(loader.state_dict())
            loader.update(loss_of(picks.index), picks)
            steps.append((epoch, picks.index.tolist(), picks.weight.tolist(), noise.tolist()))
    if states is not None:
        states.append(loader.state_dict())
    return steps


def main(kind, data, states, out, new_states=None, rank=0, world_size=1):
    found = []
    for state in torch.load(states, weights_only=True):
        if rank:  # as when every rank had saved its own
            del state["scores"], state["pending"]
        loader = make(kind, data, Path(out, "scores.zarr"), world_size, existing="overwrite")
        loader.load_state_dict(state)
        found.append(train(loader))
    torch.save(found, Path(out, f"{rank}.pt"))
    if new_states:
        made = []
        steps = train(make(kind, data, Path(out, "new.zarr"), world_size), made)
        torch.save(steps, Path(out, f"run{rank}.pt"))
        if rank == 0:
            torch.save(made, new_states)


if __name__ == "__main__":
    if "RANK" in os.environ:
        with process_group() as (rank, world_size):
            main(*sys.argv[1:], rank=rank, world_size=world_size)
    else:
        main(*sys.argv[1:])
