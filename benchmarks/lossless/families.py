"""Does it pay? Tables over all families of models, for docs/does-it-pay.md."""

import statistics
from collections.abc import Callable, Iterable
from operator import sub
from pathlib import Path

import numpy as np

from benchmarks.lossless.page import Difference, by_variant, sections, write
from benchmarks.lossless.runs import Run
from benchmarks.lossless.tables import IDEAS, LONG, PAIRS, SHORT, TABLES, TIME
from benchmarks.lossless.tasks import FAMILIES, TASKS
from benchmarks.lossless.variants import FULL

__all__ = ["against_full", "gap", "plot", "questions", "report", "seconds"]

Grouped = dict[str, dict[int, Run]]  # by variant and seed


def gap(first: dict[int, Run], second: dict[int, Run], *, by_loss: bool) -> Difference | None:
    """How much better ``first`` ended than ``second``, of the seeds of both; None where these are not two.

    Points of accuracy, or by how many percent its test loss is less, so that more is better.
    """
    if len(first.keys() & second.keys()) < 2:
        return None
    ends = [
        {seed: run.test_loss[-1] if by_loss else run.accuracy[-1] for seed, run in runs.items()}
        for runs in (first, second)
    ]
    less: Callable[[float, float], float] = lambda one, other: 100 * (1 - one / other)  # noqa: E731
    return Difference.of(*ends, less if by_loss else sub)


def _of(runs: Iterable[Run], table: str) -> dict[str, tuple[str, Grouped]]:
    """By family: its task, and the runs of it in ``table``, of the size that has most."""
    seeds = range(TABLES[table].first, TABLES[table].first + 100)
    found = [run for run in runs if run.seed in seeds and run.variant in TABLES[table].rows]
    sizes = {
        family: max(tasks, key=lambda task: sum(run.task == task for run in found))
        for family, tasks in FAMILIES.items()
    }
    return {family: (task, by_variant(run for run in found if run.task == task)) for family, task in sizes.items()}


def against_full(runs: Iterable[Run], table: str, *, by_loss: bool = False) -> str:
    """A row for each variant, a column for each family: what it ends better than full data. Markdown.

    by_loss: of all families, and not only of those that have no accuracy.
    """
    families = {family: found for family, found in _of(runs, table).items() if FULL in found[1]}
    head = ["variant", "samples skipped", *families]
    rows = [head, ["---"] * len(head), [FULL, "", *(_full(*found, by_loss) for found in families.values())]]
    for name in TABLES[table].rows:
        ends = {
            family: gap(grouped.get(name, {}), grouped[FULL], by_loss=by_loss or TASKS[task].by_loss)
            for family, (task, grouped) in families.items()
        }
        if name == FULL or not any(ends.values()):
            continue
        saved = [run.saved for _, grouped in families.values() for run in grouped.get(name, {}).values()]
        rows.append(
            [name, f"{100 * statistics.mean(saved):.0f} %", *("" if e is None else str(e) for e in ends.values())]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _full(task: str, grouped: Grouped, by_loss: bool) -> str:
    """How full data ended, and of how many seeds."""
    ends = grouped[FULL].values()
    if by_loss or TASKS[task].by_loss:
        return f"loss {statistics.mean(run.test_loss[-1] for run in ends):.3f}, {len(ends)} seeds"
    return f"{statistics.mean(run.accuracy[-1] for run in ends):.2f} %, {len(ends)} seeds"


def questions(runs: Iterable[Run], table: str, pairs: Iterable[tuple[str, str]], *, by_loss: bool = False) -> str:
    """A row for each of ``pairs`` of variants, a column for each family: what the first ends better. Markdown."""
    families = _of(runs, table)
    head = ["", "against", *families]
    rows = [head, ["---"] * len(head)]
    for first, second in pairs:
        ends = [
            gap(grouped.get(first, {}), grouped.get(second, {}), by_loss=by_loss or TASKS[task].by_loss)
            for task, grouped in families.values()
        ]
        if any(ends):
            rows.append([first, second, *("" if end is None else str(end) for end in ends)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def seconds(runs: Iterable[Run], tables: Iterable[str]) -> str:
    """What the runs of each family took, in hours of a processor; Markdown."""
    runs = list(runs)
    head = ["", *FAMILIES]
    rows = [head, ["---"] * len(head)]
    for table in tables:
        spent = [
            sum(run.seconds for seeds in grouped.values() for run in seeds.values())
            for _, grouped in _of(runs, table).values()
        ]
        if any(spent):
            rows.append([f"{table}, hours", *(f"{one / 3600:.1f}" for one in spent)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def plot(file: Path, runs: Iterable[Run]) -> None:
    """Accuracy after each epoch against the seconds that it took until then; the mean of the seeds, and their range."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    families = {family: found for family, found in _of(runs, TIME).items() if FULL in found[1]}
    figure, axes = plt.subplots(1, len(families), figsize=(4.5 * len(families), 4), layout="constrained", squeeze=False)
    for (family, (task, grouped)), axis in zip(families.items(), axes[0], strict=True):
        for name in TABLES[TIME].rows:
            ends = [run.test_loss if TASKS[task].by_loss else run.accuracy for run in grouped[name].values()]
            seconds = np.mean([run.elapsed for run in grouped[name].values()], axis=0)
            (line,) = axis.plot(seconds, np.mean(ends, axis=0), marker=".", label=f"{name} ({len(ends)} seeds)")
            axis.fill_between(seconds, np.min(ends, axis=0), np.max(ends, axis=0), color=line.get_color(), alpha=0.15)
        measure = "test loss" if TASKS[task].by_loss else "test accuracy, %"
        axis.set(title=family, xlabel="seconds of training, loading and planning", ylabel=measure)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize="small")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def report(runs: list[Run], page: Path) -> None:
    """Write the tables of ``page``, as far as it has places for them."""
    places = sections(page)
    texts = {"hours": seconds(runs, (SHORT, LONG, IDEAS))}
    for name in (SHORT, LONG, IDEAS):
        for by_loss, which in ((False, name), (True, f"{name}, by loss")):
            texts[which] = against_full(runs, name, by_loss=by_loss)
            texts[f"{which}, questions"] = questions(runs, name, PAIRS, by_loss=by_loss)
    for section, text in texts.items():
        if section in places:
            write(page, section, text)
    if any(run.seed // 100 == TABLES[TIME].first // 100 for run in runs):
        plot(page.with_name("time-to-accuracy.png"), runs)
