"""What docs/frameworks.md shows runs, and what it says of weights and losses holds."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.framework_runs import digits, network
from support.paths import ROOT

from infobatch_stream import InfoBatchLoader

PAGE = (ROOT / "docs" / "frameworks.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
# The compiler of C++ takes longer than the rest of the page; this one counts what it is asked to compile.
PREAMBLE = """
import torch
graphs = []
def counting(graph, inputs):
    graphs.append(graph)
    return graph.forward
names = {"counting": counting}
"""
STEPS = """
assert len(graphs) == 1, len(graphs)
assert names["trainer"].state.global_step == 72  # that with constant steps
assert names["loader"].epoch == names["adapted"].epoch == 3
print("accuracy", (names["model"](names["train"][:][0]).argmax(1) == names["train"][:][1]).float().mean().item())
print("data_loss", float(names["data_loss"]))
"""


def test_every_example_of_the_page_runs(tmp_path):
    assert len(BLOCKS) == 17
    script = PREAMBLE
    for number, block in enumerate(BLOCKS):
        code = block.replace("torch.compile(model)", "torch.compile(model, backend=counting)")
        script += f"exec(compile({code!r}, 'block {number} of frameworks.md', 'exec'), names)\n"
    run = [sys.executable, "-c", script + STEPS]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(run, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    found = dict(line.split() for line in done.stdout.splitlines() if line.startswith(("accuracy", "data_loss")))
    assert float(found["accuracy"]) > 0.9
    assert float(found["data_loss"]) < 0.5


def functions():
    """What the page defines: its functions, without the rest of its code."""
    names = {}
    for block in BLOCKS:
        for code in re.findall(r"^def .*?(?=^\S|\Z)", block, re.M | re.S):
            exec("import math, torch\nimport torch.nn.functional as F\nfrom torch import nn\n" + code, names)
    return names


def test_the_loss_of_a_text_is_the_mean_over_its_tokens_that_are_learnt():
    from infobatch_stream.frameworks.transformers import causal_lm_loss

    torch.manual_seed(0)
    logits, labels = torch.randn(3, 5, 7), torch.tensor([[1, 2, 3, 4, 5], [-100, -100, 6, 0, -100], [-100] * 5])
    losses = causal_lm_loss(SimpleNamespace(logits=logits), labels)
    log_p = logits.log_softmax(2)
    wanted = [
        -sum(log_p[0, i, label] for i, label in enumerate((2, 3, 4, 5))) / 4,
        -(log_p[1, 1, 6] + log_p[1, 2, 0]) / 2,
    ]
    assert torch.allclose(losses, torch.tensor([*wanted, 0.0]))


def test_mixed_losses_are_those_of_each_label():
    torch.manual_seed(0)
    x, y = torch.randn(6, 64), torch.arange(6)
    model, lam = network(), 0.7
    torch.manual_seed(1)
    losses, score = functions()["mixed_losses"](model, x, y, lam)
    torch.manual_seed(1)
    order = torch.randperm(6).tolist()
    wanted = torch.zeros(6)
    for row in range(6):
        log_p = F.log_softmax(model(lam * x[row] + (1 - lam) * x[order[row]]), 0)
        wanted[row] -= lam * log_p[row]
        wanted[order[row]] -= (1 - lam) * log_p[order[row]]
        assert score[row].item() == pytest.approx(-log_p[row].item() + np.log(lam), abs=1e-5)
    assert torch.allclose(losses, wanted, atol=1e-6)


def test_in_mixup_each_label_counts_in_full_if_it_has_its_own_weight_and_not_with_that_of_its_row():
    rng = np.random.default_rng(0)
    keep = np.repeat([0.5, 1.0], 60)
    lam, own, of_row, pairs = 0.7, np.zeros(120), np.zeros(120), np.zeros((2, 2))
    draws = 4000
    for _ in range(draws):
        kept = rng.permutation(np.flatnonzero(rng.random(120) < keep))
        partner, weight = rng.permutation(kept), 1 / keep[kept]
        own[kept] += lam * weight
        own[partner] += (1 - lam) / keep[partner]
        of_row[kept] += lam * weight
        of_row[partner] += (1 - lam) * weight
        both = weight / keep[partner] / weight.mean()
        np.add.at(pairs, (kept // 60, partner // 60), both)
    assert own / draws == pytest.approx(np.ones(120), abs=0.08)
    mean_weight = 120 / keep.sum()
    assert (of_row / draws)[:60].mean() == pytest.approx(lam + (1 - lam) * 0.5 * mean_weight, abs=0.01)
    assert (of_row / draws)[60:].mean() == pytest.approx(lam + (1 - lam) * mean_weight, abs=0.01)
    assert pairs / draws == pytest.approx(np.full((2, 2), 30.0), rel=0.02)


@pytest.mark.parametrize("constant", [False, True])
def test_the_weighted_mean_estimates_the_loss_of_all_data_and_the_plain_mean_is_too_large(tmp_path, constant):
    """With constant steps, so does the mean of what update returns; each step counts as a full batch."""
    model, (x, y) = network(), digits().tensors
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    with torch.no_grad():  # the model stays as it is
        true = F.cross_entropy(model(x), y).item()
        loader = InfoBatchLoader(digits(), tmp_path / "scores.zarr", batch_size=64, epochs=10, constant_steps=constant)
        weighted, plain, returned = [], [], []
        for _ in range(6):
            sums = torch.zeros(4)
            for (a, b), picks in loader:
                losses = F.cross_entropy(model(a), b, reduction="none")
                loss = loader.update(losses, picks)
                weight, kept = picks.weight, picks.weight > 0
                sums += torch.stack([(weight * losses).sum(), weight.sum(), losses[kept].sum(), kept.sum()])
                returned.append(loss.item())
            weighted.append((sums[0] / sums[1]).item())
            plain.append((sums[2] / sums[3]).item())
    assert weighted[1:] == pytest.approx([true] * 5, rel=0.04)
    assert min(plain[1:]) > 1.2 * true
    if constant:
        assert np.mean(returned[29:]) == pytest.approx(true * 1797 / (29 * 64), rel=0.02)
    else:
        assert np.mean(returned[29:]) > 1.2 * true
