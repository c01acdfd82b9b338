"""Continue from each of the states of a run, to its end.

    resume.py KIND DATA STATES OUT

KIND: map or wds. DATA: number of samples, or folder of shards. STATES: file with a list of states. OUT: folder for
0.pt, for each state the list of steps that followed.
"""

import sys
from pathlib import Path

import torch

from infobatch_stream import InfoBatchLoader
from support.ddp.data import Noisy, loss_of, wds

BATCH = 8
EPOCHS = 5


def make(kind, data, store, **options):
    dataset = Noisy(int(data)) if kind == "map" else wds(data)
    options = {"delta": 0.8, "shuffle_window": 16, "seed": 3, "canonical_nodes": 2, **options}
    return InfoBatchLoader(dataset, store, batch_size=BATCH, epochs=EPOCHS, **options)


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


def main(kind, data, states, out):
    found = []
    for state in torch.load(states, weights_only=True):
        loader = make(kind, data, Path(out, "scores.zarr"), existing="overwrite")
        loader.load_state_dict(state)
        found.append(train(loader))
    torch.save(found, Path(out, "0.pt"))


if __name__ == "__main__":
    main(*sys.argv[1:])
