"""What a run of a billion samples and more will take: constants measured here, predictions from them, two checked."""

import io
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from benchmarks.commit import exchanged
from benchmarks.measure import Spread, in_child
from benchmarks.planning import SHARD, growth, once, scores_file
from benchmarks.report import Figure
from infobatch_stream import InfoBatchLoader, ScoreStore

__all__ = ["TITLE", "page", "run"]

TITLE = "Scale"
PLAN, MEMORY, COMMIT, EXCHANGE, STATE = "planning", "plan's memory", "commit", "exchange and commit", "checkpoint"
NAMES = (PLAN, MEMORY, COMMIT, EXCHANGE, STATE)
CHECK = ", of what was predicted"
_RATE = 2711  # images per second of an A100: ResNet-50 in mixed precision, NVIDIA/DeepLearningExamples
_GPUS = 8  # of a node
_LINK = 12.5e9  # bytes per second of 100 Gbit/s


class Numbers(Dataset[int]):
    """0..count-1."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> int:
        return index


def committing(folder: Path, count: int, rounds: int) -> list[float]:
    """Nanoseconds of processor time per sample of commits on one node. Runs in a child."""
    store = ScoreStore.create(folder / "scores.zarr", count)
    losses = np.random.default_rng(0).random(count, dtype=np.float32)
    found = []
    for _ in range(1 + rounds):
        store.put_pending(0, losses)
        start = time.process_time()
        store.commit()
        found.append((time.process_time() - start) / count * 1e9)
    return found[1:]


def saved_bytes(folder: Path, count: int) -> float:
    """Bytes per sample of a saved state. Runs in a child."""
    loader = InfoBatchLoader(Numbers(count), folder / "state.zarr", batch_size=256, epochs=1)
    file = io.BytesIO()
    torch.save(loader.state_dict(), file)
    return file.tell() / count


def sent(nodes: int) -> float:
    """Bytes per sample that each of ``nodes`` sends at a commit in which all were seen.

    What it has seen of the others' pieces, a bit for each entry of these, and then the merged pieces in a ring.
    """
    others = (nodes - 1) / nodes
    return others * (4 / nodes + 1 / 8) + others * 4


def run(tiny: bool) -> list[Figure]:
    """Measure the constants at a small size, and two predictions at a larger one."""
    small, middle, large = (20_000, 50_000, 100_000) if tiny else (10**7, 10**8, 4 * 10**8)
    rounds = 1 if tiny else 5
    with tempfile.TemporaryDirectory(prefix="infobatch-benchmark-") as name:
        folder = Path(name)
        files = [scores_file(folder, count) for count in (small, middle, large)]
        (times, _), _ = in_child(growth, files[1], rounds)
        constant = Spread.of(times).scaled(1e9 / middle)
        peaks = [in_child(once, file, False)[1] for file in files]
        per_shard = (peaks[2] - peaks[0]) / ((large - small) / SHARD)
        commits, _ = in_child(committing, folder, small, rounds)
        state, _ = in_child(saved_bytes, folder, small // 10)
        (found, _), _ = in_child(growth, files[2], rounds)
    predicted = constant.median * large / 1e9
    nodes = 4
    exchange = exchanged(small, nodes)
    check = Spread.of(found).scaled(1 / predicted)
    figures = [
        Figure(0, PLAN, constant, "ns/sample", f"{middle:,} samples, one thread"),
        Figure(
            0, MEMORY, Spread.of([per_shard]), "bytes/shard", f"from {small:,} to {large:,} samples, {SHARD} a shard"
        ),
        Figure(0, COMMIT, Spread.of(commits), "ns/sample", f"{small:,} samples, processor time of one process"),
        Figure(0, STATE, Spread.of([state]), "bytes/sample", f"torch.save of {small // 10:,} samples"),
        Figure(0, f"planning {large:,} samples{CHECK}", check, "x", f"{predicted:.3g} s predicted"),
    ]
    if exchange is not None:
        text = f"{sent(nodes):.3g} bytes a sample predicted; counted in a network of their own"
        value = Spread.of([exchange.sent / sent(nodes)])
        how = f"{small:,} samples, processor time of one of {nodes} nodes"
        figures += [
            Figure(0, f"{nodes} nodes: sent by each{CHECK}", value, "x", text),
            Figure(0, EXCHANGE, Spread.of([exchange.processor]), "ns/sample", how),
        ]
    return figures


def page(figures: list[Figure]) -> str:
    """The page docs/scale.md."""
    found = {figure.what: figure for figure in figures}
    plan, memory, commit, state = (found[name].value.median for name in (PLAN, MEMORY, COMMIT, STATE))
    both = found[EXCHANGE].value.median if EXCHANGE in found else commit  # where no network of nodes could be made
    packing = (both - commit) / _GPUS  # of the exchange; the ranks of a node do it together
    rows = []
    for count in (10**9, 10**10):
        for nodes in (8, 64, 512):
            epoch = count / (_RATE * _GPUS * nodes)
            exchange = sent(nodes) * count / _LINK + packing * count / 1e9
            overhead = (plan + commit) * count / 1e9 + exchange
            rows.append(
                f"| {count:.0e} | {nodes} | {plan * count / 1e9:.3g} s | {memory * count / SHARD / 2**20:,.0f} MiB "
                f"| {8 * count / 1e9:.0f} GB | {state * count / 1e9:.0f} GB | {sent(nodes) * count / 1e9:.3g} GB "
                f"| {exchange:.2g} s | {commit * count / 1e9:.3g} s | {epoch:,.0f} s | {100 * overhead / epoch:.2g} % |"
            )
    constants = [
        f"| {name} | {found[name].value.median:.3g} {found[name].unit} | {found[name].limit} |"
        for name in NAMES
        if name in found
    ]
    checked = [
        f"| {figure.what.removesuffix(CHECK)}: {figure.limit} | {figure.value.median:.3g} |"
        for figure in figures
        if figure.what.endswith(CHECK)
    ]
    return _PAGE.format(
        constants="\n".join(constants),
        rows="\n".join(rows),
        checked="\n".join(checked),
        gpus=_GPUS,
        rate=_RATE,
        shard=SHARD,
    )


_PAGE = """# A billion samples and more

Written by `python -m benchmarks scale`; do not edit. What an epoch will take beside training, from constants that were
measured on one small machine:

| constant | measured | how |
| --- | --- | --- |
{constants}

| samples | nodes | planning | plan's memory, per rank | store, per node | checkpoint | sent by a node at a commit | \
exchange | commit | an epoch | overhead |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
{rows}

* Planning is done by every rank for itself, and so takes as long on many nodes as on one. It is a pass over the scores,
  which are in the page cache after the commit: 4 bytes per sample that all ranks of a node share.
* The plan's memory grows with the number of shards, here of {shard} samples each; with larger shards it is less.
* The store is two arrays of float32 on each node; a checkpoint holds both.
* What a node sends at a commit is split among its ranks: at most 4 (1 - 1/n^2) + 1/8 bytes per sample with n nodes.
* Exchange: what a node's processor works, shared by its ranks, and then the bytes over 100 Gbit/s.
* An epoch: all samples, {gpus} GPUs a node, {rate:,} images/s each (ResNet-50 on an A100 in mixed precision, published
  in NVIDIA's DeepLearningExamples). Overhead: planning, exchange and commit, as a share of that.

Two of the predictions were checked by measuring:

| prediction | measured, of what was predicted |
| --- | --- |
{checked}
"""
