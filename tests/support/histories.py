"""Short runs on numbers that keep their history."""

import numpy as np
import torch
from torch.utils.data import TensorDataset

from infobatch_stream import InfoBatchLoader, SoftPruning

COUNT = 500


DATA = TensorDataset(torch.rand(COUNT, 3, generator=torch.Generator().manual_seed(0)), torch.arange(COUNT))


def losses(x, epoch):
    return x.sum(1) ** 2 / (1 + epoch)


def loader(path, length=6, **options):
    options = {"batch_size": 32, "policy": SoftPruning(0.5), "history": True, **options}
    return InfoBatchLoader(DATA, path, epochs=length, **options)


def train(run, until=None):
    """Train; until (epoch, step), where its state is returned. What each epoch left, and which samples it had."""
    left, seen = [], []
    for epoch in range(run.epoch, run.epochs):
        seen.append([])
        for (x, _), picks in run:
            run.update(losses(x, epoch), picks)
            seen[-1] += picks.index[picks.weight > 0].tolist()
            if until == (epoch, run.step):
                return run.state_dict()
        run.commit()
        left.append(np.array(run.store.scores))
    return left, seen
