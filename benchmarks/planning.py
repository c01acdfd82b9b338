"""Planning an epoch: threshold, selection, counting pass and first request, on one thread."""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.measure import Spread, in_child, in_turn, ratio, seconds
from benchmarks.published import first_batch
from benchmarks.report import Figure
from infobatch_stream.planning.epoch_plan import EpochPlan
from infobatch_stream.policies.base import Policy
from infobatch_stream.policies.budget import ProportionalPruning
from infobatch_stream.policies.pruning import SoftPruning

__all__ = ["TITLE", "growth", "plan", "plot", "run", "scores_file"]

TITLE = "Planning"
IMAGENET = 1_281_167
BATCH, SHARD = 256, 1300
GROWTH = "planning {:,} samples"
_BLOCK = 1 << 22
_SOFT = SoftPruning(0.5)
_BUDGET = ProportionalPruning(0.5, 0.5, 0.15)  # what BudgetPruning makes of an epoch


def scores_file(folder: Path, count: int) -> Path:
    """A file of ``count`` float32 scores, exponentially distributed: as a store has them, and as cheap to make."""
    file = folder / f"{count}.f32"
    if not file.exists():
        random = np.random.default_rng(0)
        with file.open("wb") as handle:
            for start in range(0, count, _BLOCK):
                random.standard_exponential(min(_BLOCK, count - start), dtype=np.float32).tofile(handle)
    return file


def mapped(file: Path) -> NDArray[np.float32]:
    """The scores of `scores_file`, memory-mapped and in the page cache."""
    scores = np.memmap(file, dtype=np.float32, mode="r").view(np.ndarray)
    scores.max()
    return scores


def shard_sizes(count: int) -> NDArray[np.int64]:
    """Shards of 1300 samples, and a rest."""
    sizes = np.full(-(-count // SHARD), SHARD, dtype=np.int64)
    sizes[-1] -= sizes.sum() - count
    return sizes


def plan(
    scores: NDArray[np.float32], epoch: int, shards: bool = True, policy: Policy = _SOFT, **options: Any
) -> EpochPlan:
    """Our plan of an epoch."""
    sizes = shard_sizes(scores.size) if shards else None
    options = {"global_batch": BATCH, **options}
    return EpochPlan(scores, policy, seed=1, epoch=epoch, shard_sizes=sizes, **options)


def growth(file: Path, rounds: int, shards: bool = True) -> tuple[list[float], list[float]]:
    """Seconds of planning, and of a plain read of the scores, in turn. Runs in a child."""
    scores = mapped(file)
    found = in_turn(
        {
            "ours": lambda: seconds(lambda: plan(scores, 3, shards).step(0)),
            "read": lambda: seconds(scores.max),
        },
        rounds,
    )
    return found["ours"], found["read"]


def against_published(file: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of both, in turn. Runs in a child."""
    scores = mapped(file)
    return in_turn(
        {
            "ours": lambda: seconds(lambda: plan(scores, 3).step(0)),
            "published": lambda: seconds(lambda: first_batch(scores, 0.5, 3, BATCH)),
        },
        rounds,
        warmup=1 if rounds > 3 else 0,
    )


def of_a_budget(file: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds with the rule of a budget and with that of soft pruning, in turn. Runs in a child."""
    scores = mapped(file)
    return in_turn(
        {
            "budget": lambda: seconds(lambda: plan(scores, 3, policy=_BUDGET).step(0)),
            "soft": lambda: seconds(lambda: plan(scores, 3).step(0)),
        },
        rounds,
    )


def once(file: Path, published: bool) -> float:
    """Plan once; for the memory that it takes. Runs in a child."""
    scores = mapped(file)
    start = time.perf_counter()
    if published:
        first_batch(scores, 0.5, 3, BATCH)
    else:
        plan(scores, 3).step(0)
    return time.perf_counter() - start


def run(tiny: bool) -> list[Figure]:
    """Targets of planning."""
    middle, large = (200_000, 300_000) if tiny else (10**8, 10**9)
    imagenet = 100_000 if tiny else IMAGENET
    rounds = 1 if tiny else 15
    figures = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found, _ = in_child(against_published, scores_file(folder, imagenet), rounds)
        figures += [
            Figure(1, f"planning {imagenet:,} samples", Spread.of(found["ours"]).scaled(1e3), "ms", "", 10, "most"),
            Figure(
                1,
                f"times faster than the published algorithm at {imagenet:,}",
                ratio(found["published"], found["ours"]),
                "x",
                "published algorithm",
                25,
            ),
        ]
        file = scores_file(folder, middle)
        found, _ = in_child(against_published, file, 1 if tiny else 3)
        _, memory = in_child(once, file, False)
        _, theirs = in_child(once, file, True)
        figures += [
            Figure(
                1,
                f"times faster than the published algorithm at {middle:,}",
                ratio(found["published"], found["ours"]),
                "x",
                f"published algorithm, {Spread.of(found['published']).median:.3g} s",
                100,
            ),
            memory_figure(middle, memory, f"published algorithm, {theirs / 2**20:,.0f} MiB"),
        ]
        sizes = [10**4, 10**5] if tiny else [10**6, 10**7, 10**8, 10**9]
        for count in sizes:
            file = scores_file(folder, count)
            (ours, read), _ = in_child(growth, file, 1 if tiny else 5)
            figures += [
                Figure(0, GROWTH.format(count), Spread.of(ours).scaled(1e9 / count), "ns/sample", "growth"),
                Figure(0, f"{count:,} samples, against a plain read of the scores", ratio(ours, read), "x", "max()"),
            ]
        count = sizes[1]
        found, _ = in_child(of_a_budget, scores_file(folder, count), 1 if tiny else 5)
        budget, soft = Spread.of(found["budget"]).scaled(1e9 / count), ratio(found["budget"], found["soft"])
        figures += [
            Figure(0, f"planning {count:,} samples for a budget", budget, "ns/sample", "BudgetPruning"),
            Figure(0, f"{count:,} samples for a budget, against soft pruning", soft, "x", "SoftPruning"),
        ]
        (ours, _), _ = in_child(growth, scores_file(folder, large), 1 if tiny else 5)
        _, memory = in_child(once, file if not tiny else scores_file(folder, large), False)
        figures += [
            Figure(1, f"planning {large:,} samples", Spread.of(ours), "s", "", 2.5, "most"),
            memory_figure(large, memory, ""),
        ]
        (ours, _), memory = in_child(growth, scores_file(folder, large), 1, False)
        figures += [
            Figure(0, f"planning {large:,} samples without shards", Spread.of(ours), "s", "permuted as a whole"),
            Figure(0, f"memory for {large:,} samples without shards", Spread.of([memory / 2**20]), "MiB", "N/8 bytes"),
        ]
    return figures


def memory_figure(count: int, memory: int, limit: str) -> Figure:
    """Peak growth of anonymous memory while an epoch is planned."""
    return Figure(1, f"anonymous memory to plan {count:,}", Spread.of([memory / 2**20]), "MiB", limit, 200, "most")


def plot(file: Path, figures: list[Figure]) -> None:
    """Seconds to plan against the number of samples."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = [figure for figure in figures if figure.limit == "growth"]
    counts = [int(figure.what.split()[1].replace(",", "")) for figure in points]
    times = [figure.value.median * count * 1e-9 for figure, count in zip(points, counts, strict=True)]
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.loglog(counts, times, "o-", label="one epoch, one thread")
    axes.loglog(counts, [times[-1] * count / counts[-1] for count in counts], ":", label="in proportion to N")
    axes.set(xlabel="samples", ylabel="seconds to plan an epoch")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)
