"""The shuffled order: its cost per entry, its memory, and how soon any step is reached."""

import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.measure import Spread, in_child
from benchmarks.planning import mapped, plan, scores_file
from benchmarks.report import Figure

__all__ = ["TITLE", "run"]

TITLE = "Order"
WINDOW = 65536


def amortised(file: Path, batch: int, entries: int, rounds: int) -> list[float]:
    """Nanoseconds per entry of steps in turn, over a stretch of ``entries``. Runs in a child."""
    order = plan(mapped(file), 3, global_batch=batch)
    steps = max(1, min(entries // batch, order.steps // (rounds + 1) - 1))
    found = []
    for number in range(1 + rounds):
        start = time.perf_counter()
        for step in range(number * steps, (number + 1) * steps):
            order.step(step)
        found.append((time.perf_counter() - start) / (steps * batch) * 1e9)
    return found[1:]


def sorting(rounds: int) -> list[float]:
    """Nanoseconds per entry of sorting windows of 16-bit keys: what any shuffle by keys has to do."""
    keys = np.random.default_rng(0).integers(0, 1 << 16, WINDOW).astype(np.uint16)
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(20):
            np.argsort(keys, kind="stable")
        found.append((time.perf_counter() - start) / (20 * WINDOW) * 1e9)
    return found


def direct(file: Path, lanes: int, tries: int) -> list[float]:
    """Milliseconds to a step somewhere, for the first of as many ranks as there are lanes. Runs in a child."""
    order = plan(mapped(file), 3, global_batch=256 * lanes, lanes=lanes)
    found = []
    for step in np.random.default_rng(1).integers(0, order.steps, tries).tolist():
        start = time.perf_counter()
        order.step(step, 0, lanes)
        found.append((time.perf_counter() - start) * 1e3)
    return found


def memory(file: Path, window: int) -> None:
    """Plan, and read three windows; for the memory that it takes. Runs in a child."""
    order = plan(mapped(file), 3, window=window)
    for step in range(min(order.steps, 3 * window // 256)):
        order.step(step)


def run(tiny: bool) -> list[Figure]:
    """Targets of the order."""
    count = 300_000 if tiny else 10**9
    rounds = 1 if tiny else 9
    entries = 20_000 if tiny else 20 * WINDOW
    figures = []
    with tempfile.TemporaryDirectory() as name:
        file = scores_file(Path(name), count)
        for batch in (4096, 256):
            found, _ = in_child(amortised, file, batch, entries, rounds)
            figures.append(
                Figure(
                    2,
                    f"per entry, global batch {batch:,}",
                    Spread.of(found),
                    "ns",
                    f"sorting alone {Spread.of(sorting(rounds)).median:.2g} ns",
                    40,
                    "most",
                    "choosing, weighing, shuffling and cutting into steps; the rank reads all of each step",
                )
            )
        for lanes in (1, 8):
            found, _ = in_child(direct, file, lanes, 3 if tiny else 50)
            text = f"any step reached directly, {lanes} lane{'s' if lanes > 1 else ''}"
            figures.append(Figure(2, text, Spread.of(found), "ms", "per lane that the rank reads", 20, "most"))
        for window in (WINDOW, 4 * WINDOW, 16 * WINDOW):
            _, peak = in_child(memory, file, window)
            text = f"anonymous memory of plan and order, window {window:,}"
            figures.append(Figure(0, text, Spread.of([peak / 2**20]), "MiB", "window"))
    return figures
