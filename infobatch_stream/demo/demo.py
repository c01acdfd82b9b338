"""The demo: real images, as MDS and as WebDataset shards, trained on in full and with InfoBatch, compared."""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from infobatch_stream._formatting import visible
from infobatch_stream.convert.pipeline import write_shards
from infobatch_stream.convert.readers import read_source
from infobatch_stream.demo.training import SCORE_EDGES, Run, Spec, runs_of, train_all
from infobatch_stream.errors import ConfigError, MissingExtraError
from infobatch_stream.formats.schema import SampleSet

__all__ = ["demo"]


_Images = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""uint8[n, side, side] images, int64[n] labels."""


def demo(
    data: Path | None, *, nproc: int, epochs: int | None, seeds: int, optimizer: str, out: Path, console: Console
) -> None:
    """Train on scikit-learn's digits, or the idx files in ``data``; print what came of it, and write the plot ``out``.

    nproc: processes; more than one are started by torchrun (gloo). epochs: None for 20 on digits, 12 on idx files.
    seeds: how many times every run is repeated. optimizer: "adamw" or "sgd".

    Raises ConfigError for data that cannot be used.
    """
    if out.suffix not in (".png", ".svg", ".pdf") or not out.resolve().parent.is_dir():
        raise ConfigError(f"--out {out}: give the name of a .png, .svg or .pdf file in a folder that exists.")
    train, test = _digits() if data is None else _idx(data)
    images, labels = train
    epochs = epochs or (20 if data is None else 12)
    with tempfile.TemporaryDirectory(prefix="infobatch-demo-") as folder:
        spec = Spec(folder, int(labels.max()) + 1, epochs, 64 if data is None else 128, seeds, optimizer)
        if spec.batch % nproc:
            raise ConfigError(f"--nproc {nproc}: it has to divide the global batch of {spec.batch}.")
        console.print(f"{len(labels):,} real images for training, {len(test[1]):,} for testing; writing shards ...")
        for kind in ("mds", "wds"):
            samples = ({"image": image, "label": int(label)} for image, label in zip(images, labels, strict=True))
            write_shards(samples, Path(folder, kind), kind, shard_bytes=1 << (19 if data is None else 23))
        np.savez(Path(folder, "test.npz"), images=test[0], labels=test[1])
        runs = _train_here(spec, console) if nproc == 1 else _train_with_torchrun(spec, nproc)
    console.print(_table(runs, len(labels), epochs, nproc))
    _plot(runs, out)
    console.print(f"Plot: {visible(str(out))}", markup=False)


def _digits() -> tuple[_Images, _Images]:
    """scikit-learn's bundled digits: 1,797 handwritten digits of 8 x 8, a fifth of them for testing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError.of("scikit-learn", "tools") from error
    found = load_digits()
    images, labels = (found.images * (255 / 16)).astype(np.uint8), found.target.astype(np.int64)
    test, train = np.split(np.random.default_rng(0).permutation(len(images)), [len(images) // 5])
    return (images[train], labels[train]), (images[test], labels[test])


def _idx(data: Path) -> tuple[_Images, _Images]:
    sets = {one.name: one for one in read_source(data)}
    if not {"train", "test"} <= sets.keys():
        raise ConfigError(
            f"{data} has {', '.join(sets) or 'nothing'}; the demo needs idx files of both train and t10k, as "
            "Fashion-MNIST has them."
        )
    return _images_of(sets["train"]), _images_of(sets["test"])


def _images_of(source: SampleSet) -> _Images:
    samples = [source[at] for at in range(len(source))]
    return np.stack([sample["image"] for sample in samples]), np.array([sample["label"] for sample in samples])


def _train_here(spec: Spec, console: Console) -> list[Run]:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        tasks = {
            (run.name, run.seed): progress.add_task(
                f"{run.name}, seed {run.seed}", total=spec.epochs, note="", start=False
            )
            for run in runs_of(spec)
        }

        def report(run: Run, epoch: int, step: int, steps: int) -> None:
            task = tasks[run.name, run.seed]
            progress.start_task(task)
            done = epoch + step / steps
            progress.update(task, completed=done, note=f"epoch {epoch + 1}/{spec.epochs}")
            if done == spec.epochs:
                progress.stop_task(task)

        return train_all(spec, report, lambda run: console.print(run.outcome(), highlight=False, soft_wrap=True))


def _train_with_torchrun(spec: Spec, nproc: int) -> list[Run]:
    file = Path(spec.folder, "spec.json")
    file.write_text(json.dumps(dataclasses.asdict(spec)))
    # -P: what stands in the working directory must not be taken for the installed package.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    command += ["--no-python", sys.executable, "-P", "-m", "infobatch_stream.demo.training", str(file)]
    done = subprocess.run(command, check=False, env={"OMP_NUM_THREADS": "1", **os.environ})
    if done.returncode:
        raise ConfigError(f"training on {nproc} processes failed (exit code {done.returncode}); its output is above.")
    return [Run(**run) for run in json.loads((file.with_name("runs.json")).read_text())]


def _by_name(runs: list[Run]) -> dict[str, list[Run]]:
    return {name: [run for run in runs if run.name == name] for name in dict.fromkeys(run.name for run in runs)}


def _table(runs: list[Run], samples: int, epochs: int, nproc: int) -> Table:
    processes = "" if nproc == 1 else f", {nproc} processes"
    table = Table(title=f"{samples:,} samples, {epochs} epochs{processes}")
    table.add_column("run", no_wrap=True)
    for heading in ("test\naccuracy", "samples\ntrained on", "saved", "seconds"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, repeats in _by_name(runs).items():
        table.add_row(
            name,
            _mean([100 * run.accuracy[-1] for run in repeats], "{:.2f}") + " %",
            f"{statistics.mean(run.trained[-1] for run in repeats):,.0f}",
            f"{statistics.mean(run.saved for run in repeats):.1%}",
            _mean([run.seconds for run in repeats], "{:.1f}"),
        )
    return table


def _mean(values: list[float], form: str) -> str:
    """Mean, and the standard deviation where there are several."""
    text = form.format(statistics.mean(values))
    return f"{text} ± {form.format(statistics.stdev(values))}" if len(values) > 1 else text


def _plot(runs: list[Run], out: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    for name, repeats in _by_name(runs).items():
        trained = np.mean([run.trained for run in repeats], axis=0)
        accuracy = 100 * np.array([run.accuracy for run in repeats])
        (line,) = left.plot(
            trained, accuracy.mean(axis=0), "--" if "all" in name else "-", marker="o", ms=3, label=name, alpha=0.85
        )
        left.fill_between(trained, accuracy.min(axis=0), accuracy.max(axis=0), color=line.get_color(), alpha=0.15)
    worst = 100 * min(run.accuracy[len(run.accuracy) // 3] for run in runs)
    left.set_ylim(max(0.0, worst - 2), min(100.0, 100 * max(max(run.accuracy) for run in runs) + 1))
    left.set(xlabel="samples trained on", ylabel="test accuracy (%)", title="Accuracy for the samples it took")
    left.grid(alpha=0.3)
    left.legend(loc="lower right")
    shown = next(run for run in runs if run.prune)
    counts = np.array(shown.histograms, dtype=float)
    edges = SCORE_EDGES.copy()
    edges[0] = edges[1] / (edges[2] / edges[1])  # scores under the lowest bound are drawn as one more bin
    share = 100 * counts / counts.sum(axis=1, keepdims=True)
    # The first epochs' spike is clipped, so that the later spread can be seen.
    norm = mpl.colors.PowerNorm(0.5, vmin=0, vmax=share[len(share) // 2 :].max())
    image = right.pcolormesh(np.arange(len(counts) + 1) + 0.5, edges, share.T, cmap="viridis", norm=norm)
    right.plot(np.arange(len(counts)) + 1, shown.means, "w.-", label="mean: below it, half are dropped")
    right.set(yscale="log", xlabel="epoch", ylabel="score (last loss)", title=f"Scores by epoch ({shown.name})")
    right.xaxis.get_major_locator().set_params(integer=True)
    right.legend(loc="lower left", facecolor="black", labelcolor="white")
    figure.colorbar(image, label="% of samples", extend="max")
    figure.savefig(out, dpi=130)
    plt.close(figure)
