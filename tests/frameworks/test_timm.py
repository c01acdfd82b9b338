"""timm's parts over an InfoBatchLoader, in examples/timm_train.py. torchrun runs this file as two processes."""

import gc
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from support.ddp.launch import environment, process_group
from support.framework_runs import ranks_of
from support.paths import ROOT
from support.recorded_example import check_rest, check_same_state, example, recorded
from torch.utils.data import TensorDataset

from infobatch_stream import InfoBatchLoader

TRAIN, VAL, RANKS, BATCH, EPOCHS = 150, 20, 2, 16, 3  # of the epochs 1 is pruned; batch per rank
OPTIONS = ["--model", "test_resnet", "--size", 32, "--epochs", EPOCHS, "--batch-size", BATCH, "--warmup-epochs", 1]
MIXED = ["--mixup", 0.2, "--cutmix", 1.0, "--lr", 0.05, "--ema", 0.9]
STOP = 7  # within epoch 1
MODES = {"published": [], "constant": ["--constant-steps"]}


def write_pictures(folder, count=TRAIN + VAL):
    """PNGs of digits in train/ and validation/, in folders of their classes."""
    digits = load_digits()
    for number in range(count):
        place = folder / ("train" if number < TRAIN else "validation") / str(digits.target[number])
        place.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray((digits.images[number] * 15).astype(np.uint8)).resize((32, 32))
        picture.save(place / f"{number}.png")
    return folder


# ---- in each of the processes


def main(out):
    from timm.scheduler.scheduler import Scheduler

    updates, step_update = [], Scheduler.step_update

    def noted(self, number, metric=None):
        updates.append(number)
        step_update(self, number, metric)
        rates.append(self.optimizer.param_groups[0]["lr"])

    with process_group() as (rank, _), patch.object(Scheduler, "step_update", noted):
        found = {}
        for mode, options in MODES.items():
            for case, more in (("whole", []), ("begun", ["--stop-after", STOP]), ("rest", [])):
                updates, rates = [], []
                folder = out / (f"{mode}-whole" if case == "whole" else f"{mode}-stopped")
                seen = recorded("timm_train", out / "pictures", *OPTIONS, *MIXED, *options, *more, "--out", folder)
                found[f"{mode} {case}"] = {"seen": seen, "updates": updates, "rates": rates}
        torch.save(found, out / f"{rank}.pt")


# ---- what they found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("timm")
    write_pictures(out / "pictures")
    return ranks_of(__file__, out), out


def seen(runs, case):
    return [rank["seen"] for rank in runs[0][case]]


@pytest.mark.ddp
@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_of_the_example_is_the_rest_of_one_that_was_not_stopped(runs, mode):
    whole = seen(runs, f"{mode} whole")
    assert {step[0] for step in whole[0][:STOP]} == {0, 1}
    assert whole[0][STOP][:2] == (1, STOP - 5)  # it was stopped within an epoch
    check_rest(whole, seen(runs, f"{mode} rest"), STOP)
    states = [torch.load(runs[1] / f"{mode}-{case}" / "checkpoint.pt") for case in ("whole", "stopped")]
    check_same_state(*states)
    for whole, rest in zip(runs[0][f"{mode} whole"], runs[0][f"{mode} rest"], strict=True):
        assert rest["rates"] == whole["rates"][STOP:]


@pytest.mark.ddp
@pytest.mark.parametrize("mode", MODES)
def test_every_kept_sample_is_trained_on_once_in_the_steps_of_the_mode(runs, mode):
    ranks, lengths = seen(runs, f"{mode} whole"), []
    for epoch in range(EPOCHS):
        steps = [[step for step in rank if step[0] == epoch] for rank in ranks]
        kept = torch.cat([step[2][step[3] > 0] for rank in steps for step in rank])
        assert kept.unique().numel() == kept.numel()
        assert (kept.numel() == TRAIN) == (epoch != 1)
        lengths.append(len(steps[0]))
    assert lengths == ([5, 5, 5] if mode == "constant" else [5, 4, 5])


@pytest.mark.ddp
def test_a_schedule_of_unpruned_steps_counts_the_steps_if_they_are_constant_and_else_reaches_as_far(runs):
    assert runs[0]["constant whole"][0]["updates"] == list(range(15))
    updates = runs[0]["published whole"][0]["updates"]
    assert updates[:5] + updates[9:] == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]
    assert updates[5] == 5
    assert all(one < other for one, other in pairwise(updates))
    rates = runs[0]["published whole"][0]["rates"]
    assert rates[9:] == runs[0]["constant whole"][0]["rates"][10:]


# ---- mixing


@pytest.fixture(scope="module")
def timm_train():
    return example("timm_train")


def mixup_of(mode, classes, smoothing=0.0):
    from timm.data import Mixup

    return Mixup(0.5, 1.0, prob=0.8, mode=mode, label_smoothing=smoothing, num_classes=classes)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("count", [8, 7, 1])
def test_shares_say_how_much_each_picture_has_of_each_sample(timm_train, mode, count):
    mixup = mixup_of(mode, 8)
    mixed = 0
    for seed in range(20):
        np.random.seed(seed)
        images = 2.0 ** torch.arange(count).reshape(-1, 1, 1, 1).expand(count, 3, 16, 16).clone()
        shares = timm_train["mix"](mixup, images)
        assert torch.allclose(images.mean((1, 2, 3)), shares @ 2.0 ** torch.arange(count), rtol=1e-4)
        assert torch.allclose(shares.sum(1), torch.ones(count))
        mixed += (shares.diagonal() < 1).any().item()
    assert (mixed > 10) == (count > 1)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_losses_by_label_add_up_to_the_soft_targets_of_timm(timm_train, mode):
    from timm.loss import SoftTargetCrossEntropy

    torch.manual_seed(0)
    images, labels, logits = torch.randn(8, 3, 16, 16), torch.randint(10, (8,)), torch.randn(8, 10)
    for seed in range(5):
        np.random.seed(seed)
        its, target = mixup_of(mode, 10, smoothing=0.1)(images.clone(), labels)
        np.random.seed(seed)
        mine = images.clone()
        losses, _ = timm_train["losses_of"](logits, labels, timm_train["mix"](mixup_of(mode, 8), mine), 0.1)
        assert torch.equal(mine, its)
        assert torch.allclose(losses.mean(), SoftTargetCrossEntropy()(logits, target), rtol=1e-5)


def test_the_loss_of_a_sample_is_that_of_its_label_in_all_pictures(timm_train):
    torch.manual_seed(0)
    labels, logits, lam = torch.tensor([0, 1, 2, 3]), torch.randn(4, 5), 0.3
    shares = lam * torch.eye(4) + (1 - lam) * torch.eye(4).flip(0)
    losses, score = timm_train["losses_of"](logits, labels, shares, 0.0)
    log_p = logits.log_softmax(1)
    for sample in range(4):
        own, other = -log_p[sample, sample], -log_p[3 - sample, sample]
        assert losses[sample].item() == pytest.approx((lam * own + (1 - lam) * other).item(), rel=1e-5)
        assert score[sample].item() == pytest.approx(other.item() + np.log(1 - lam), rel=1e-5)  # it is seen best there


def test_without_mixing_losses_are_the_cross_entropy_and_scores_too(timm_train):
    torch.manual_seed(0)
    labels, logits = torch.randint(5, (4,)), torch.randn(4, 5)
    losses, score = timm_train["losses_of"](logits, labels, torch.eye(4), 0.1)
    entropy = torch.nn.functional.cross_entropy
    assert torch.allclose(losses, entropy(logits, labels, reduction="none", label_smoothing=0.1))
    assert torch.allclose(score, entropy(logits, labels, reduction="none"))


# ---- PrefetchLoader and ImageDataset


def test_the_prefetch_loader_keeps_picks_with_their_pictures_and_a_state_does_not_count_what_it_fetched(
    timm_train, tmp_path
):
    from timm.data.loader import PrefetchLoader

    data = TensorDataset(torch.arange(40, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(40, 3, 2, 2), torch.arange(40))

    def batches(loader):
        pairs = ((images, timm_train["Target"]((labels, picks))) for (images, labels), picks in loader)
        return PrefetchLoader(pairs, (0.0,) * 3, (1 / 255,) * 3, device=torch.device("cpu"))

    options = {"batch_size": 8, "epochs": 2}
    loader = InfoBatchLoader(data, tmp_path / "scores.zarr", **options)
    order = []
    for number, (images, (labels, picks)) in enumerate(batches(loader)):
        assert torch.equal(images[:, 0, 0, 0].long(), picks.index)
        assert torch.equal(labels, picks.index)
        order.append(picks.index)
        loader.update(torch.rand(8), picks)
        if number == 1:
            state = loader.state_dict()
    resumed = InfoBatchLoader(data, tmp_path / "resumed.zarr", **options)
    resumed.load_state_dict(state)
    assert resumed.step == 2
    rest = [picks.index for _, (_, picks) in batches(resumed)]
    assert torch.equal(torch.cat(rest), torch.cat(order[2:]))


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # of timm
@pytest.mark.parametrize("retries", [10, 1])  # the default; TIMM_DATASET_MAX_RETRIES=1
def test_timm_puts_the_next_picture_for_a_broken_one_unless_it_is_told_not_to_retry(tmp_path, monkeypatch, retries):
    from timm.data import create_dataset

    write_pictures(tmp_path / "pictures", 12)
    monkeypatch.setattr("timm.data.dataset._ERROR_RETRY", retries)  # what it reads of the environment, at import
    train = create_dataset("", root=tmp_path / "pictures", split="train")
    broken = 5
    Path(train.filename(broken, absolute=True)).write_bytes(b"not a picture")
    train.transform = np.asarray
    options = {"batch_size": 12, "epochs": 2, "on_error": "replace", "collate_fn": list}
    with InfoBatchLoader(train, tmp_path / "scores.zarr", **options) as loader:
        if retries == 1:
            with pytest.warns(RuntimeWarning, match="could not be read and was replaced"):
                samples, picks = next(iter(loader))
        else:
            samples, picks = next(iter(loader))
    rows = dict(zip(picks.index.tolist(), samples, strict=True))
    assert (picks.weight == 0).sum() == (retries == 1)
    if retries == 1:
        assert broken not in rows
    else:  # so a loss of another picture would be recorded for it
        assert np.array_equal(rows[broken][0], rows[broken + 1][0])
    gc.collect()  # the files that timm leaves open, of which no other test should hear


# ---- the page

PAGE = ROOT / "docs" / "trainers" / "timm.md"


def test_every_example_of_the_page_runs(tmp_path):
    write_pictures(tmp_path / "pictures")
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    assert len(blocks) == 3
    script = "".join(f"exec(compile({block!r}, 'block of timm.md', 'exec'), names)\n" for block in blocks)
    ends = "assert names['loader'].epoch == 3 and names['resumed'].epoch == 3\n"
    done = subprocess.run(
        [sys.executable, "-c", f"names = {{}}\n{script}{ends}"],
        cwd=tmp_path, env={**environment(), "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    main(Path(sys.argv[1]))
