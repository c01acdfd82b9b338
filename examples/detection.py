"""Detect objects with InfoBatch: digits at random places; an image's loss is the sum over its boxes.

    python examples/detection.py
    torchrun --nproc-per-node 2 examples/detection.py --policy quantile

A grid detector: each cell says whether the middle of an object lies in it, which box, and which digit. At its end it
measures how the sum, and the mean per box, go with the norm of an image's gradient. Devices and checkpoints are in
train.py.
"""

import argparse
import math
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from recipe import add_policy_options, cosine, policy_of, set_rates
from torch import nn

from infobatch_stream import InfoBatchLoader

NEEDS = "{}. What this example needs: pip install 'infobatch-stream[examples,tools]'"

try:
    from PIL import Image
    from scipy.stats import spearmanr
    from sklearn.datasets import load_digits
    from torchvision.ops import batched_nms, box_iou, generalized_box_iou_loss
except ModuleNotFoundError as error:
    raise SystemExit(NEEDS.format(error)) from error

SIDE, GRID = 64, 8  # pixels, cells


def losses_of(outputs, boxes, digits, owner):
    """float32[b]: for each image the sum over its boxes, and over its cells that are to say that nothing is there.

    outputs: float32[b, 15, GRID, GRID]. boxes: float32[k, 4] of all images (left, top, right, bottom, 0 to 1), digits:
    int64[k]; owner: int64[k], which image of the batch a box is in.
    """
    column, row = (((boxes[:, :2] + boxes[:, 2:]) / 2 * GRID).long().clamp(max=GRID - 1)).T
    there = torch.zeros_like(outputs[:, 0])
    there[owner, row, column] = 1
    cells = F.binary_cross_entropy_with_logits(outputs[:, 0], there, reduction="none").sum((1, 2))
    per_box = F.cross_entropy(outputs[:, 5:].permute(0, 2, 3, 1)[owner, row, column], digits, reduction="none")
    per_box = per_box + generalized_box_iou_loss(boxes_of(outputs)[owner, row, column], boxes, reduction="none")
    return cells.index_add(0, owner, per_box)


def boxes_of(outputs):
    """float32[b, GRID, GRID, 4]: the box that each cell predicts; its middle lies in the cell."""
    x, y, width, height = outputs[:, 1:5].sigmoid().unbind(1)
    cell = torch.arange(GRID, device=outputs.device)
    x, y = (x + cell) / GRID, (y + cell[:, None]) / GRID
    return torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], -1)


def collate(scenes):
    """(images, boxes, digits, owner): images have different numbers of boxes, so these stand in one row."""
    images, boxes, digits = zip(*scenes, strict=True)
    owner = torch.arange(len(scenes)).repeat_interleave(torch.tensor([len(some) for some in boxes]))
    return torch.stack(images), torch.cat(boxes), torch.cat(digits), owner


class Scenes(torch.utils.data.Dataset):
    """``count`` scenes of 0 to 6 digits: (float32[1, SIDE, SIDE], boxes float32[k, 4], digits int64[k])."""

    def __init__(self, count, seed):
        digits = load_digits()
        self.pictures, self.kinds = (digits.images * 15.9).astype(np.uint8), digits.target
        self.count, self.seed = count, seed

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        rng = np.random.default_rng((self.seed, number))
        scene, boxes, kinds = rng.normal(0.2, 0.1, (SIDE, SIDE)).astype(np.float32), [], []
        for _ in range(rng.integers(0, 7)):
            side, pick = int(rng.integers(10, 25)), rng.integers(len(self.kinds))
            left, top = rng.integers(0, SIDE - side + 1, 2).tolist()
            box = torch.tensor([[left, top, left + side, top + side]]) / SIDE
            if boxes and box_iou(box, torch.cat(boxes)).max() > 0:
                continue
            digit = Image.fromarray(self.pictures[pick]).resize((side, side), Image.Resampling.BILINEAR)
            scene[top : top + side, left : left + side] += np.asarray(digit) / np.float32(255)
            boxes.append(box)
            kinds.append(int(self.kinds[pick]))
        return torch.from_numpy(scene)[None], torch.cat([torch.empty(0, 4), *boxes]), torch.tensor(kinds).long()


def detector(width=24):
    """-> float32[b, 1 object + 4 box + 10 digits, GRID, GRID]. GroupNorm, as BatchNorm would couple the images."""
    widths, layers = (1, width, 2 * width, 4 * width), []
    for inside, outside in pairwise(widths):
        layers += [nn.Conv2d(inside, outside, 3, stride=2, padding=1), nn.GroupNorm(4, outside), nn.ReLU()]
    for _ in range(2):
        layers += [nn.Conv2d(4 * width, 4 * width, 3, padding=1), nn.GroupNorm(4, 4 * width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(4 * width, 15, 1))


@torch.no_grad()
def f1(model, scenes):
    """Of boxes that are found with the right digit and an IoU of at least 0.5."""
    right = found = known = 0
    for scene in scenes:
        outputs = model(scene[0][None])
        scores, digits = outputs[0, 0].sigmoid().flatten(), outputs[0, 5:].argmax(0).flatten()
        boxes, sure = boxes_of(outputs)[0].flatten(0, 1), scores > 0.5
        boxes, scores, digits = boxes[sure], scores[sure], digits[sure]
        best = batched_nms(boxes, scores, digits, 0.5)
        matches = (box_iou(boxes[best], scene[1]) >= 0.5) & (digits[best][:, None] == scene[2])
        right += matches.any(0).sum().item()
        found, known = found + len(best), known + len(scene[1])
    return 2 * right / max(1, found + known)


def compare(model, scenes):
    """Rank correlations of the sum and of the mean per box with the norm of an image's gradient."""
    sums, boxes, norms = [], [], []
    for scene in scenes:
        images, *truth = collate([scene])
        loss = losses_of(model(images), *truth).sum()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norms.append(math.sqrt(sum(gradient.square().sum().item() for gradient in gradients)))
        sums.append(loss.item())
        boxes.append(max(1, len(scene[1])))
    return spearmanr(sums, norms)[0], spearmanr(np.divide(sums, boxes), norms)[0]


def main():
    parser = argparse.ArgumentParser(description="Detect objects with InfoBatch.")
    add_policy_options(parser, default="soft", fraction=0.25)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32, help="of all processes together")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", type=Path, default=Path("scores-detection.zarr"))
    parser.add_argument("--tiny", action="store_true", help="a run of seconds, to see that it works")
    args = parser.parse_args()

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        dist.init_process_group("gloo")
    leads = ranks == 1 or dist.get_rank() == 0

    train = Scenes(200 if args.tiny else 2000, seed=args.seed)
    unseen = Scenes(40 if args.tiny else 400, seed=2**32 - 1)
    test = [unseen[number] for number in range(len(unseen))]
    torch.manual_seed(args.seed)
    model = detector()
    net = nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)

    trained = 0
    with InfoBatchLoader(
        train,
        args.store,
        batch_size=args.batch_size // ranks,
        epochs=3 if args.tiny else args.epochs,
        policy=policy_of(args),
        delta=args.delta,
        seed=args.seed,
        existing="overwrite",
        collate_fn=collate,
    ) as loader:
        for epoch in range(loader.epochs):
            for (images, *truth), picks in loader:
                set_rates(optimizer, cosine(loader.progress, args.lr))
                loss = loader.update(losses_of(net(images), *truth), picks)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            trained += loader.stats["kept"]
            if leads:
                print(f"epoch {epoch}: {loader.stats['kept']} of {len(train)} samples")
    if leads:
        saved = 1 - trained / (len(train) * loader.epochs)
        print(f"F1 {f1(model, test):.3f}, trained on {trained} samples, saved {saved:.1%}")
        by_sum, by_mean = compare(model, test)
        print(f"rank correlation with the gradient's norm: sum {by_sum:.2f}, mean per box {by_mean:.2f}")
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
