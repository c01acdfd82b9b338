"""The examples of other losses, and the page about them: a sample's loss is its own, whatever else is in the batch."""

import re
import runpy
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from support import real_data
from support.ddp.launch import environment
from support.paths import ROOT
from torch import nn
from torch.utils.data import TensorDataset

from infobatch_stream import InfoBatchLoader

PAGE = (ROOT / "docs" / "losses.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)


@cache
def example(name):
    """What is in an example, without running it."""
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")  # as for a script that is run
        warnings.simplefilter("ignore")  # of transformers, at import
        return SimpleNamespace(**runpy.run_path(str(ROOT / "examples" / f"{name}.py")))


def run(name, folder, *options, ranks=1):
    """What an example prints in tiny mode."""
    several = ["-m", "torch.distributed.run", "--standalone", "--max-restarts", "0", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(several if ranks > 1 else []), ROOT / "examples" / f"{name}.py", "--tiny", *options]
    done = subprocess.run(
        command, cwd=folder, env=environment(), timeout=120, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check_output(output, quality):
    """After the first epoch the example prunes; what it says of the whole run is the sum of its epochs."""
    epochs = [(int(kept), int(offered)) for kept, offered in re.findall(r"epoch \d: (\d+) of (\d+) samples", output)]
    assert len(epochs) == 3
    (first, count), (pruned, _), (last, _) = epochs
    assert first == last == count
    assert 0 < pruned < count
    trained, saved = re.search(quality + r".*trained on (\d+) samples, saved ([\d.]+)%", output).groups()
    assert int(trained) == first + pruned + last
    assert float(saved) == pytest.approx(100 * (1 - int(trained) / (3 * count)), abs=0.06)


# ---- whole runs


@pytest.mark.parametrize(
    ("name", "policy", "quality"),
    [
        ("segmentation", "quantile", r"mIoU 0\.\d+"),
        ("finetune", "soft", r"\d\.\d+ bits per token"),
        ("diffusion", "budget", r"test loss \d\.\d+"),
        ("detection", "soft", r"F1 0\.\d+"),
    ],
)
def test_an_example_runs_and_prunes_after_the_first_epoch(tmp_path, name, policy, quality):
    check_output(run(name, tmp_path, "--policy", policy), quality)


@pytest.mark.ddp
def test_two_ranks_share_an_epoch_and_their_scores(tmp_path):
    output = run("diffusion", tmp_path, ranks=2)
    assert output.count("epoch 1:") == 1
    check_output(output, r"test loss \d\.\d+")


PACKAGES = {
    "accelerate_ddp": "accelerate", "cifar": "timm", "contrastive": "webdataset", "detection": "torchvision",
    "diffusion": "scipy", "finetune": "transformers", "fsdp": "sklearn", "hf_trainer": "tokenizers",
    "imagenet": "torchvision", "lightning_ddp": "lightning", "live": "tensorboard", "ray_train": "ray",
    "segmentation": "PIL", "sft": "trl", "timm_train": "timm", "train": "PIL",
}  # fmt: skip


@pytest.mark.parametrize("name", PACKAGES)
def test_an_example_names_the_extra_of_a_package_that_is_missing(name, monkeypatch):
    package = PACKAGES[name]
    monkeypatch.syspath_prepend(ROOT / "examples")
    for module in [module for module in sys.modules if module.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=rf"{package}.*pip install 'infobatch-stream\[[a-z,]+\]'"):
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")


@pytest.mark.parametrize(
    ("name", "function", "arguments"),
    [
        ("cifar_data", "open_shards", (Path("x"), "mds")),
        ("imagenet", "open_dataset", ("x", Path("c"), None)),
        ("train", "open_dataset", ("x", "c")),
    ],
)
def test_an_example_for_mds_says_that_streaming_is_missing(name, function, arguments, monkeypatch):
    found = getattr(example(name), function)
    monkeypatch.setitem(sys.modules, "streaming", None)
    with pytest.raises(SystemExit, match=r"pip install 'infobatch-stream\[[a-z,]*mds"):
        found(*arguments)


# ---- segmentation


@pytest.fixture
def segmented():
    """(logits, masks) of 5 samples; the last has only ignored pixels."""
    generator = torch.Generator().manual_seed(0)
    logits, masks = torch.randn(5, 3, 6, 6, generator=generator), torch.randint(3, (5, 6, 6), generator=generator)
    masks[torch.rand(masks.shape, generator=generator) < 0.3] = 255
    masks[4] = 255
    return logits.requires_grad_(), masks


def test_the_loss_of_a_picture_is_the_mean_over_its_labelled_pixels(segmented):
    logits, masks = segmented
    alone = [F.cross_entropy(logits[i : i + 1], masks[i : i + 1], ignore_index=255) for i in range(4)]
    assert torch.allclose(example("segmentation").losses_of(logits, masks)[:4], torch.stack(alone))


def test_ignored_pixels_change_neither_loss_nor_gradient(segmented):
    logits, masks = segmented
    losses_of = example("segmentation").losses_of
    losses = losses_of(logits, masks)
    other = torch.where((masks == 255)[:, None], 100.0, logits.detach())
    assert torch.equal(losses_of(other, masks), losses)
    losses.sum().backward()
    assert (logits.grad * (masks == 255)[:, None]).count_nonzero() == 0
    assert logits.grad.isfinite().all()


def test_a_picture_of_ignored_pixels_has_the_loss_0(segmented):
    assert example("segmentation").losses_of(*segmented)[4] == 0


def test_a_folder_without_stamps_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="has no pictures of Tux Paint's stamps"):
        example("segmentation").read_stamps(tmp_path / "missing")


@pytest.mark.parametrize("real", [False, True])
def test_scenes_show_every_class_and_ignore_only_edges(real):
    seg = example("segmentation")
    stamps = seg.read_stamps(real_data.stamps() if real else None)
    scenes = seg.Scenes(stamps, 60, seed=0)
    masks = torch.stack([scenes[number][1] for number in range(60)])
    assert masks.unique().tolist()[:5] == [0, 1, 2, 3, 4]
    assert (masks == 255).float().mean() < 0.1
    assert torch.equal(scenes[7][0], scenes[7][0])


# ---- language models


@pytest.fixture
def gpt():
    ft = example("finetune")
    torch.manual_seed(0)
    config = ft.GPT2Config(vocab_size=257, n_positions=ft.LENGTH, n_embd=16, n_layer=1, n_head=2)
    return ft.GPT2LMHeadModel(config).eval()


PAIRS = [(b"2+2=", b"4"), (b"a longer prompt:", b"and an answer that is longer than the others"), (b"?", b"x" * 200)]


@torch.no_grad()
def test_the_loss_of_an_answer_is_that_of_transformers_for_it_alone(gpt):
    ft = example("finetune")
    ids, labels = ft.collate(PAIRS)
    together = ft.losses_of(gpt(ids).logits, labels)  # padded to the longest
    for pair, loss in zip(PAIRS, together, strict=True):
        ids, labels = ft.collate([pair])
        assert loss.item() == pytest.approx(gpt(ids, labels=labels).loss.item(), rel=1e-4)


def test_prompts_and_padding_change_no_loss(gpt):
    ft = example("finetune")
    ids, labels = ft.collate(PAIRS)
    logits = gpt(ids).logits.detach()
    learnt = torch.zeros_like(labels, dtype=torch.bool)
    learnt[:, :-1] = labels[:, 1:] != -100
    assert learnt.sum(1).tolist() == [2, 45, ft.LENGTH - 1]
    other = torch.where(learnt[..., None], logits, torch.randn_like(logits))
    assert torch.equal(ft.losses_of(other, labels), ft.losses_of(logits, labels))


def test_a_prompt_that_leaves_no_room_for_an_answer_has_the_loss_0(gpt):
    ft = example("finetune")
    ids, labels = ft.collate([(b"x" * 200, b"never seen"), PAIRS[0]])
    losses = ft.losses_of(gpt(ids).logits, labels)
    assert losses[0] == 0
    assert losses[1] > 0


def test_emails_become_subjects_and_paragraphs():
    pairs = example("finetune").read_pairs(real_data.spam())
    assert len(pairs) > 4000
    assert all(prompt.count(b"\n") == 1 and prompt.endswith(b"\n") and len(answer) >= 20 for prompt, answer in pairs)


# ---- detection


@pytest.fixture
def detected():
    """(outputs, boxes, digits, owner) of 40 scenes, some of which have no boxes."""
    det = example("detection")
    scenes = det.Scenes(40, seed=0)
    images, *truth = det.collate([scenes[number] for number in range(40)])
    torch.manual_seed(0)
    return det.detector(width=8)(images).detach(), *truth


def test_the_loss_of_an_image_is_the_sum_over_its_boxes_and_cells(detected):
    det = example("detection")
    outputs, boxes, digits, owner = detected
    losses = det.losses_of(*detected)
    counts = owner.bincount(minlength=40)
    assert 0 in counts
    assert counts.max() > 3
    for image in range(40):
        objectness, total = outputs[image, 0], 0.0
        there = torch.zeros(8, 8)
        for box, digit in zip(boxes[owner == image], digits[owner == image], strict=True):
            column, row = (int(8 * (box[0] + box[2]) / 2), int(8 * (box[1] + box[3]) / 2))
            there[row, column] = 1
            total -= outputs[image, 5:, row, column].log_softmax(0)[digit].item()
            guess = det.boxes_of(outputs)[image, row, column]
            total += det.generalized_box_iou_loss(guess, box).item()
        total -= (there * objectness.sigmoid().log() + (1 - there) * (-objectness).sigmoid().log()).sum().item()
        assert losses[image].item() == pytest.approx(total, rel=1e-4)


def test_an_image_has_the_loss_that_it_has_alone(detected):
    det = example("detection")
    outputs, boxes, digits, owner = detected
    for image, loss in enumerate(det.losses_of(*detected)):
        mine = owner == image
        alone = det.losses_of(outputs[image : image + 1], boxes[mine], digits[mine], owner[mine] * 0)
        assert loss.item() == pytest.approx(alone.item(), rel=1e-5)


# ---- diffusion


def test_the_loss_of_a_noisy_image_is_its_own_mean():
    a, b = torch.randn(6, 64), torch.randn(6, 64)
    alone = torch.stack([F.mse_loss(a[i], b[i]) for i in range(6)])
    assert torch.allclose(example("diffusion").losses_of(a, b), alone)


def test_scores_compare_samples_where_losses_compare_noise_levels():
    usual, generator = example("diffusion").Usual(), torch.Generator().manual_seed(0)
    scores, losses, hardness = [], [], []
    for _ in range(200):
        hard, t = 0.5 + torch.rand(64, generator=generator), torch.randint(1000, (64,), generator=generator)
        loss = hard * torch.exp(-t / 200)
        hardness, losses = [*hardness, hard], [*losses, loss]
        scores.append(usual.score(loss, t, torch.ones(64)))
    late = slice(-50, None)
    hardness, losses, scores = (torch.cat(some[late]) for some in (hardness, losses, scores))
    assert spearmanr(losses, hardness)[0] < 0.4
    assert spearmanr(scores, hardness)[0] > 0.9


def test_what_is_usual_is_that_of_all_samples_when_some_are_pruned():
    usual = example("diffusion").Usual()
    t = torch.zeros(6, dtype=torch.long)
    usual.score(torch.tensor([1.0, 1.0, 4.0, 4.0]), t[:4], torch.tensor([2.0, 2.0, 1.0, 1.0]))
    assert usual.means[0] == torch.tensor([1.0, 1.0, 1.0, 1.0, 4.0, 4.0]).mean()
    assert usual.means[1:].count_nonzero() == 0


# ---- models


@pytest.mark.parametrize(
    ("name", "model", "inputs"),
    [
        ("segmentation", lambda seg: seg.UNet(5), lambda: [torch.rand(3, 3, 48, 48)]),
        ("detection", lambda det: det.detector(), lambda: [torch.rand(3, 1, 64, 64)]),
        ("diffusion", lambda dif: dif.Denoiser(), lambda: [torch.rand(3, 64), torch.tensor([5, 500, 900])]),
    ],
)
@torch.no_grad()
def test_a_sample_gets_the_same_from_the_model_in_any_batch(name, model, inputs):
    torch.manual_seed(0)
    model, inputs = model(example(name)), inputs()
    together = model(*inputs)
    for i in range(3):
        assert torch.allclose(model(*(some[i : i + 1] for some in inputs))[0], together[i], atol=1e-5)


# ---- the page


@pytest.fixture
def names(tmp_path):
    """What the blocks of the page are about: 4 samples each, and a loader that has just given their picks."""
    torch.manual_seed(0)
    is_answer = torch.rand(4, 9) < 0.5
    with InfoBatchLoader(TensorDataset(torch.arange(4)), tmp_path / "scores.zarr", batch_size=4, epochs=2) as loader:
        _, picks = next(iter(loader))
        yield {
            "torch": torch, "F": F, "loader": loader, "picks": picks,
            "is_answer": is_answer, "ids": torch.randint(10, (4, 9)),
            "predicted": torch.rand(7, 4, requires_grad=True), "boxes": torch.rand(7, 4),
            "owner": torch.tensor([0, 0, 1, 1, 1, 1, 3]),
            "t": torch.tensor([1, 300, 600, 900]), "usual": example("diffusion").Usual(),
            "before": torch.tensor([1, torch.nan, 1, 2]),
            "labels": torch.tensor([0, 2, 1, 0]), "class_weight": torch.tensor([0.5, 1, 1.5]),
            "has_depth": torch.tensor([True, False, True, False]),
            "depth_losses": torch.tensor([0.5, torch.nan, 0.7, torch.nan]),
        }  # fmt: skip


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_every_block_of_the_page_gives_a_loss_of_its_samples(names, number):
    classify = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    segment, speak = nn.Conv2d(3, 3, 1), nn.Embedding(10, 10)
    code = BLOCKS[number]
    if "counts" in code and "ids" not in code:  # goes on where the block before it ends
        code = BLOCKS[number - 1] + code
    names["images"], names["masks"] = torch.rand(4, 3, 2, 2), torch.randint(3, (4, 2, 2))
    names["model"] = segment if "masks" in code else speak if "ids" in code else classify
    names.setdefault("losses", torch.rand(4, requires_grad=True))
    try:
        exec(compile(code, "docs/losses.md", "exec"), names)
    except Exception as error:
        raise AssertionError(f"this block of docs/losses.md fails with {error!r}:\n{code}") from error
    assert names["loss"].isfinite()
    assert names["loss"].requires_grad
    names["loader"].commit()
    scores = np.asarray(names["loader"].store.scores)
    assert np.isfinite(scores).all()
    assert (scores >= 0).all()


def test_the_page_has_a_block_for_each_kind_of_loss():
    assert len(BLOCKS) == 8
