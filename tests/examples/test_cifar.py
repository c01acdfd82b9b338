"""The CIFAR example: its published rows, resume, evaluation, schedules; run as a user runs it."""

import json
import re
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cifar_files import cifar10
from support.ddp.launch import environment
from support.example_runs import EXAMPLES, checkpoint, command, run

from examples.recipe import cosine, one_cycle
from infobatch_stream import InfoBatchLoader

TINY = ["--tiny", "--dataset", "cifar10"]
ROW = ["--optimizer", "lars", "--max-lr", "5.2"]


# ---- the published rows

ROWS = {
    "baseline": (["--delta", "0.0", "--format", "map"], 1),
    "mixed precision": (["--delta", "0.0", "--fp16", "--format", "map"], 1),
    "mixed precision, DDP": (["--delta", "0.0", "--fp16", "--use_ddp", "--format", "wds"], 2),
    "InfoBatch": (["--use_info_batch", "--ratio", "0.5", "--delta", "0.875", "--num_epoch", "3", "--format", "mds"], 1),
    "InfoBatch, mixed precision, DDP": (
        ["--use_info_batch", "--fp16", "--use_ddp", "--delta", "0.875", "--num_epoch", "3", "--format", "wds"], 2,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Row -> (folder of the run, what it printed); two at a time."""
    folders = {row: tmp_path_factory.mktemp("row") for row in ROWS}
    with ThreadPoolExecutor(2) as pool:
        printed = pool.map(lambda row: run([*TINY, *ROW, *ROWS[row][0]], folders[row], ROWS[row][1]), ROWS)
        return {row: (next(folders[row].glob("cifar-runs/*")), out) for row, out in zip(ROWS, printed, strict=True)}


@pytest.mark.ddp
@pytest.mark.parametrize("row", ROWS)
def test_each_published_row_runs_and_skips_samples_only_with_infobatch(rows, row):
    folder, out = rows[row]
    assert re.findall(r"^epoch (\d)", out, re.M) == ["0", "1", "2"]
    kept = [epoch["kept"] for epoch in json.loads((folder / "result.json").read_text())]
    assert kept[0] == kept[2] == 128  # nothing is known at first, and all is trained on at the end
    assert 60 < kept[1] < 128 if "InfoBatch" in row else kept[1] == 128
    assert all(re.search(r"test \d+/41 ", line) for line in out.splitlines())
    assert all(value.isfinite().all() for value in checkpoint(folder)["model"].values())


def test_a_run_is_not_overwritten_but_by_intent(rows):
    folder, _ = rows["baseline"]
    again, out = command(*TINY, *ROW, *ROWS["baseline"][0]), f"cifar-runs/{folder.name}"
    done = subprocess.run(again, cwd=folder.parent.parent, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert f"{out} holds a run: give --resume {out}/checkpoint.pt or another --out" in done.stderr


def test_each_row_has_a_folder_of_its_own(rows, monkeypatch):
    assert len({folder.name for folder, _ in rows.values()}) == len(ROWS)
    monkeypatch.syspath_prepend(EXAMPLES)
    example = runpy.run_path(str(EXAMPLES / "cifar.py"))
    outs = []
    for options in (["--model", "r18"], ["--model", "r101"], ["--seed", "1"], ["--policy", "budget"], ["--bf16"]):
        monkeypatch.setattr(sys, "argv", ["cifar.py", *options])
        outs.append(example["options"]().out)
    assert len(set(outs)) == len(outs)
    monkeypatch.setattr(sys, "argv", ["cifar.py", "--resume", "mine/checkpoint.pt"])
    assert example["options"]().out == Path("mine")


# ---- resume


def kill_after_an_epoch(options, cwd):
    process = subprocess.Popen(
        command(*options), cwd=cwd, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    with process:
        assert process.stdout.readline().startswith("epoch 0:")
        process.kill()


def test_a_killed_run_goes_on_to_the_very_weights_of_one_that_was_not(tmp_path):
    options = [*TINY, "--format", "map", "--policy", "budget", "--fraction", "0.2", "--num-epoch", "3"]
    options += ["--fp16", "--workers", "1", "--optimizer", "sgd", "--max-lr", "0.1"]
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(run, [*options, "--out", "whole"], tmp_path)
        kill_after_an_epoch([*options, "--out", "killed"], tmp_path)
        first = checkpoint(tmp_path / "killed")["loader"]["progress"]["epoch"]
        rest = run([*options, "--out", "killed", "--resume", "killed/checkpoint.pt"], tmp_path)
        out = whole.result()
    assert f"epoch {first + 1}:" in rest
    assert f"epoch {first}:" not in rest
    whole, resumed = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "killed")
    assert out.splitlines()[-1].split(" test ")[1] == rest.splitlines()[-1].split(" test ")[1]
    assert whole["scaler"] == resumed["scaler"]
    for name, values in whole["model"].items():
        assert torch.equal(values, resumed["model"][name]), name
    for name in ("scores", "pending"):
        assert torch.equal(whole["loader"][name].nan_to_num(-1), resumed["loader"][name].nan_to_num(-1))


# ---- data


def test_the_files_of_cifar_are_converted_and_trained_on(tmp_path):
    (tmp_path / "data").mkdir()
    cifar10(tmp_path / "data" / "cifar-10-batches-py", rows=2)
    options = ["--dataset", "cifar10", "--model", "r18", "--num-epoch", "1", "--batch-size", "10", "--format", "wds"]
    out = run([*options, "--optimizer", "lamb", "--schedule", "cosine", "--lr", "1e-3"], tmp_path)
    assert re.search(r"epoch 0: 1 steps .* test \d/2 ", out)
    assert sorted(path.name for path in (tmp_path / "cifar10-wds").iterdir()) == ["test", "train"]


# ---- evaluation

EVALUATE = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from process import Process

class Numbers:
    num_samples = None
    def __init__(self, count):
        self.count, self.seen = count, []
    def __len__(self):
        return self.count
    def __getitem__(self, n):
        self.seen.append(n)
        return n

class Mean(torch.nn.BatchNorm1d):  # says 1 where its running mean is below 1
    def forward(self, numbers):
        return torch.cat([self.running_mean.expand(len(numbers), 1), torch.ones_like(numbers)], dim=1)

def batch(samples):
    return torch.tensor(samples).float()[:, None], torch.tensor(samples) % 2

process, found = Process(), []
for count in (7, 2):
    model, numbers = Mean(1, affine=False), Numbers(count)
    model.running_mean += 2 * process.rank
    right, samples, _ = process.evaluate(model, numbers, batch, batch_size=2)
    found.append([right, samples, numbers.seen, model.training])
Path(f"{process.rank}.json").write_text(json.dumps(found))
process.end()
"""


@pytest.mark.ddp
def test_evaluation_counts_each_sample_once_with_the_buffers_of_rank_0(tmp_path):
    (tmp_path / "evaluate.py").write_text(EVALUATE)
    run([EXAMPLES], tmp_path, processes=3, script=tmp_path / "evaluate.py")
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    for number, count in enumerate((7, 2)):
        found = [rank[number] for rank in ranks]
        assert [sample for _, _, seen, _ in found for sample in seen] == list(range(count))
        assert all((right, samples) == (count // 2, count) for right, samples, *_ in found)  # the odd ones are 1
        assert all(training for *_, training in found)


# ---- schedules

SHARES = st.floats(0.05, 0.95)


@given(SHARES, st.floats(0, 1), st.floats(0, 1))
def test_one_cycle_rises_to_its_peak_and_falls_to_its_end_without_a_jump(pct_start, one, other):
    def rate(progress):
        return one_cycle(progress, 5.2, 0.2, 0.001, pct_start)

    assert rate(0.0) == pytest.approx(0.2)
    assert rate(pct_start) == pytest.approx(5.2)
    assert rate(1.0) == pytest.approx(0.001)
    low, high = sorted((one, other))
    if high <= pct_start:
        assert rate(low) <= rate(high) + 1e-9
    if low >= pct_start:
        assert rate(low) >= rate(high) - 1e-9
    # The steepest slope of half a cosine is pi/2 times that of a straight line.
    steepest = 1.58 * 5.2 / min(pct_start, 1 - pct_start)
    assert abs(rate(high) - rate(low)) <= steepest * (high - low) + 1e-9


@pytest.mark.parametrize("pct_start", [0.1, 0.3, 0.8])
def test_one_cycle_is_that_of_torch(pct_start):
    steps = 1000
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0, momentum=0.9)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5.2, steps, pct_start=pct_start)
    for step in range(steps - 1):
        (group,) = optimizer.param_groups
        progress = step / (steps - 1)  # torch counts one step less before the peak
        assert one_cycle(progress, 5.2, 5.2 / 25, 5.2 / 25 / 1e4, pct_start) == pytest.approx(group["lr"], abs=0.06)
        assert one_cycle(progress, 0.85, 0.95, 0.95, pct_start) == pytest.approx(group["momentum"], abs=0.001)
        optimizer.step()
        theirs.step()


@given(st.floats(0, 0.5), st.floats(0, 1))
def test_the_cosine_warms_up_in_a_straight_line_and_ends_at_nothing(warmup, progress):
    assert cosine(warmup, 0.4, warmup) == pytest.approx(0.4)
    assert cosine(1.0, 0.4, warmup) == pytest.approx(0)
    assert 0 <= cosine(progress, 0.4, warmup) <= 0.4
    if progress < warmup:
        assert cosine(progress, 0.4, warmup) == pytest.approx(0.4 * progress / warmup)


def test_a_schedule_spans_the_whole_run_however_many_steps_its_epochs_have(tmp_path):
    loader = InfoBatchLoader(np.arange(200.0), tmp_path / "scores.zarr", batch_size=10, epochs=8)
    seen, steps = [], []
    for _ in range(8):
        for values, picks in loader:
            seen.append(loader.progress)
            loader.update(values.float(), picks)
        steps.append(loader.step)
    assert len(set(steps)) > 2
    assert seen[0] == 0
    assert seen[-1] == pytest.approx(1 - 1 / (8 * steps[-1]))
    assert all(0 < after - before <= 1 / (8 * min(steps)) + 1e-9 for before, after in pairwise(seen))
    peak = int(np.argmax([one_cycle(progress, 5.2, 0.2, 0.0, 0.25) for progress in seen]))
    assert peak == sum(steps[:2])  # a quarter of eight epochs
