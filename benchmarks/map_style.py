"""Map-style datasets: InfoBatchLoader that prunes nothing against a plain DataLoader."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from benchmarks.contender import infobatch, named, others, plot_rates, rate, rate_figures
from benchmarks.measure import in_turn, ratio
from benchmarks.report import Figure
from benchmarks.shards import LARGE, TINY, Files, workspace, write

OURS = "InfoBatchLoader"
OVERHEAD = (
    "What ours takes more for a batch: 20 to 45 us for its order, which DataLoader has made before the first batch; 15 "
    "for a look at the store's file; 11 to say of 256 samples which is read; and, where code of the user's runs in the "
    "main process, 50 to 100 to keep three random states, set them and put them back. Tried and kept: orders computed "
    "ahead, states left alone where nothing can draw, another bit generator for NumPy meanwhile."
)
TITLE = "Loading map-style data with FullData"
plot = plot_rates


def run(tiny: bool) -> list[Figure]:
    """Compare on tensors in memory and on files of 100 KB, without workers and with 2."""
    torch.set_num_threads(1)
    load = TINY[LARGE] if tiny else LARGE
    count, batch = (400, 16) if tiny else (100_000, 256)
    tensors = TensorDataset(torch.randn(count, 200), torch.arange(count))
    figures: list[Figure] = []
    with workspace() as root:
        files = Files(write("files", load, root), load.count)
        for workers in (0, 2):
            figures += _compare("TensorDataset", tensors, batch, workers, default_collate, tiny)
            figures += _compare("files of 100 KB", files, load.batch, workers, list, tiny)
    return sorted(figures, key=lambda figure: figure.target == 0)


def _compare(
    name: str, dataset: Dataset[Any], batch: int, workers: int, collate: Callable[..., Any], tiny: bool
) -> Iterator[Figure]:
    plain = DataLoader(dataset, batch_size=batch, shuffle=True, num_workers=workers, collate_fn=collate, drop_last=True)
    # In one process: it is a matter of percents, and two processes differ by as much in how their memory lies.
    found = in_turn(
        {
            name: partial(_rate, epochs, batch)
            for name, epochs in {
                OURS: infobatch(dataset, batch, workers, collate=collate, update=False),
                "DataLoader": others(plain, batch, losses=False),
                f"{OURS} and update": infobatch(dataset, batch, workers, collate=collate),
                "DataLoader and a mean": others(plain, batch),
            }.items()
        },
        rounds=1 if tiny else 11,
    )
    peer = f"{named('torch')}: DataLoader(shuffle=True), same collate_fn"
    what = f"{name}, {workers or 'no'} workers, FullData"
    note = f"samples per second in batches of {batch}, from the first of an epoch to the last. {OVERHEAD}"
    yield Figure(8, what, ratio(found[OURS], found["DataLoader"]), "x", peer, bound=0.97, note=note)
    yield Figure(
        0,
        f"{what}, with update()",
        ratio(found[f"{OURS} and update"], found["DataLoader and a mean"]),
        "x",
        "the same, with the mean of as many losses",
    )
    yield from rate_figures(found, f"{name}, {workers} workers")


def _rate(epochs: Callable[[], Any], batch: int) -> float:
    return rate(epochs(), batch)
