"""A rank that makes a collective call alone, while the other trains on."""

import time

import torch
import torch.distributed as dist

from support.ddp.data import loss_of
from support.ddp.victims import error_of, join, loader_of

CALLS = {
    "state_dict()": lambda loader: loader.state_dict(),
    "commit()": lambda loader: loader.commit(),
    "iter(loader)": lambda loader: iter(loader),
    "load_state_dict()": lambda loader: loader.load_state_dict({}),
}


def call_alone(link, path, rank, call, seconds):
    """In the middle of an epoch; -> rank 0's error, and what a collective of the user's gives afterwards."""
    join(link, rank, seconds)
    loader = loader_of(path, batch_size=4)
    batches = iter(loader)
    _, picks = next(batches)
    loader.update(loss_of(picks.index), picks)
    error = None
    if rank == 0:
        error = error_of(lambda: CALLS[call](loader))
    else:
        time.sleep(seconds / 2)
    gradient = torch.full((5,), rank + 1.0)
    dist.all_reduce(gradient)
    return error, gradient.tolist()
