"""Segment pictures with InfoBatch: stamps on coloured ground; a sample's loss is the mean over its pixels.

    python examples/segmentation.py --stamps FOLDER     # default: of Debian's tuxpaint-stamps-default
    torchrun --nproc-per-node 2 examples/segmentation.py --policy quantile

FOLDER holds animals/**/*.png, food/**/*.png ...; their alpha channel gives exact masks. Without it, shapes are drawn.
A small U-Net learns from 4 of 5 stamps, and is tried on scenes of the others. Devices and checkpoints are in train.py.
"""

import argparse
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from recipe import add_policy_options, cosine, policy_of, set_rates
from torch import nn

from infobatch_stream import InfoBatchLoader

NEEDS = "{}. What this example needs: pip install 'infobatch-stream[tools]'"

try:
    from PIL import Image, ImageDraw
except ModuleNotFoundError as error:
    raise SystemExit(NEEDS.format(error)) from error

CLASSES = ("background", "animals", "food", "plants", "vehicles")
SIDE = 48
IGNORE = 255  # as in Pascal VOC: pixels on an edge, which belong to neither side


def losses_of(logits, masks):
    """float32[b], of float32[b, c, h, w] and int64[b, h, w]: the mean over a sample's pixels that are not IGNORE.

    0 for a sample that has only such pixels; the mean of nothing would be NaN.
    """
    losses = F.cross_entropy(logits, masks, ignore_index=IGNORE, reduction="none")  # 0 where ignored
    return losses.flatten(1).sum(1) / (masks != IGNORE).flatten(1).sum(1).clamp(min=1)


def read_stamps(folder):
    """[(RGBA picture, class)] of a folder, or drawn ones where none is given."""
    if folder is not None:
        paths = [(path, kind) for kind, name in enumerate(CLASSES) for path in sorted((folder / name).rglob("*.png"))]
        stamps = [(Image.open(path).convert("RGBA"), kind) for path, kind in paths]
        if not stamps:
            raise SystemExit(f"{folder} has no pictures of Tux Paint's stamps: {', '.join(CLASSES[1:])}/**/*.png")
    else:
        rng = np.random.default_rng(0)
        stamps = [(draw(rng, kind), kind) for kind in range(1, len(CLASSES)) for _ in range(40)]
    for image, _ in stamps:
        image.thumbnail((SIDE, SIDE))
    return stamps


def draw(rng, kind):
    """A shape: 1 ellipse, 2 rectangle, 3 triangle, 4 cross."""
    image = Image.new("RGBA", (SIDE, SIDE))
    pen, colour = ImageDraw.Draw(image), (*rng.integers(0, 256, 3).tolist(), 255)
    left, top, right, bottom = (float(x) for x in (*rng.uniform(0, 16, 2), *rng.uniform(32, 47, 2)))
    if kind == 1:
        pen.ellipse((left, top, right, bottom), fill=colour)
    elif kind == 2:
        pen.rectangle((left, top, right, bottom), fill=colour)
    elif kind == 3:
        pen.polygon([(left, bottom), (right, bottom), (SIDE / 2, top)], fill=colour)
    else:
        pen.line((left, SIDE / 2, right, SIDE / 2), fill=colour, width=10)
        pen.line((SIDE / 2, top, SIDE / 2, bottom), fill=colour, width=10)
    return image


class Scenes(torch.utils.data.Dataset):
    """``count`` scenes of 1 to 4 stamps, each made when it is read: (float32[3, SIDE, SIDE], int64[SIDE, SIDE])."""

    def __init__(self, stamps, count, seed):
        self.stamps, self.count, self.seed = stamps, count, seed

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        rng = np.random.default_rng((self.seed, number))
        corners = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        scene = Image.fromarray(corners).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        mask = np.zeros((SIDE, SIDE), dtype=np.int64)
        for _ in range(rng.integers(1, 5)):
            stamp, kind = self.stamps[rng.integers(len(self.stamps))]
            size = rng.uniform(0.3, 0.9)
            stamp = stamp.resize([max(4, round(size * side)) for side in stamp.size])
            left, top = (int(rng.integers(0, SIDE - side + 1)) for side in stamp.size)
            scene.paste(stamp, (left, top), stamp)
            alpha = np.asarray(stamp)[..., 3]
            under = mask[top : top + stamp.height, left : left + stamp.width]
            under[alpha >= 32] = IGNORE
            under[alpha >= 224] = kind
        pixels = np.asarray(scene, dtype=np.float32) / 255 + rng.normal(0, 0.05, (SIDE, SIDE, 3)).astype(np.float32)
        return torch.from_numpy(pixels).permute(2, 0, 1), torch.from_numpy(mask)


class UNet(nn.Module):
    """Two halvings and back. GroupNorm, since a sample's loss under BatchNorm depends on the rest of its batch."""

    def __init__(self, classes, width=16):
        super().__init__()
        w = width
        self.down = nn.ModuleList([block(3, w), block(w, 2 * w), block(2 * w, 4 * w)])
        self.up = nn.ModuleList([block(6 * w, 2 * w), block(3 * w, w)])
        self.head = nn.Conv2d(w, classes, 1)

    def forward(self, x):
        fine = self.down[0](x)
        middle = self.down[1](F.max_pool2d(fine, 2))
        coarse = self.down[2](F.max_pool2d(middle, 2))
        middle = self.up[0](torch.cat([middle, F.interpolate(coarse, scale_factor=2)], 1))
        return self.head(self.up[1](torch.cat([fine, F.interpolate(middle, scale_factor=2)], 1)))


def block(inside, outside):
    return nn.Sequential(nn.Conv2d(inside, outside, 3, padding=1), nn.GroupNorm(4, outside), nn.ReLU())


@torch.no_grad()
def mean_iou(model, dataset):
    """The mean over the classes of intersection / union, of all pixels that are not IGNORE."""
    table = torch.zeros(len(CLASSES) ** 2)
    for images, masks in torch.utils.data.DataLoader(dataset, 64):
        guess, known = model(images).argmax(1), masks != IGNORE
        pairs = masks[known] * len(CLASSES) + guess[known]
        table += torch.bincount(pairs, minlength=len(CLASSES) ** 2)
    table = table.view(len(CLASSES), -1)
    return (table.diag() / (table.sum(0) + table.sum(1) - table.diag()).clamp(min=1)).mean().item()


def main():
    parser = argparse.ArgumentParser(description="Segment pictures with InfoBatch.")
    parser.add_argument("--stamps", type=Path, help="folder of Tux Paint's stamps; without it shapes are drawn")
    add_policy_options(parser, default="soft", fraction=0.25)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=32, help="of all processes together")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", type=Path, default=Path("scores-segmentation.zarr"))
    parser.add_argument("--tiny", action="store_true", help="a run of seconds, to see that it works")
    args = parser.parse_args()

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        dist.init_process_group("gloo")
    leads = ranks == 1 or dist.get_rank() == 0

    stamps = read_stamps(args.stamps)
    train = Scenes([s for i, s in enumerate(stamps) if i % 5], 200 if args.tiny else 1500, seed=args.seed)
    test = Scenes(stamps[::5], 50 if args.tiny else 400, seed=-1 % 2**32)  # of stamps that were not trained on
    torch.manual_seed(args.seed)
    model = UNet(len(CLASSES))
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
    ) as loader:
        for epoch in range(loader.epochs):
            for (images, masks), picks in loader:
                set_rates(optimizer, cosine(loader.progress, args.lr))
                loss = loader.update(losses_of(net(images), masks), picks)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            trained += loader.stats["kept"]
            if leads:
                print(f"epoch {epoch}: {loader.stats['kept']} of {len(train)} samples")
    if leads:
        saved = 1 - trained / (len(train) * loader.epochs)
        print(f"mIoU {mean_iou(model, test):.3f}, trained on {trained} samples, saved {saved:.1%}")
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
