"""``python -m benchmarks [NAME ...]``: measure, and write RESULTS.md with plots."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.report import load, page, save

# Each is a module with TITLE, run(tiny) -> list[Figure], and maybe plot(file, figures), page(figures) -> Markdown.
NAMES = [
    "planning",
    "order",
    "mds",
    "wds",
    "cold",
    "remote",
    "map_style",
    "jpeg",
    "decoding",
    "update",
    "commit",
    "training",
    "step_time",
    "convert",
    "memory",
    "scale",
]
HERE = Path(__file__).resolve().parent


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"Which: {', '.join(NAMES)}; all without one.")] = None,
    tiny: Annotated[bool, typer.Option(help="Once, at sizes that say nothing: to see that it works.")] = False,
    out: Annotated[Path, typer.Option(help="Where RESULTS.md and results/ are.")] = HERE,
    here: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Measure against peers and limits. Results of benchmarks that are not named stay as they are in OUT/results."""
    if unknown := set(names or ()) - set(NAMES):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: choose of {', '.join(NAMES)}")
    if here:
        for name in names or ():
            _measure(name, tiny, out)
        return
    for name in names or NAMES:
        # Each in a process of its own: what one imports and caches is not another's.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "benchmarks", name, "--here", "--out", str(out), *(["--tiny"] if tiny else [])]
        subprocess.run(command, check=True, cwd=HERE.parent, env=environment)
    write_page(out)


def _measure(name: str, tiny: bool, out: Path) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    figures = module.run(tiny)
    save(out / "results" / f"{name}.json", figures)
    if hasattr(module, "plot"):
        module.plot(out / "results" / f"{name}.png", figures)
    if hasattr(module, "page"):
        folder = HERE.parent / "docs" if out == HERE else out
        (folder / f"{name}.md").write_text(module.page(figures))
    for figure in figures:
        print(f"{name}: {figure.what}: {figure.value.median:.4g} {figure.unit}", flush=True)


def write_page(out: Path) -> None:
    """Make OUT/RESULTS.md of what is in OUT/results."""
    found = [name for name in NAMES if (out / "results" / f"{name}.json").exists()]
    results = {name: load(out / "results" / f"{name}.json") for name in found}
    titles = {name: importlib.import_module(f"benchmarks.{name}").TITLE for name in found}
    plots = {name: [f"results/{name}.png"] for name in found if (out / "results" / f"{name}.png").exists()}
    (out / "RESULTS.md").write_text(page(results, titles, plots))


if __name__ == "__main__":
    typer.run(main)
