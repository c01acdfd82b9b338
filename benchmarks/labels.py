"""How well samples that stay hard tell wrong labels: ``python -m benchmarks.labels FOLDER``.

Fashion-MNIST with 5 % of the training labels replaced by another, drawn at random. A small CNN learns from it, with the
losses of all epochs kept; the samples are ranked, and the first so many are taken for wrong.
"""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from numpy.typing import NDArray

from benchmarks.lossless import page as pages
from benchmarks.lossless.tasks import TASKS
from benchmarks.lossless.training import schedule
from infobatch_stream import BudgetPruning, FullData, InfoBatchLoader, SoftPruning
from infobatch_stream.convert import write_shards
from infobatch_stream.report.export import staying_hard
from infobatch_stream.report.snapshot import Snapshot

PAGE = Path(__file__).resolve().parent.parent / "docs" / "seeing.md"
TASK = TASKS["fashion-mnist"]
WRONG, EPOCHS, CLASSES = 0.05, 12, 10
POLICIES = (FullData(), SoftPruning(), BudgetPruning(0.4))
TAKEN = (0.025, 0.05, 0.1)  # shares of the samples


def flip(samples: list[dict[str, Any]], seed: int) -> None:
    """Give a share WRONG of ``samples`` another label, and each a field that says whether it has."""
    random = np.random.default_rng(seed)
    shifts = np.zeros(len(samples), dtype=np.int64)
    shifts[: round(WRONG * len(samples))] = random.integers(1, CLASSES, round(WRONG * len(samples)))
    for sample, shift in zip(samples, random.permutation(shifts).tolist(), strict=True):
        sample["label"] = (sample["label"] + shift) % CLASSES
        sample["wrong"] = int(shift > 0)


def train(dataset: Any, store: Path, policy: Any, seed: int) -> Snapshot:
    """A run; what is in its store at the end."""
    torch.manual_seed(seed)
    model = TASK.model()
    optimizer = TASK.optimizer(model.parameters())
    with InfoBatchLoader(
        dataset,
        store,
        batch_size=TASK.batch,
        epochs=EPOCHS,
        policy=policy,
        seed=seed,
        history=True,
        existing="overwrite",
        collate_fn=TASK.data.collate,
    ) as loader:
        for _ in range(EPOCHS):
            for (inputs, labels), picks in loader:
                for group in optimizer.param_groups:
                    group["lr"] = TASK.peak * schedule(loader.progress)
                loss = loader.update(F.cross_entropy(model(inputs), labels, reduction="none"), picks)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return Snapshot.take(store)


def found(values: NDArray[np.float64], wrong: NDArray[np.bool_], share: float) -> tuple[float, float]:
    """(precision, recall) of the ``share`` of the samples with the highest ``values``."""
    taken = np.argsort(-values, kind="stable")[: round(share * values.size)]
    right = int(wrong[taken].sum())
    return right / taken.size, right / int(wrong.sum())


def main(
    source: Annotated[Path, typer.Argument(help="Folder of the idx files of Fashion-MNIST.")],
    work: Annotated[Path, typer.Option(help="Folder for shards and score stores.")] = Path("labels"),
    seed: Annotated[int, typer.Option(help="Of the labels and of the runs.")] = 0,
    page: Annotated[Path, typer.Option(help="The page whose table is replaced.")] = PAGE,
) -> None:
    """Write precision and recall into PAGE."""
    from streaming import StreamingDataset

    if not (work / "train").exists():
        samples, _ = TASK.data.read(source)
        flip(samples, seed)
        write_shards(iter(samples), work / "train", "mds", shard_bytes=1 << 23)
    dataset = StreamingDataset(local=str(work / "train"), batch_size=TASK.batch)
    wrong = np.array([dataset[index]["wrong"] for index in range(dataset.num_samples)], dtype=np.bool_)
    heads = [f"first {100 * share:g} %" for share in TAKEN]
    lines = [f"| run | ranked by | {' | '.join(heads)} |", f"| --- | --- | {' | '.join(['---'] * len(heads))} |"]
    for policy in POLICIES:
        snapshot = train(dataset, work / f"{type(policy).__name__}.zarr", policy, seed)
        ways = {"mean loss": staying_hard(snapshot), "last loss": snapshot.scores.astype(np.float64)}
        for name, values in ways.items():
            pairs = [found(values, wrong, share) for share in TAKEN]
            cells = [f"{100 * precision:.1f} % / {100 * recall:.1f} %" for precision, recall in pairs]
            lines.append(f"| {policy} | {name} | {' | '.join(cells)} |")
    pages.write(page, "labels", "\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
