"""The lossless study: ``python -m benchmarks.lossless run cnn-cpu FOLDER``, then ``... report``.

Full data against InfoBatch, against dropping at random, and against training for fewer epochs. All variants of a seed
start from the same weights. Each finished run is a line of results/lossless.jsonl, and is not made again.
"""

import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.lossless import families
from benchmarks.lossless import page as pages
from benchmarks.lossless.runs import DOCS, RESULTS, read
from benchmarks.lossless.tables import STUDY, TABLES
from benchmarks.lossless.tasks import TASKS
from benchmarks.lossless.training import on_one_thread

app = typer.Typer(add_completion=False)


@app.command()
def run(
    task: Annotated[str, typer.Argument(help=f"Which: {', '.join(TASKS)}.")],
    source: Annotated[Path, typer.Argument(help="Folder of the idx files, of the e-mails, or of Python packages.")],
    work: Annotated[Path, typer.Option(help="Folder for shards and score stores.")] = Path("lossless"),
    seeds: Annotated[int, typer.Option(help="How many.")] = 5,
    first: Annotated[int, typer.Option(help="The first of them, of the table's own.")] = 0,
    table: Annotated[str, typer.Option(help=f"Whose rows: {', '.join(TABLES)}.")] = STUDY,
    only: Annotated[str, typer.Option(help="Only variants in whose names this expression is found.")] = "",
    processes: Annotated[int, typer.Option(help="Seeds at a time, each on one thread.")] = 2,
    curve: Annotated[bool, typer.Option(help="Test after every epoch, or at the end alone.")] = False,
    peak: Annotated[float | None, typer.Option(help="Another learning rate than the task's, for a trial.")] = None,
    tiny: Annotated[bool, typer.Option(help="Few samples and 8 epochs, to see that it works.")] = False,
    results: Annotated[Path | None, typer.Option(help=f"Where runs are added; {RESULTS.name} unless tiny.")] = None,
) -> None:
    """Train what is not in RESULTS yet."""
    chosen = TASKS[task] if peak is None else replace(TASKS[task], peak=peak)
    if results is None:
        results = work / "tiny.jsonl" if tiny else RESULTS
    folder = work / f"{task}{'-tiny' if tiny else ''}"
    folder.mkdir(parents=True, exist_ok=True)
    chosen.data.prepare(source, folder, chosen.tiny if tiny else chosen.samples, chosen.tiny // 2 if tiny else None)
    rows = TABLES[table]
    arguments = {
        "task": chosen,
        "names": [name for name in rows.rows if re.search(only, name)],
        "folder": folder,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "epochs": 8 if tiny else rows.epochs or chosen.epochs,
        "results": results,
        "curve": curve,
    }
    first += rows.first
    # A process for each seed: every StreamingDataset opens the shared memory of all before it in its process.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn, max_tasks_per_child=1) as pool:
        for finished in [pool.submit(on_one_thread, seed, arguments) for seed in range(first, first + seeds)]:
            finished.result()


@app.command()
def pack(
    folder: Annotated[Path, typer.Argument(help="Where wheels and data go.")],
    images: Annotated[Path, typer.Option(help="Folder of the idx files of Fashion-MNIST.")],
    packages: Annotated[Path, typer.Option(help="Folder of Python packages, such as site-packages.")],
) -> None:
    """Prepare what `benchmarks.lossless.gpu` needs on a machine with a GPU and without a network."""
    from benchmarks.lossless import gpu

    sources = {name: packages if TASKS[name].by_loss else images for name in gpu.SIZED_FOR_GPUS}
    print(f"{folder}: {gpu.pack(folder, sources) >> 20} MiB")


@app.command()
def report(
    results: Annotated[Path, typer.Option(help="Where runs were added.")] = RESULTS,
    folder: Annotated[Path, typer.Option(help="Of the pages whose tables are replaced; plots go there too.")] = DOCS,
) -> None:
    """Write the tables and plots of lossless.md, and of does-it-pay.md if it is there, from what is in RESULTS."""
    runs = read(results)
    pages.report(runs, folder / "lossless.md")
    if (page := folder / "does-it-pay.md").exists():
        families.report(runs, page)


if __name__ == "__main__":
    app()
