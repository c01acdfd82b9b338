"""The report of a store as large as ImageNet's: seconds, memory, and bytes of the page.

``python -m benchmarks.report_page [--samples N] [--epochs E] [--folder FOLDER]``; the store stays in FOLDER, and is
used again when it is there.
"""

import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from infobatch_stream import ScoreStore
from infobatch_stream.store.history import Epoch, History

__all__ = ["make_store"]

_SECONDS = 900.0  # of an epoch on all samples


def make_store(
    path: Path, samples: int, epochs: int, *, fingerprint: str = "synthetic", recorded: bool = True, seed: int = 0
) -> None:
    """A store as soft pruning at 0.5 leaves it: losses that fall, faster for some samples, and noise."""
    rng = np.random.default_rng(seed)
    store = ScoreStore.create(path, samples, fingerprint)
    hardness = rng.beta(2, 5, samples).astype(np.float32)
    for epoch in range(epochs):
        scores = store.scores
        mean = float(np.nanmean(scores)) if epoch else np.nan
        pruned = (scores < mean) & (rng.random(samples, np.float32) < 0.5)
        noise = rng.standard_normal(samples, np.float32)
        losses = 7 * np.exp(-4 * (epoch + 1) / epochs * (1 - hardness) ** 2 * 2) * np.exp(0.4 * noise)
        store.put_pending(0, np.where(pruned, np.float32(np.nan), losses))
        kept = samples - int(np.count_nonzero(pruned))
        row = Epoch(epoch, samples, kept, kept, mean, _SECONDS * kept / samples)
        store.commit(epoch, history=History(path, row, recorded=recorded))


def build(path: Path, out: Path) -> tuple[float, int]:
    """Seconds, and the peak of the memory of this process, in bytes."""
    from infobatch_stream.report.page import write

    start = time.perf_counter()
    write(path, out)
    return time.perf_counter() - start, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def memory(path: Path) -> int:
    """The peak of a process that imports what `build` does, and opens the store, in bytes."""
    import infobatch_stream.report.page  # noqa: F401

    ScoreStore.open(path, mode="r")
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(
    samples: Annotated[int, typer.Option(help="Samples of the store.")] = 1_281_167,
    epochs: Annotated[int, typer.Option(help="Epochs of it.")] = 90,
    folder: Annotated[Path | None, typer.Option(help="Where the store goes; default: a temporary folder.")] = None,
) -> None:
    """Make a store with recorded losses, and the report of it, in processes of their own."""
    with tempfile.TemporaryDirectory(prefix="infobatch-benchmark-") as name:
        place = (folder or Path(name)).resolve()
        path = place / f"scores-{samples}-{epochs}.zarr"
        if not path.exists():
            start = time.perf_counter()
            make_store(path, samples, epochs)
            print(f"made a store of {samples:,} samples and {epochs} epochs in {time.perf_counter() - start:.0f} s")
        out = place / "report.html"
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            before = pool.apply(memory, (path,))
            seconds, peak = pool.apply(build, (path, out))
        print(f"report: {seconds:.1f} s, {out.stat().st_size / 1e6:.2f} MB")
        print(f"memory: {peak / 2**20:,.0f} MiB at the peak, {before / 2**20:,.0f} MiB of it for what is imported")


if __name__ == "__main__":
    typer.run(main)
