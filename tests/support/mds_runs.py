"""Runs over MDS shards."""

import signal
from contextlib import contextmanager

from support.ddp.data import loss_of

FORK = {"num_workers": 2, "multiprocessing_context": "fork"}


SPAWN = {"num_workers": 1, "multiprocessing_context": "spawn"}


@contextmanager
def within(seconds):
    """The block ends, by an error if need be, before ``seconds`` are over."""

    def stop(*_):
        raise AssertionError(f"still waiting after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def train(loader, states=None):
    """To the end: for every step (epoch, index, weight, numbers, noise). ``states`` takes the state before each."""
    steps = []
    for epoch in range(loader.epoch, loader.epochs):
        for (numbers, noise), picks in loader:
            if states is not None:
                states.append(loader.state_dict())
            loader.update(loss_of(picks.index), picks)
            steps.append((epoch, picks.index.tolist(), picks.weight.tolist(), numbers.tolist(), noise.tolist()))
    loader.commit()
    return steps
