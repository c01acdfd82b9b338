"""A run of the lossless study: a task trained as a variant says, through the loader."""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.lossless.runs import Run, append, read
from benchmarks.lossless.tasks import Task
from benchmarks.lossless.variants import ALL, Variant
from benchmarks.measure import busy_seconds
from infobatch_stream import InfoBatchLoader, Picks

__all__ = ["on_one_thread", "schedule", "train", "train_epoch", "train_missing"]


def train(task: Task, name: str, seed: int, folder: Path, device: str, epochs: int, *, curve: bool = False) -> Run:
    """Train one variant; it is tested after each epoch if there is to be a ``curve``, else at the end."""
    variant = ALL[name]
    length, batch = variant.length(epochs), variant.batch(task.batch)
    where = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    run = Run(task.name, name, seed, where, torch.get_num_threads())
    torch.manual_seed(seed)
    model = task.model().to(device)
    optimizer = task.optimizer(model.parameters())
    inputs, labels = task.data.test_set(folder)
    with InfoBatchLoader(
        task.data.open(folder, batch),
        folder / f"{task.name} {name} {seed}.zarr",
        batch_size=batch,
        epochs=math.ceil(length),
        policy=variant.policy,
        constant_steps=variant.constant_steps,
        seed=seed,
        existing="overwrite",
        collate_fn=task.data.collate,
    ) as loader:
        scores = torch.full((loader.num_samples,), math.nan)
        for epoch in range(loader.epochs):
            torch.manual_seed(1000 * seed + epoch)  # of dropout and augmentation
            start = busy_seconds(device)
            mean, steps, trained = train_epoch(task, variant, model, optimizer, loader, device, length, scores)
            loader.commit()
            run.seconds += busy_seconds(device) - start
            run.steps += steps
            run.loss.append(mean)
            run.trained.append(trained + (run.trained[-1] if run.trained else 0))
            run.elapsed.append(run.seconds)
            if curve or epoch + 1 == loader.epochs:
                accuracy, loss = _tested(model, inputs, labels, device)
                run.accuracy.append(accuracy)
                run.test_loss.append(loss)
        run.saved = 1 - run.trained[-1] / (loader.num_samples * epochs)
    return run


def train_epoch(
    task: Task,
    variant: Variant,
    model: nn.Module,
    optimizer: Any,
    loader: InfoBatchLoader,
    device: str,
    length: float | None = None,
    scores: Tensor | None = None,
) -> tuple[float, int, int]:
    """One epoch, or what is left of a run of ``length`` epochs: (mean loss as `update` gave it, steps, samples).

    scores: float32[n], of the variant's own where it smooths them; NaN where there is none.
    """
    model.train()
    total = torch.zeros((), device=device)
    rate = task.rate(loader.kept_share if variant.root else 1.0)
    scale = loader.epochs / (length or loader.epochs)  # of progress
    steps = trained = 0
    for (inputs, labels), picks in loader:
        progress = loader.progress * scale
        if progress >= 1 - 1e-9:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate * schedule(progress, task.warmup)
        with torch.autocast(device, torch.bfloat16, enabled=task.bfloat16 or device == "cuda"):
            outputs = model(inputs.to(device, non_blocking=True))
        losses = _losses(outputs, labels.to(device, non_blocking=True))
        score = _smoothed(losses, picks, scores, variant.smooth) if variant.smooth and scores is not None else None
        loss = loader.update(losses, picks, score=score)
        total += loss.detach()
        if not variant.weighted:
            loss = losses[(picks.weight > 0).to(device)].mean()
        optimizer.zero_grad()
        loss.backward()
        if task.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), task.clip)
        optimizer.step()
        steps += 1
        trained += int((picks.weight > 0).sum())
    return float(total) / max(1, steps), steps, trained


def _losses(outputs: Tensor, labels: Tensor) -> Tensor:
    """float32[b]: of each sample; of a text the mean over what is to be told of it."""
    each = F.cross_entropy(outputs.float().flatten(0, -2), labels.flatten(), reduction="none")
    return each.unflatten(0, labels.shape).flatten(1).mean(1) if labels.ndim > 1 else each


def _smoothed(losses: Tensor, picks: Picks, scores: Tensor, smooth: float) -> Tensor:
    """The exponential mean of each sample's losses, kept in ``scores``."""
    before, now = scores[picks.index], losses.detach().float().cpu()
    scores[picks.index] = torch.where(before.isnan(), now, smooth * before + (1 - smooth) * now)
    return scores[picks.index]


def schedule(progress: float, warmup: float = 0.15) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine to 0."""
    if progress < warmup:
        return (progress + 0.01) / (warmup + 0.01)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))


@torch.no_grad()
def _tested(model: nn.Module, inputs: Tensor, labels: Tensor, device: str) -> tuple[float, float]:
    """(accuracy in percent, mean loss)."""
    model.eval()
    right = lost = 0.0
    for some, theirs in zip(inputs.split(500), labels.split(500), strict=True):
        outputs = model(some.to(device)).float()
        right += float((outputs.argmax(-1) == theirs.to(device)).sum())
        lost += float(F.cross_entropy(outputs.flatten(0, -2), theirs.to(device).flatten(), reduction="sum"))
    return 100 * right / labels.numel(), lost / labels.numel()


def on_one_thread(seed: int, arguments: dict[str, Any]) -> None:
    """`train_missing` in a process of its own."""
    torch.set_num_threads(1)
    train_missing(seed=seed, **arguments)


def train_missing(
    task: Task, names: list[str], seed: int, folder: Path, device: str, epochs: int, results: Path, *, curve: bool
) -> None:
    """Train those of ``names`` that are not in ``results`` with this seed, and append each when it is finished."""
    found = {(run.task, run.variant, run.seed) for run in read(results)}
    for name in names:
        if (task.name, name, seed) in found:
            continue
        run = train(task, name, seed, folder, device, epochs, curve=curve)
        append(results, run)
        print(
            f"{task.name}, seed {seed}: {name}: {run.accuracy[-1]:.2f} %, loss {run.test_loss[-1]:.4f}, "
            f"{run.saved:.1%} saved, {run.seconds:.0f} s",
            flush=True,
        )
