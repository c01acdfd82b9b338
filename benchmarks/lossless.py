"""The lossless study: ``python -m benchmarks.lossless run fashion-mnist``, then ``... report``.

Full data against InfoBatch, against dropping at random, and against training for fewer epochs. All variants of a seed
are trained side by side: an epoch of that which has done the least of its run, so that all of them, short ones too,
begin and end together and their times see the same machine. They start from the same weights. Each finished run is a
line of results/lossless.jsonl, and is not made again.
"""

import json
import math
import multiprocessing
import random
import re
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from benchmarks.lossless_tasks import TASKS, Task
from benchmarks.lossless_variants import ALL, BUDGETS, CONSTANT, PAIRS, STUDY, TABLES, Variant, percent
from benchmarks.report import load
from infobatch_stream import InfoBatchLoader

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "lossless.jsonl"
PAGE = HERE.parent / "docs" / "lossless.md"


@dataclass
class Run:
    """One training run. accuracy: after each epoch, in percent, or at the end alone; trained: samples trained on by the
    end of each epoch; seconds: of training, loading and planning; saved: share of the samples of the full run that was
    not trained on; test_loss: as accuracy; steps: in all, 0 where they were not counted yet."""

    task: str
    variant: str
    seed: int
    device: str
    threads: int
    accuracy: list[float] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    seconds: float = 0.0
    saved: float = 0.0
    test_loss: list[float] = field(default_factory=list)
    steps: int = 0


def train(
    task: Task, name: str, seed: int, folder: Path, device: str, epochs: int, *, curve: bool = True
) -> Iterator[Run]:
    """Train one variant; the run as it stands after each epoch, tested then if there is to be a ``curve``."""
    from streaming import StreamingDataset

    variant = ALL[name]
    batch = variant.batch(task.batch, epochs)
    where = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    run = Run(task.name, name, seed, where, torch.get_num_threads())
    torch.manual_seed(seed)
    model = task.model().to(device)
    optimizer = task.optimizer(model.parameters())
    inputs, labels = task.test_set(folder)
    with InfoBatchLoader(
        StreamingDataset(local=str(folder / "train"), batch_size=batch),
        folder / f"{name} {seed}.zarr",
        batch_size=batch,
        epochs=variant.length(epochs),
        policy=variant.policy,
        constant_steps=variant.constant_steps,
        seed=seed,
        existing="overwrite",
        collate_fn=task.collate,
    ) as loader:
        samples = int(loader.stats["kept"] + loader.stats["pruned"])  # of an epoch
        for _ in range(loader.epochs):
            torch.manual_seed(1000 * seed + loader.epoch)  # of dropout: variants take turns
            start = time.perf_counter()
            losses = train_epoch(task, variant, model, optimizer, loader, device)
            kept = int(loader.stats["kept"])
            run.steps += loader.step
            loader.commit()
            run.seconds += time.perf_counter() - start
            run.loss.append(losses)
            run.trained.append(kept + (run.trained[-1] if run.trained else 0))
            run.saved = 1 - run.trained[-1] / (samples * epochs)
            if curve or loader.epoch == loader.epochs:
                accuracy, loss = _tested(model, inputs, labels, device)
                run.accuracy.append(accuracy)
                run.test_loss.append(loss)
            yield run


def train_epoch(
    task: Task, variant: Variant, model: nn.Module, optimizer: Any, loader: InfoBatchLoader, device: str
) -> float:
    """One epoch; the mean loss as `update` gave it."""
    model.train()
    total = torch.zeros((), device=device)
    rate = task.rate(loader.kept_share if variant.root else 1.0)
    for (inputs, labels), picks in loader:
        for group in optimizer.param_groups:
            group["lr"] = rate * schedule(loader.progress, task.warmup)
        with torch.autocast(device, torch.bfloat16, enabled=task.bfloat16 or device == "cuda"):
            losses = F.cross_entropy(model(inputs.to(device)).float(), labels.to(device), reduction="none")
        loss = loader.update(losses, picks)
        total += loss.detach()
        if not variant.weighted:
            loss = losses[(picks.weight > 0).to(device)].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(total) / max(1, loader.step)


def schedule(progress: float, warmup: float = 0.15) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine to 0."""
    if progress < warmup:
        return (progress + 0.01) / (warmup + 0.01)
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


@torch.no_grad()
def _tested(model: nn.Module, inputs: Tensor, labels: Tensor, device: str) -> tuple[float, float]:
    """(accuracy in percent, mean loss)."""
    model.eval()
    outputs = torch.cat([model(part.to(device)).float().cpu() for part in inputs.split(1000)])
    right = (outputs.argmax(1) == labels).float().mean()
    return 100 * float(right), float(F.cross_entropy(outputs, labels))


def done(results: Path) -> list[Run]:
    """The runs in ``results``."""
    lines = results.read_text().splitlines() if results.exists() else []
    return [Run(**json.loads(line)) for line in lines]


def side_by_side(
    task: str, names: list[str], seed: int, folder: Path, device: str, epochs: int, results: Path, *, curve: bool = True
) -> None:
    """Train ``names``, epoch by epoch in turn; append each run to ``results`` when it is finished."""
    found = {(run.task, run.variant, run.seed) for run in done(results)}
    missing = [name for name in names if (task, name, seed) not in found]
    going = {name: train(TASKS[task], name, seed, folder, device, epochs, curve=curve) for name in missing}
    trained = dict.fromkeys(missing, 0.0)  # share of each run
    last: dict[str, Run] = {}
    chance = random.Random(seed)
    while going:
        name = min(going, key=lambda name: (trained[name], chance.random()))
        try:
            last[name] = next(going[name])
            trained[name] += 1 / ALL[name].length(epochs)
        except StopIteration:
            del going[name]
            with results.open("a") as file:  # one write of one line: several processes append
                file.write(json.dumps(asdict(last[name])) + "\n")
            run = last[name]
            print(f"{task}, seed {seed}: {name}: {run.accuracy[-1]:.2f} %, {run.saved:.1%} saved", flush=True)


def _worker(seed: int, arguments: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    side_by_side(seed=seed, **arguments)


app = typer.Typer(add_completion=False)


@app.command()
def run(
    task: Annotated[str, typer.Argument(help=f"Which: {', '.join(TASKS)}.")],
    source: Annotated[Path, typer.Argument(help="Folder of the idx files, or of the e-mails.")],
    work: Annotated[Path, typer.Option(help="Folder for shards and score stores.")] = Path("lossless"),
    seeds: Annotated[int, typer.Option(help="How many.")] = 5,
    first: Annotated[int, typer.Option(help="The first of them, of the table's own.")] = 0,
    table: Annotated[str, typer.Option(help=f"Whose rows: {', '.join(TABLES)}.")] = STUDY,
    only: Annotated[str, typer.Option(help="Only variants in whose names this expression is found.")] = "",
    processes: Annotated[int, typer.Option(help="Seeds at a time, each on one thread.")] = 2,
    curve: Annotated[bool, typer.Option(help="Test after every epoch, or at the end alone.")] = True,
    tiny: Annotated[bool, typer.Option(help="Few samples and 8 epochs, to see that it works.")] = False,
    results: Annotated[Path | None, typer.Option(help=f"Where runs are added; {RESULTS.name} unless tiny.")] = None,
) -> None:
    """Train what is not in RESULTS yet."""
    chosen = TASKS[task]
    if results is None:
        results = work / "tiny.jsonl" if tiny else RESULTS
    folder = work / f"{task}{'-tiny' if tiny else ''}"
    folder.mkdir(parents=True, exist_ok=True)
    chosen.prepare(source, folder, tiny=tiny)
    arguments = {
        "task": task,
        "names": [name for name in TABLES[table].rows if re.search(only, name)],
        "folder": folder,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "epochs": 8 if tiny else chosen.epochs,
        "results": results,
        "curve": curve,
    }
    first += TABLES[table].first
    # A process for each seed: every StreamingDataset opens the shared memory of all before it in its process.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn, max_tasks_per_child=1) as pool:
        for finished in [pool.submit(_worker, seed, arguments) for seed in range(first, first + seeds)]:
            finished.result()


@app.command()
def report(
    results: Annotated[Path, typer.Option(help="Where runs were added.")] = RESULTS,
    page: Annotated[Path, typer.Option(help="The page whose tables are replaced; plots go beside it.")] = PAGE,
) -> None:
    """Write the tables and plots of PAGE from what is in RESULTS."""
    from benchmarks import lossless_page, step_time

    if "step time" in lossless_page.sections(page) and (timed := HERE / "results" / "step_time.json").exists():
        lossless_page.write(page, "step time", step_time.table(load(timed)[1]))
    runs = done(results)
    for task in TASKS:
        for name, (first, rows) in TABLES.items():
            section = task if name == STUDY else f"{task}, {name}"
            seeds = range(first, first + 100)
            found = [run for run in runs if run.task == task and run.variant in rows and run.seed in seeds]
            if section not in lossless_page.sections(page) or not found:
                continue
            if name == CONSTANT:
                text = f"{lossless_page.steps_table(found, rows)}\n\n{lossless_page.pairs(found, PAIRS)}"
            else:
                text = lossless_page.table(found, rows)
            if name == STUDY:
                picture = page.with_name(f"lossless-{task}.png")
                lossless_page.plot(picture, found, rows, f"{task}: accuracy for the samples it took")
                peers = lossless_page.against_peers(found, map(percent, BUDGETS), ("budget", "budget, root"))
                text = f"{text}\n\n{peers}\n\n![{task}]({picture.name})"
            lossless_page.write(page, section, text)


if __name__ == "__main__":
    app()
