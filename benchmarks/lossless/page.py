"""What the lossless study found: tables and plots for its pages."""

import math
import re
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from operator import sub
from pathlib import Path

from benchmarks import step_time
from benchmarks.lossless.runs import Run
from benchmarks.lossless.tables import BUDGETS, CONSTANT, PAIRS, STUDY, TABLES
from benchmarks.lossless.tasks import TASKS
from benchmarks.lossless.variants import FULL, percent
from benchmarks.report import load

__all__ = ["Difference", "against_peers", "pairs", "plot", "report", "sections", "steps_table", "table", "write"]

PEERS = ("fewer epochs", "at random", "at random, not rescaled")


_TIMES = Path(__file__).resolve().parent.parent / "results" / "step_time.json"


def report(runs: list[Run], page: Path) -> None:
    """Write the tables and plots of ``page``, as far as it has places for them, and there are runs."""
    places = sections(page)
    if "step time" in places and _TIMES.exists():
        write(page, "step time", step_time.table(load(_TIMES)[1]))
    for task in TASKS:
        for name, (first, rows, _) in TABLES.items():
            section = task if name == STUDY else f"{task}, {name}"
            seeds = range(first, first + 100)
            found = [run for run in runs if run.task == task and run.variant in rows and run.seed in seeds]
            if section not in places or not found:
                continue
            text = table(found, rows)
            if name == CONSTANT:
                text = f"{steps_table(found, rows)}\n\n{pairs(found, PAIRS)}"
            if name == STUDY:
                picture = page.with_name(f"lossless-{task}.png")
                plot(picture, found, rows, f"{task}: accuracy for the samples it took")
                peers = against_peers(found, map(percent, BUDGETS), ("budget", "budget, root"))
                text = f"{text}\n\n{peers}\n\n![{task}]({picture.name})"
            write(page, section, text)


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences with its 95 % interval (Student's t), of ``pairs`` seeds."""

    mean: float
    low: float
    high: float
    pairs: int

    @classmethod
    def of(
        cls, first: dict[int, float], second: dict[int, float], gap: Callable[[float, float], float] = sub
    ) -> "Difference":
        """first - second, or another ``gap`` of them, of the seeds that both have, at least two."""
        from scipy.stats import t

        gaps = [gap(first[seed], second[seed]) for seed in first.keys() & second.keys()]
        mean = statistics.mean(gaps)
        half = float(t.ppf(0.975, len(gaps) - 1)) * statistics.stdev(gaps) / math.sqrt(len(gaps))
        return cls(mean, mean - half, mean + half, len(gaps))

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


def by_variant(runs: Iterable[Run]) -> dict[str, dict[int, Run]]:
    """Runs by variant and seed."""
    grouped: dict[str, dict[int, Run]] = {}
    for run in runs:
        grouped.setdefault(run.variant, {})[run.seed] = run
    return grouped


def accuracy(runs: dict[int, Run]) -> dict[int, float]:
    """Accuracy at the end, in percent, by seed."""
    return {seed: run.accuracy[-1] for seed, run in runs.items()}


def table(runs: list[Run], names: Iterable[str]) -> str:
    """A row for each of ``names`` that has runs of one task: Markdown."""
    grouped = by_variant(runs)
    full = grouped[FULL]
    rows = [
        "| variant | seeds | accuracy, % | against full data, points (95 %) | samples skipped | seconds | time saved |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in names:
        found = grouped.get(name, {})
        if len(found.keys() & full.keys()) < 2:
            continue
        ends = list(accuracy(found).values())
        gap = "" if name == FULL else str(Difference.of(accuracy(found), accuracy(full)))
        times = [1 - found[seed].seconds / full[seed].seconds for seed in found.keys() & full.keys()]
        skipped, saved = (
            "" if name == FULL else f"{100 * statistics.mean(shares):.1f} %"
            for shares in ([run.saved for run in found.values()], times)
        )
        seconds = statistics.mean(run.seconds for run in found.values())
        rows.append(
            f"| {name} | {len(found)} | {statistics.mean(ends):.2f} ± {statistics.stdev(ends):.2f} | {gap} | "
            f"{skipped} | {seconds:.0f} | {saved} |"
        )
    return "\n".join(rows)


def steps_table(runs: list[Run], names: Iterable[str]) -> str:
    """A row for each of ``names`` that has runs of one task, with steps, and each seed if they are few: Markdown."""
    grouped = by_variant(runs)
    names = [name for name in names if name in grouped]
    seeds = sorted({run.seed for run in runs})
    each = len(seeds) < 5
    head = ["variant", "accuracy, %", "against full data, points (95 %)"]
    head += [f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"] if each else ["seeds"]
    head += ["steps", "samples skipped"]
    rows = [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * len(head))} |"]
    for name in names:
        found = grouped[name]
        ends = accuracy(found)
        paired = name != FULL and len(found.keys() & grouped[FULL].keys()) > 1
        steps = statistics.mean(_steps(run) for run in found.values())
        skipped = statistics.mean(run.saved for run in found.values())
        cells = [
            name,
            f"{statistics.mean(ends.values()):.2f}",
            str(Difference.of(ends, accuracy(grouped[FULL]))) if paired else "",
            " / ".join(f"{ends[seed]:.2f}" for seed in seeds if seed in ends) if each else str(len(ends)),
            f"{steps:,.0f}",
            "" if name == FULL else f"{100 * skipped:.1f} %",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _steps(run: Run) -> int:
    """Of the whole run. Where they were not counted they are those of full batches, the last of an epoch filled up."""
    batch, before = TASKS[run.task].batch, [0, *run.trained]
    return run.steps or sum(-(-(after - start) // batch) for start, after in pairwise(before))


def pairs(runs: list[Run], questions: Iterable[tuple[str, str]]) -> str:
    """A row for each of ``questions``, two variants with two seeds of one task or more: Markdown, or ""."""
    grouped = by_variant(runs)
    head = ["| | against | seeds | points (95 %) |", "| --- | --- | --- | --- |"]
    rows = []
    for first, second in questions:
        found, peer = accuracy(grouped.get(first, {})), accuracy(grouped.get(second, {}))
        if len(found.keys() & peer.keys()) > 1:
            gap = Difference.of(found, peer)
            rows.append(f"| {first} | {second} | {gap.pairs} | {gap} |")
    return "\n".join([*head, *rows]) if rows else ""


def against_peers(runs: list[Run], budgets: Iterable[str], ways: Iterable[str]) -> str:
    """A row for each of ``ways`` to keep a budget: its accuracy against that of others of the same budget. Markdown."""
    grouped = by_variant(runs)
    rows = [
        f"| points (95 %) | {' | '.join(f'against {peer}' for peer in PEERS)} | time saved / samples skipped |",
        f"| --- | {'--- | ' * len(PEERS)}--- |",
    ]
    for budget in budgets:
        for way in ways:
            found = grouped.get(f"{way} {budget}", {})
            both = found.keys() & grouped[FULL].keys()
            if len(both) < 2:
                continue
            peers = [grouped.get(f"{peer} {budget}", {}) for peer in PEERS]
            gaps = [
                str(Difference.of(accuracy(found), accuracy(peer))) if len(found.keys() & peer.keys()) > 1 else ""
                for peer in peers
            ]
            ratios = [(1 - found[seed].seconds / grouped[FULL][seed].seconds) / found[seed].saved for seed in both]
            rows.append(f"| {way} {budget} | {' | '.join(gaps)} | {statistics.mean(ratios):.2f} |")
    return "\n".join(rows)


def plot(file: Path, runs: list[Run], names: Iterable[str], title: str) -> None:
    """Accuracy at the end against samples trained on; bars are 95 % intervals of the mean."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from scipy.stats import t

    grouped = by_variant(runs)
    kinds: dict[str, list[tuple[float, float, float]]] = {}
    for name in names:
        if len(found := grouped.get(name, {})) < 2:
            continue
        ends = list(accuracy(found).values())
        half = float(t.ppf(0.975, len(ends) - 1)) * statistics.stdev(ends) / math.sqrt(len(ends))
        trained = statistics.mean(run.trained[-1] for run in found.values())
        kind = name.removesuffix(" %").rstrip("0123456789 ")  # without the budget
        kinds.setdefault(kind, []).append((trained, statistics.mean(ends), half))
    figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    marks = dict(zip(kinds, "sDPo^v*X", strict=False))
    for kind, points in kinds.items():
        trained, means, halves = zip(*sorted(points), strict=True)
        line = "-" if len(points) > 1 else "none"
        axes.errorbar(trained, means, halves, marker=marks[kind], ls=line, capsize=3, label=kind, alpha=0.85)
    axes.set(xlabel="samples trained on", ylabel="test accuracy (%)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def sections(page: Path) -> set[str]:
    """What stands in the comments of ``page``, each alone on a line, that have an end."""
    return set(re.findall(r"^<!-- (.+) -->\n(?=[^<]*(?:<(?!!--)[^<]*)*<!-- end -->)", page.read_text(), re.MULTILINE))


def write(page: Path, section: str, text: str) -> None:
    """Put ``text`` between the comments ``<!-- SECTION -->`` and ``<!-- end -->`` of ``page``."""
    if section not in sections(page):
        raise ValueError(f"{page} has no lines '<!-- {section} -->' and '<!-- end -->'")
    before, mark, rest = page.read_text().partition(f"<!-- {section} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    page.write_text(f"{before}{mark}{text.strip()}\n{end}{after}")
