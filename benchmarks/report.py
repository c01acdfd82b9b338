"""What a benchmark found, kept as JSON, and the page made of it."""

import json
import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from benchmarks.measure import Spread

__all__ = ["Figure", "load", "machine", "page", "save"]


@dataclass(frozen=True)
class Figure:
    """One measured figure.

    target: the number of the target it belongs to (0: context, without a bound). what: in a few words.
    value: as measured, in ``unit`` ("x" for a ratio). bound, at: what the target asks for: at "least" or "most" that
    many; None for context. limit: the peer or the limit it is measured against. note: what holds it back, or how.
    """

    target: int
    what: str
    value: Spread
    unit: str
    limit: str
    bound: float | None = None
    at: Literal["least", "most"] = "least"
    note: str = ""

    @property
    def reached(self) -> bool | None:
        """Whether the median keeps the bound; None without one."""
        if self.bound is None:
            return None
        return self.value.median >= self.bound if self.at == "least" else self.value.median <= self.bound


def save(file: Path, figures: Iterable[Figure]) -> None:
    """Write figures as JSON, with the machine on which they were measured."""
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine(), "figures": [asdict(figure) for figure in figures]}
    file.write_text(json.dumps(content, indent=1) + "\n")


def load(file: Path) -> tuple[str, list[Figure]]:
    """The machine and the figures that `save` wrote."""
    content = json.loads(file.read_text())
    return content["machine"], [
        Figure(**{**figure, "value": Spread(**figure["value"])}) for figure in content["figures"]
    ]


def machine() -> str:
    """This machine and the versions that matter, in one line."""
    import numpy as np
    import torch

    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB{gpu}; Python {platform.python_version()}, "
        f"NumPy {np.__version__}, torch {torch.__version__}"
    )


def page(results: dict[str, tuple[str, list[Figure]]], titles: dict[str, str], plots: dict[str, list[str]]) -> str:
    """RESULTS.md. results: machine and figures by benchmark. titles: of the benchmarks. plots: their files."""
    parts = [
        "# Results\n",
        "Written by `python -m benchmarks`; do not edit. Each figure is the median of several runs, with the lowest\n"
        "and the highest where there were some. Ratios compare contenders that ran in turn on one machine. It\n"
        "is shared, so absolute times vary more than ratios do.\n",
    ]
    bounded = [figure for _, figures in results.values() for figure in figures if figure.bound is not None]
    missed = [figure for figure in bounded if not figure.reached]
    parts.append(f"{len(bounded) - len(missed)} of {len(bounded)} bounds are reached.\n")
    for name, (where, figures) in results.items():
        parts += [f"## {titles[name]}\n", f"`python -m benchmarks {name}`, on {where}.\n"]
        parts += ["| target | what | figure | asked for | against | |", "| --- | --- | --- | --- | --- | --- |"]
        parts += [_row(figure) for figure in figures]
        parts.append("")
        notes = [f"* {figure.what}: {figure.note}" for figure in figures if figure.note]
        parts += [*notes, ""] if notes else []
        parts += [f"![{titles[name]}]({plot})\n" for plot in plots.get(name, [])]
    return "\n".join(parts)


def _row(figure: Figure) -> str:
    asked = "" if figure.bound is None else f"at {figure.at} {_number(figure.bound)} {figure.unit}"
    verdict = {None: "", True: "reached", False: "**not reached**"}[figure.reached]
    value = figure.value
    shown = f"{_number(value.median)} {figure.unit}"
    if value.low != value.high:
        shown += f" ({_number(value.low)} to {_number(value.high)})"
    number = figure.target or ""
    return f"| {number} | {figure.what} | {shown} | {asked} | {figure.limit} | {verdict} |"


def _number(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
