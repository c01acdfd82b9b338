"""What a killed run may leave, and how it has to go on: as a run that was never killed."""

from dataclasses import dataclass

import numpy as np
import torch
import zarr

from infobatch_stream import ScoreStore
from infobatch_stream.store.header import read_header
from infobatch_stream.store.history import Epoch, training
from infobatch_stream.store.history import epochs as epochs_of
from support.ddp.data import loss_of
from support.ddp.kill_plans import EPOCHS, N


class Reference:
    """A run that was never killed, from its logs. steps: by rank. kept, after: samples and scores by epoch."""

    def __init__(self, run):
        self.steps = [run.log(0, rank) for rank in range(run.world)]
        self.kept, self.after = [], [np.full(N, np.nan, np.float32)]
        for epoch in range(EPOCHS):
            rows = [(index, weight) for steps in self.steps for at, _, index, weight, _ in steps if at == epoch]
            kept = np.array([i for index, weight in rows for i, w in zip(index, weight, strict=True) if w > 0])
            assert len(set(kept.tolist())) == kept.size
            self.kept.append(kept)
            self.after.append(self.after[-1].copy())
            self.after[-1][kept] = losses(kept, epoch)
        assert 0 < min(map(len, self.kept)) < N

    def place(self, epoch, step):
        """How many steps a run makes before it is there."""
        return sum((at, number) < (epoch, step) for at, number, *_ in self.steps[0])


def losses(index, epoch):
    return loss_of(torch.as_tensor(np.asarray(index, np.int64)), epoch).numpy()


@dataclass
class Found:
    """What is on the disk between two parts of a run. epochs: of the stores, None without. checkpoint: its place."""

    epochs: list[int | None]
    checkpoint: tuple[int, int] | None


def look(run, reference, part, earlier):
    """In a child: open all that is there, and compare. ``earlier``: Found before the part."""
    starts = {e for e in earlier.epochs if e is not None} or {0}
    if earlier.checkpoint:
        starts |= {earlier.checkpoint[0], earlier.checkpoint[0] - (earlier.checkpoint[1] == 0)}
    trained = max((step[0] for rank in range(run.world) for step in run.log(part, rank)), default=None)
    allowed = starts if trained is None else {trained, trained + 1}
    epochs = list(earlier.epochs)
    for node, path in enumerate(run.stores):
        had = trained is not None or earlier.epochs[node] is not None
        epochs[node] = _whole(path, reference, allowed) if had or path.exists() else None
        if epochs[node] is not None:
            assert {entry.name for entry in path.iterdir()} - {"history"} == {"pending", "scores", "zarr.json"}
            epochs_of(path)  # can be read
        if trained is not None and epochs[node] == trained:
            _recorded(run, reference, part, node, trained)
    return Found(epochs, _checkpoint(run, reference))


def _whole(path, reference, allowed):
    if path.exists():  # not between two renames
        header = read_header(path)
        seen = [
            np.array(ScoreStore.open(path, mode="r").scores),
            zarr.open_group(path, mode="r", zarr_format=3)["scores"][:],
        ]
        # A commit that was begun shows through, score by score.
        both = [reference.after[header.epoch + k] for k in range(1 + (header.state == "apply"))]
        for scores in seen:
            assert np.any([same(scores, right) for right in both], axis=0).all(), f"{header}, {path.name}: {scores}"
    store = ScoreStore.open(path)
    assert store.epoch in allowed, f"{path.name} is at epoch {store.epoch}, not in {allowed}"
    assert same(store.scores, reference.after[store.epoch]).all(), f"{path.name} at {store.epoch}: {store.scores}"
    pending = np.flatnonzero(~np.isnan(store.pending))
    if pending.size:
        assert np.isin(pending, reference.kept[store.epoch]).all(), f"{path.name}: losses of {pending}"
        assert (store.pending[pending] == losses(pending, store.epoch)).all(), f"{path.name}: {store.pending}"
    return store.epoch


def _recorded(run, reference, part, node, epoch):
    """Whatever ranks of a node had recorded is there; the last line of a log may not have come so far."""
    pending = ScoreStore.open(run.stores[node]).pending
    for rank in range(node * run.local, (node + 1) * run.local):
        for _, _, index, weight, _ in [step for step in run.log(part, rank)[:-1] if step[0] == epoch]:
            lost = [i for i, w in zip(index, weight, strict=True) if w > 0 and np.isnan(pending[i])]
            assert not lost, f"losses of {lost} are lost"


def _checkpoint(run, reference):
    if not run.checkpoint.exists():
        return None
    progress = torch.load(run.checkpoint, weights_only=True)["progress"]
    return (progress["epoch"] + 1, 0) if progress["done"] else (progress["epoch"], progress["step"])


def same(scores, right):
    return scores.view(np.uint32) == right.view(np.uint32)


def check_history(path, reference, *, whole):
    """At the end of a run each epoch is described as it was: all of them, or those that this node saw committed.

    A node whose store is replaced by a copy of another's has the scores of that, and a history of its own.
    """
    rows = epochs_of(path)
    numbers = [row.number for row in rows]
    assert not whole or numbers == list(range(EPOCHS)), f"{path.name}: rows of {numbers}"
    for row in rows:
        right = Epoch(row.number, N, len(reference.kept[row.number]), 0, 0.0, 0.0).describing(
            reference.after[row.number + 1]
        )
        assert (row.entries, row.kept, row.mean) == (N, right.kept, right.mean), f"{path.name}: {row}"
        assert row.histogram.tolist() == right.histogram.tolist(), f"{path.name}: {row}"
    counted = training(path, EPOCHS)
    if counted is None and not whole:
        return
    for epoch in range(counted.since, EPOCHS):
        assert (counted.last[reference.kept[epoch]] >= epoch).all(), f"{path.name}: {counted}"
    times = sum(np.bincount(reference.kept[epoch], minlength=N) for epoch in range(counted.since, EPOCHS))
    assert counted.times.tolist() == times.tolist(), f"{path.name}: {counted}"


def check_steps(run, reference, part, start, *, whole):
    """The steps of a part are those of the reference from ``start`` on; to the end, if it came there."""
    first = reference.place(*start)
    for rank in range(run.world):
        steps = run.log(part, rank)
        right = reference.steps[rank][first:]
        assert steps == (right if whole else right[: len(steps)]), f"rank {rank} made other steps in part {part}"
