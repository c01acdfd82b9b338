"""How good the choice of a policy is, by the gradients themselves: ``python -m benchmarks.effective fashion-mnist``.

A run with BudgetPruning is stopped every few epochs. Of some thousand samples the gradient is computed for each alone,
and with its norm g, and the score that the sample has by then in the store (of the epoch it was last trained on), the
variance that a rule with keep probabilities p adds to the estimate of the sum: sum(g^2 (1/p - 1)). The effective share
sum(g^2) / sum(g^2 / p) is that of a choice at random with as much variance. So 1 is as good as all data, and the share
that is kept is no better than chance.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks.lossless import page as pages
from benchmarks.lossless.runs import DOCS
from benchmarks.lossless.tasks import TASKS, Task
from benchmarks.lossless.training import train_epoch
from benchmarks.lossless.variants import Variant
from infobatch_stream import BudgetPruning, InfoBatchLoader, ScoreStore, SoftPruning
from infobatch_stream.policies.base import Policy, annealing_epoch
from infobatch_stream.policies.budget import ProportionalPruning
from infobatch_stream.score_stats import Summary

POWERS, FLOORS, SHARES = (0.25, 0.5, 0.75, 1.0, 1.5), (0.02, 0.05, 0.1, 0.15, 0.2, 0.3), (0.5, 0.625)
SAMPLES, EVERY = 4000, 3  # whose gradients are computed; epochs from one time to the next


def norms(model: nn.Module, inputs: Tensor, labels: Tensor) -> NDArray[np.float64]:
    """float64[n]: the norm of the gradient of each sample's loss, BatchNorm by its running means."""
    values = {name: value.detach() for name, value in model.named_parameters()}
    others = dict(model.named_buffers())

    def loss(values: dict[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, (values, others), (one[None],)), label[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0))
    was_training = model.training
    model.eval()
    found = []
    for some, theirs in zip(inputs.split(200), labels.split(200), strict=True):
        gradients = each(values, some, theirs)
        found.append(sum(part.flatten(1).double().square().sum(1) for part in gradients.values()).sqrt())
    model.train(was_training)
    return torch.cat(found).numpy()


def effective(policy: Policy, scores: NDArray[np.float32], sizes: NDArray[np.float64]) -> tuple[float, float]:
    """(share skipped, effective share) with ``scores``, float32[n], and gradients of these ``sizes``, float64[n]."""
    chance = policy.rule(Summary(scores))(scores)
    return 1 - float(chance.mean()), float((sizes**2).sum() / (sizes**2 / chance).sum())


def measure(task: Task, folder: Path, seed: int) -> list[tuple[NDArray[np.float32], NDArray[np.float64]]]:
    """Scores and norms of the same samples, every few epochs of a run."""
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=str(folder / "train"))
    chosen = np.random.default_rng(0).permutation(dataset.num_samples)[:SAMPLES]
    inputs, labels = task.data.plain([dataset[int(index)] for index in chosen])
    torch.manual_seed(seed)
    model = task.model()
    optimizer = task.optimizer(model.parameters())
    variant, store = Variant(BudgetPruning(0.5)), folder / f"effective {seed}.zarr"
    found = []
    with InfoBatchLoader(
        dataset,
        store,
        batch_size=task.batch,
        epochs=task.epochs,
        policy=variant.policy,
        seed=seed,
        existing="overwrite",
        collate_fn=task.data.collate,
    ) as loader:
        for epoch in range(annealing_epoch(0.875, task.epochs)):
            if epoch % EVERY == 1:
                found.append((ScoreStore.open(store, "r").scores[chosen], norms(model, inputs, labels)))
            train_epoch(task, variant, model, optimizer, loader, "cpu")
            loader.commit()
    return found


def tables(found: list[tuple[NDArray[np.float32], NDArray[np.float64]]]) -> str:
    """Means over the epochs: of each share skipped a table of powers and floors, then soft pruning. Markdown."""

    def mean(policy: Policy) -> tuple[float, float]:
        skipped, good = np.mean([effective(policy, scores, sizes) for scores, sizes in found], axis=0)
        return float(skipped), float(good)

    lines = []
    for share in SHARES:
        floors = [floor for floor in FLOORS if floor < 1 - share]
        lines += [
            f"| {100 * share:g} % skipped | {' | '.join(f'floor {floor:g}' for floor in floors)} |",
            f"| --- | {' | '.join(['---'] * len(floors))} |",
            f"| at random | {' | '.join([f'{100 * (1 - share):.1f}'] * len(floors))} |",
        ]
        for power in POWERS:
            cells = [f"{100 * mean(ProportionalPruning(share, power, floor))[1]:.1f}" for floor in floors]
            lines.append(f"| power {power:g} | {' | '.join(cells)} |")
        lines.append("")
    lines += ["| soft pruning, ratio | skipped | effective |", "| --- | --- | --- |"]
    for ratio in (0.5, 0.7, 0.9):
        skipped, good = mean(SoftPruning(ratio))
        lines.append(f"| {ratio:g} | {100 * skipped:.1f} % | {100 * good:.1f} |")
    return "\n".join(lines)


def main(
    task: Annotated[str, typer.Argument(help=f"Which: {', '.join(TASKS)}.")],
    source: Annotated[Path, typer.Argument(help="Folder of the idx files, or of the e-mails.")],
    work: Annotated[Path, typer.Option(help="Folder for shards and score stores.")] = Path("lossless"),
    seed: Annotated[int, typer.Option(help="Of the run.")] = 100,
    page: Annotated[Path, typer.Option(help="The page whose tables are replaced.")] = DOCS / "lossless.md",
) -> None:
    """Write the effective shares of many rules into PAGE."""
    folder = work / task
    folder.mkdir(parents=True, exist_ok=True)
    TASKS[task].data.prepare(source, folder, TASKS[task].samples)
    pages.write(page, f"{task}, effective", tables(measure(TASKS[task], folder, seed)))


if __name__ == "__main__":
    typer.run(main)
