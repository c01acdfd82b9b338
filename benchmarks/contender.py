"""Loaders in competition: each lives in a process of its own, and all run an epoch in turn.

The same rule for each: batches of one size, an incomplete one dropped; timed from the first batch to the last, so that
the start of workers is not counted; the first epoch of each is thrown away. Training is ``update`` with a loss per
sample for InfoBatchLoader, and the mean of as many losses for the others.
"""

import atexit
import gc
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch

from benchmarks.measure import Spread, in_turn
from benchmarks.report import Figure
from infobatch_stream import FullData, InfoBatchLoader, QuantilePruning

__all__ = [
    "Contender",
    "Epochs",
    "epochs_of",
    "infobatch",
    "named",
    "others",
    "plot_rates",
    "pruning",
    "rate",
    "rate_figures",
    "rates",
]

Epochs = Callable[[], Iterable[Any]]
"""Each call begins an epoch: an iterable of full batches, trained on as they come."""


def rate(batches: Iterable[Any], batch: int) -> float:
    """Samples per second, from the first of ``batches`` (of ``batch`` samples each) to the last."""
    gc.collect()
    rest = iter(batches)
    next(rest)
    start = last = time.perf_counter()
    count = 0
    for _ in rest:
        last = time.perf_counter()  # not at the very end, where workers are stopped
        count += 1
    return count * batch / (last - start)


def pruning(share: float) -> FullData | QuantilePruning:
    """A policy that keeps ``share`` of the samples, 0.1 < share <= 1: the hardest tenth, and at random of the rest."""
    return FullData() if share == 1 else QuantilePruning((0.9,), ((share - 0.1) / 0.9, 1.0))


def infobatch(
    dataset: Any,
    batch: int,
    workers: int = 0,
    share: float = 1.0,
    collate: Callable[..., Any] = list,
    update: bool = True,
    threads: int = 0,
) -> Epochs:
    """Epochs of InfoBatchLoader that keep ``share`` of the samples, but for the first, which knows no scores yet."""
    folder = tempfile.TemporaryDirectory(prefix="infobatch-benchmark-")
    loader = InfoBatchLoader(
        dataset, Path(folder.name) / "scores.zarr", batch_size=batch, epochs=10**6, policy=pruning(share), delta=1.0,
        drop_last=True, collate_fn=collate, num_workers=workers, num_threads=threads,
    )  # fmt: skip

    return epochs_of(loader, folder, update)


def epochs_of(loader: InfoBatchLoader, folder: tempfile.TemporaryDirectory[str], update: bool = True) -> Epochs:
    """Epochs of ``loader``, whose store is in ``folder``."""

    def epoch() -> Iterator[Any]:
        assert folder.name  # it lives as long as this does
        for data, picks in loader:
            if update:
                loader.update(torch.rand(len(picks)), picks)
            yield data

    return epoch


def others(loader: Iterable[Any], batch: int, losses: bool = True) -> Epochs:
    """Epochs of any other loader."""

    def epoch() -> Iterator[Any]:
        for data in loader:
            if losses:
                torch.rand(batch).mean()
            yield data

    return epoch


class Contender:
    """A process in which ``action = make(*args)`` stays; calling the object calls it there, for what it returns.

    Processes are forked from one that has the libraries imported, and has used nothing of them.
    """

    def __init__(self, make: Callable[..., Callable[[], Any]], *args: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "infobatch_stream", "streaming", "webdataset"])
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, args))
        self._process.start()
        theirs.close()

    def __call__(self) -> Any:
        """Call the action. Raises RuntimeError with the child's error."""
        self._pipe.send(True)
        found, error = self._pipe.recv()
        if error is not None:
            raise RuntimeError(f"a contender failed:\n{error}")
        return found

    def __enter__(self) -> Self:
        """The contender."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():  # a library's thread that does not end
            self._process.terminate()
            self._process.join()


def _serve(pipe: Any, make: Callable[..., Callable[[], Any]], args: tuple[Any, ...]) -> None:
    multiprocessing.set_start_method("fork", force=True)  # for workers, as usual on Linux, and not as this process was
    torch.set_num_threads(1)
    action = None
    try:
        while pipe.recv():
            try:
                action = action or make(*args)
                pipe.send((action(), None))
            except Exception as error:
                pipe.send((None, "".join(traceback.format_exception(error))))
    except EOFError:  # the other end is closed: that was all
        atexit._run_exitfuncs()  # multiprocessing does not, and StreamingDataset removes its shared memory there


def rates(makers: Mapping[str, tuple[Any, ...]], batch: int, rounds: int) -> dict[str, list[float]]:
    """Samples per second by contender and round. makers: by name, a function that makes Epochs, and its arguments."""
    with ExitStack() as stack:
        running = {name: stack.enter_context(Contender(_rating, batch, *maker)) for name, maker in makers.items()}
        return in_turn(running, rounds)


def _rating(batch: int, make: Callable[..., Epochs], *args: Any) -> Callable[[], float]:
    epochs = make(*args)
    return lambda: rate(epochs(), batch)


def named(package: str) -> str:
    """A package with its version."""
    return f"{package} {version(package)}"


def rate_figures(found: Mapping[str, list[float]], where: str) -> list[Figure]:
    """Context: how many samples a second each contender delivered."""
    return [Figure(0, f"{where}: {name}", Spread.of(values), "samples/s", "") for name, values in found.items()]


def plot_rates(file: Path, figures: Iterable[Figure]) -> None:
    """Bars of the figures that `rate_figures` made."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shown = [figure for figure in figures if figure.unit == "samples/s"][::-1]
    colors = ["tab:orange" if "InfoBatchLoader" in figure.what else "tab:gray" for figure in shown]
    drawn, axes = plt.subplots(figsize=(8, 0.6 + 0.26 * len(shown)), layout="constrained")
    middle = [figure.value.median for figure in shown]
    low = [figure.value.median - figure.value.low for figure in shown]
    high = [figure.value.high - figure.value.median for figure in shown]
    axes.barh([figure.what for figure in shown], middle, xerr=[low, high], color=colors, ecolor="black")
    axes.set_xscale("log")
    axes.set_xlabel("samples per second")
    drawn.savefig(file, dpi=120)
    plt.close(drawn)
