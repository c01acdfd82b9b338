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
from infobatch_stream import BudgetPruning, FullData, InfoBatchLoader, QuantilePruning, SoftPruning

HERE = Path(__file__).resolve().parent
FULL = "full data"
RESULTS = HERE / "results" / "lossless.jsonl"
PAGE = HERE.parent / "docs" / "lossless.md"
BUDGETS = (0.25, 0.4, 0.5)
SWEPT = 100  # seeds from here on are the sweep's: the runs that chose a default do not judge it


@dataclass(frozen=True)
class Variant:
    """A way to spend less.

    policy: of the loader. epochs: share of the full run's. weighted: by the picks' weights. root: learning rates follow
    the square root of the share that an epoch keeps (Task.rate).
    """

    policy: Any = field(default_factory=FullData)
    epochs: float = 1.0
    weighted: bool = True
    root: bool = False

    def length(self, epochs: int) -> int:
        """Epochs of its run, when that of full data has ``epochs``."""
        return max(1, round(epochs * self.epochs))


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


VARIANTS = {
    FULL: Variant(),
    "InfoBatch, soft": Variant(SoftPruning(0.5)),
    "InfoBatch, quantile": Variant(QuantilePruning((0.20, 0.85), (0.25, 0.5, 1.0))),
    **{f"budget {_percent(b)}": Variant(BudgetPruning(b)) for b in BUDGETS},
    **{f"budget, root {_percent(b)}": Variant(BudgetPruning(b), root=True) for b in BUDGETS[1:]},
    **{f"at random {_percent(b)}": Variant(BudgetPruning(b, power=0.0)) for b in BUDGETS[1:]},
    **{
        f"at random, not rescaled {_percent(b)}": Variant(BudgetPruning(b, power=0.0), weighted=False)
        for b in BUDGETS[1:]
    },
    **{f"fewer epochs {_percent(b)}": Variant(epochs=1 - b) for b in BUDGETS},
}
SWEEP = {  # of BudgetPruning's own parameters
    f"budget 50 %, power {power:g}, floor {floor:g}": Variant(BudgetPruning(0.5, power, floor))
    for power in (0.25, 0.5, 1.0)
    for floor in (0.05, 0.15, 0.3)
}


@dataclass
class Run:
    """One training run. accuracy: after each epoch, in percent; trained: samples trained on by then; seconds: of
    training, loading and planning; saved: share of the samples of the full run that was not trained on."""

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


def train(task: Task, name: str, seed: int, folder: Path, device: str, epochs: int) -> Iterator[Run]:
    """Train one variant; the run as it stands after each epoch."""
    from streaming import StreamingDataset

    variant = (VARIANTS | SWEEP)[name]
    where = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    run = Run(task.name, name, seed, where, torch.get_num_threads())
    torch.manual_seed(seed)
    model = task.model().to(device)
    optimizer = task.optimizer(model.parameters())
    inputs, labels = task.test_set(folder)
    with InfoBatchLoader(
        StreamingDataset(local=str(folder / "train"), batch_size=task.batch),
        folder / f"{name} {seed}.zarr",
        batch_size=task.batch,
        epochs=variant.length(epochs),
        policy=variant.policy,
        seed=seed,
        existing="overwrite",
        collate_fn=task.collate,
    ) as loader:
        samples = int(loader.stats["kept"])  # of an epoch before there are scores
        for _ in range(loader.epochs):
            torch.manual_seed(1000 * seed + loader.epoch)  # of dropout: variants take turns
            start = time.perf_counter()
            losses = train_epoch(task, variant, model, optimizer, loader, device)
            kept = int(loader.stats["kept"])
            loader.commit()
            run.seconds += time.perf_counter() - start
            run.loss.append(losses)
            run.trained.append(kept + (run.trained[-1] if run.trained else 0))
            run.saved = 1 - run.trained[-1] / (samples * epochs)
            run.accuracy.append(_accuracy(model, inputs, labels, device))
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
            group["lr"] = rate * schedule(loader.progress)
        with torch.autocast(device, torch.bfloat16):
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
def _accuracy(model: nn.Module, inputs: Tensor, labels: Tensor, device: str) -> float:
    model.eval()
    found = torch.cat([model(part.to(device)).argmax(1).cpu() for part in inputs.split(1000)])
    return 100 * float((found == labels).float().mean())


def done(results: Path) -> list[Run]:
    """The runs in ``results``."""
    lines = results.read_text().splitlines() if results.exists() else []
    return [Run(**json.loads(line)) for line in lines]


def side_by_side(task: str, names: list[str], seed: int, folder: Path, device: str, epochs: int, results: Path) -> None:
    """Train ``names``, epoch by epoch in turn; append each run to ``results`` when it is finished."""
    found = {(run.task, run.variant, run.seed) for run in done(results)}
    missing = [name for name in names if (task, name, seed) not in found]
    going = {name: train(TASKS[task], name, seed, folder, device, epochs) for name in missing}
    trained = dict.fromkeys(missing, 0.0)  # share of each run
    last: dict[str, Run] = {}
    chance = random.Random(seed)
    while going:
        name = min(going, key=lambda name: (trained[name], chance.random()))
        try:
            last[name] = next(going[name])
            trained[name] += 1 / (VARIANTS | SWEEP)[name].length(epochs)
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
    first: Annotated[int, typer.Option(help="The first of them.")] = 0,
    sweep: Annotated[bool, typer.Option(help="BudgetPruning's parameters instead of the study.")] = False,
    only: Annotated[str, typer.Option(help="Only variants in whose names this expression is found.")] = "",
    processes: Annotated[int, typer.Option(help="Seeds at a time, each on one thread.")] = 2,
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
        "names": [name for name in ((FULL, *SWEEP) if sweep else VARIANTS) if re.search(only, name)],
        "folder": folder,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "epochs": 8 if tiny else chosen.epochs,
        "results": results,
    }
    first += SWEPT if sweep else 0
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
    from benchmarks import lossless_page

    runs = done(results)
    for task in lossless_page.sections(page) & TASKS.keys():
        if found := [run for run in runs if run.task == task and run.variant in VARIANTS and run.seed < SWEPT]:
            picture = page.with_name(f"lossless-{task}.png")
            lossless_page.plot(picture, found, VARIANTS, f"{task}: accuracy for the samples it took")
            peers = lossless_page.against_peers(found, map(_percent, BUDGETS), ("budget", "budget, root"))
            text = f"{lossless_page.table(found, VARIANTS)}\n\n{peers}\n\n![{task}]({picture.name})"
            lossless_page.write(page, task, text)
        swept = [run for run in runs if run.task == task and run.seed >= SWEPT]
        if f"{task}, parameters" in lossless_page.sections(page):
            lossless_page.write(page, f"{task}, parameters", lossless_page.table(swept, (FULL, *SWEEP)))


if __name__ == "__main__":
    app()
