"""Contrastive training over WebDataset, as examples/contrastive.py has it. torchrun runs this file as two processes."""

import io
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support import real_data
from support.ddp.launch import environment, process_group
from support.framework_runs import ranks_of
from support.paths import ROOT
from support.recorded_example import check_rest, check_same_state, example, recorded
from torch import nn

PAIRS, TRAIN, RANKS, BATCH, EPOCHS = 70, 56, 2, 8, 3  # every epoch is pruned
OPTIONS = ["--epochs", EPOCHS, "--batch-size", BATCH, "--fraction", 0.2]
STOP = 5  # within epoch 1
BROKEN = (7, 30)  # a picture that is none, a caption that is no text
MODES = {"published": [], "constant": ["--constant-steps"], "global": ["--global-loss", "--constant-steps"]}
KINDS = {  # local_loss, gather_with_grad; the last one is open_clip's default
    "local": (True, True), "local, without": (True, False), "global": (False, True), "global, without": (False, False),
}  # fmt: skip


def break_members(tar):
    """Damage the picture of one pair and the caption of another where they lie in the tar."""
    with tarfile.open(tar) as found:
        members = {member.name: (member.offset_data, member.size) for member in found}
    names = sorted({name.partition(".")[0] for name in members})
    with tar.open("r+b") as file:
        for number, extension in zip(BROKEN, ("png", "txt"), strict=True):
            place, size = members[f"{names[number]}.{extension}"]
            file.seek(place)
            file.write(b"\xff" * size)  # is no UTF-8 either


# ---- in each of the processes


def towers(size=6):
    torch.manual_seed(0)
    return nn.ModuleList([nn.Linear(size, size), nn.Linear(size, size)])


def features(net, data):
    return [F.normalize(tower(part), dim=1) for tower, part in zip(net, data, strict=True)]


def gradients(net, loss, scale):
    """Of all parameters, averaged over the ranks as DDP does."""
    found = torch.autograd.grad(loss, [*net.parameters(), scale])
    for gradient in found:
        torch.distributed.all_reduce(gradient)
    return [gradient / RANKS for gradient in found]


def main(out):
    with process_group() as (rank, _):
        contrast = example("contrastive")["Contrast"]
        torch.manual_seed(1)
        data = torch.randn(2, 9, 6)  # 9 pairs
        found = {"clip": {}, "mine": {}}
        for kind, (local, with_grad) in KINDS.items():
            from open_clip import ClipLoss

            part = data[:, rank * 4 : rank * 4 + 4]
            net, scale = towers(), torch.tensor(5.0, requires_grad=True)
            clip = ClipLoss(local, with_grad, rank=rank, world_size=RANKS)(*features(net, part), scale)
            found["clip"][kind] = clip.item(), gradients(net, clip, scale)
            losses, _, loss = contrast(4, local, with_grad)(*features(net, part), scale, torch.ones(4))
            loss = losses.mean() if loss is None else loss
            found["mine"][kind] = loss.item(), gradients(net, loss, scale)
        # 5 and 4 pairs, in slots of 6; then with a copy of weight 0 of another rank's pair
        uneven = torch.arange(5) if rank == 0 else torch.arange(5, 9)
        for case, rows, weight in (
            ("uneven", uneven, torch.ones(len(uneven))),
            ("copied", torch.cat([uneven, torch.tensor([0])]), torch.tensor([1.0] * len(uneven) + [0.0])),
        ):
            net, scale = towers(), torch.tensor(5.0, requires_grad=True)
            for kind in ("local", "global"):
                losses, score, loss = contrast(6, kind == "local")(*features(net, data[:, rows]), scale, weight)
                loss = (weight * losses).sum() / 4.5 if loss is None else loss * 12 / 9  # by the pairs there are
                grads = gradients(net, loss, scale)
                found[f"{case} {kind}"] = losses[weight > 0].detach(), score[weight > 0], grads
        for mode, options in MODES.items():
            for case, more in (("whole", []), ("begun", ["--stop-after", STOP]), ("rest", [])):
                folder = out / (f"{mode}-whole" if case == "whole" else f"{mode}-stopped")
                arguments = [out / "pairs", *OPTIONS, *options, *more, "--out", folder]
                found[f"{mode} {case}"] = recorded("contrastive", *arguments)
        torch.save(found, out / f"{rank}.pt")


# ---- what they found


@pytest.fixture(scope="module")
def contrastive():
    return example("contrastive")


@pytest.fixture(scope="module")
def runs(contrastive, tmp_path_factory):
    out = tmp_path_factory.mktemp("contrastive")
    contrastive["write_pairs"](real_data.stamps(), out / "pairs", PAIRS)
    break_members(out / "pairs" / "train" / "pairs-000000.tar")
    return ranks_of(__file__, out), out


@pytest.mark.ddp
@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_of_row_losses_and_its_gradient_are_those_of_open_clip(runs, kind):
    for mine, its in zip(runs[0]["mine"], runs[0]["clip"], strict=True):
        assert mine[kind][0] == pytest.approx(its[kind][0], rel=1e-5)
        for gradient, other in zip(mine[kind][1], its[kind][1], strict=True):
            assert torch.allclose(gradient, other, atol=1e-6)


@pytest.mark.ddp
@pytest.mark.parametrize("case", ["uneven local", "copied local", "uneven global", "copied global"])
def test_ranks_of_other_sizes_and_copies_of_weight_0_change_no_loss_and_no_gradient(runs, contrastive, case):
    torch.manual_seed(1)
    data = torch.randn(2, 9, 6)
    net, scale = towers(), torch.tensor(5.0, requires_grad=True)
    losses, score, _ = contrastive["Contrast"](9)(*features(net, data), scale, torch.ones(9))
    wanted = torch.autograd.grad(losses.mean(), [*net.parameters(), scale])
    found = runs[0][case]
    assert torch.allclose(torch.cat([rank[0] for rank in found]), losses.detach(), rtol=1e-5)
    assert torch.allclose(torch.cat([rank[1] for rank in found]), score, rtol=1e-5)
    for gradient, other in zip(found[0][2], wanted, strict=True):
        assert torch.allclose(gradient, other, atol=1e-6)


@pytest.mark.ddp
@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_of_the_example_is_the_rest_of_one_that_was_not_stopped(runs, mode):
    whole = runs[0][f"{mode} whole"]
    assert whole[0][STOP][0] == 1
    assert whole[0][STOP][1] > 0
    check_rest(whole, runs[0][f"{mode} rest"], STOP)
    states = [torch.load(runs[1] / f"{mode}-{case}" / "checkpoint.pt") for case in ("whole", "stopped")]
    check_same_state(*states)


@pytest.mark.ddp
@pytest.mark.parametrize("mode", MODES)
def test_epochs_skip_and_batches_have_the_sizes_of_the_mode(runs, mode):
    ranks = runs[0][f"{mode} whole"]
    for epoch in range(EPOCHS):
        kept = torch.cat([step[2][step[3] > 0] for rank in ranks for step in rank if step[0] == epoch])
        assert 30 < kept.unique().numel() == kept.numel() < TRAIN
    sizes = [[len(step[2]) for step in rank] for rank in ranks]
    if mode == "published":
        assert {size for rank in sizes for size in rank} == {BATCH}
    else:
        assert {abs(one - other) for one, other in zip(*sizes, strict=True)} == {0, 1}  # so gathering has to fill up
        assert len(sizes[0]) == EPOCHS * 4


@pytest.mark.ddp
def test_broken_pairs_are_replaced_with_weight_0_and_have_no_score(runs):
    whole = runs[0]["constant whole"]
    steps = [step for rank in whole for step in rank]
    replaced = [(step[2][row].item(), step) for step in steps for row in (step[3] == 0).nonzero()[:, 0]]
    assert len(replaced) >= 2
    for index, step in replaced:
        assert index in step[2][step[3] > 0]  # a copy of another pair of its batch
    trained_on = set(torch.cat([step[2][step[3] > 0] for step in steps]).tolist())
    assert not set(BROKEN) & trained_on
    state = torch.load(runs[1] / "constant-whole" / "checkpoint.pt")["loader"]
    scored = ~(state["scores"].isnan() & state["pending"].isnan())
    assert set(scored.nonzero()[:, 0].tolist()) == trained_on


# ---- what weights of negatives are for


def test_weights_on_negatives_bring_the_expected_gradient_nearer_to_that_of_all_pairs_and_not_quite_there(contrastive):
    """Of 64 pairs the easy ones are kept with probability 1/2, as SoftPruning does, with constant steps."""
    torch.manual_seed(0)
    count, spread = 64, torch.rand(64, 1)
    base = F.normalize(torch.randn(count, 16), dim=1)
    sides = [(base + 0.4 * spread * torch.randn(count, 16)).requires_grad_() for _ in range(2)]

    def gradient(rows, weight, weigh):
        chosen = [F.normalize(side[rows], dim=1) for side in sides]
        losses, _, _ = contrastive["Contrast"](len(rows), weigh_negatives=weigh)(*chosen, 10.0, weight)
        return losses.detach(), torch.cat([g.flatten() for g in torch.autograd.grad((weight * losses).sum(), sides)])

    losses, wanted = gradient(torch.arange(count), torch.ones(count), True)
    keep = torch.where(losses < losses.mean(), 0.5, 1.0)
    errors = {}
    for weigh in (False, True):
        mean = torch.zeros_like(wanted)
        for _ in range(300):
            rows = (torch.rand(count) < keep).nonzero()[:, 0]
            mean += gradient(rows, 1 / keep[rows], weigh)[1] / 300
        errors[weigh] = ((mean - wanted).norm() / wanted.norm()).item()
    assert errors[True] < 0.7 * errors[False]
    assert errors[False] > 0.1


def test_a_negative_of_weight_2_counts_as_two(contrastive):
    torch.manual_seed(0)
    images, texts = (F.normalize(torch.randn(4, 6), dim=1) for _ in range(2))
    weight = torch.tensor([1.0, 2.0, 1.0, 0.0])
    losses, _, _ = contrastive["Contrast"](4)(images, texts, 3.0, weight)
    a, b = (3 * images @ texts.T).exp(), (3 * texts @ images.T).exp()
    for i in range(3):
        count = torch.where(torch.arange(4) == i, 1.0, weight)
        wanted = ((a[i] * count).sum().log() - a[i, i].log() + (b[i] * count).sum().log() - b[i, i].log()) / 2
        assert losses[i].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert losses.isfinite().all()  # that of weight 0 too: 0 times infinity would be NaN


# ---- the example and the page


def test_a_folder_without_pairs_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="give --stamps"):
        recorded("contrastive", tmp_path / "missing")


PAGE = ROOT / "docs" / "trainers" / "contrastive.md"


def drawn_pairs(folder, count=48):
    """A tar of pictures of one colour with its name."""
    import webdataset

    folder.mkdir()
    rng = np.random.default_rng(0)
    with webdataset.TarWriter(str(folder / "pairs-000000.tar")) as tar:
        for number in range(count):
            png, shade = io.BytesIO(), rng.integers(0, 256, 3)
            Image.fromarray(np.full((8, 8, 3), shade, dtype=np.uint8)).save(png, "png")
            tar.write({"__key__": f"{number:06}", "png": png.getvalue(), "txt": f"colour {shade[0]} {shade[1]}"})


def test_every_example_of_the_page_runs(tmp_path):
    drawn_pairs(tmp_path / "pairs")
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    script = "".join(f"exec(compile({block!r}, 'block of contrastive.md', 'exec'), names)\n" for block in blocks)
    end = "assert names['loader'].epoch == 3, names['loader'].epoch\n"
    run = [sys.executable, "-c", f"names = {{}}\n{script}{end}"]
    done = subprocess.run(run, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    main(Path(sys.argv[1]))
