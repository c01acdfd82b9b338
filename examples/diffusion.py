"""Train a diffusion model with InfoBatch, on scores that do not depend on the noise levels that were drawn.

    python examples/diffusion.py
    torchrun --nproc-per-node 2 examples/diffusion.py --policy quantile

A sample's loss is the mean over its pixels at one noise level t, drawn anew for each visit. It says more about t than
about the sample. So the score is the loss divided by the running mean of all losses near that t, and averaged over the
visits. ``--score loss`` and ``--score usual`` leave out both, or the averaging; at the end stands how well the recorded
scores put the samples in the order of their true losses, over all t. Devices and checkpoints are in train.py.
"""

import argparse
import math
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from recipe import add_policy_options, cosine, policy_of, set_rates
from torch import nn

from infobatch_stream import InfoBatchLoader, ScoreStore

NEEDS = "{}. What this example needs: pip install 'infobatch-stream[tools]'"

try:
    from scipy.stats import spearmanr
    from sklearn.datasets import load_digits
except ModuleNotFoundError as error:
    raise SystemExit(NEEDS.format(error)) from error

LEVELS = 1000  # noise levels
BINS = 20  # of levels that share a mean
NEWEST = 0.3  # share of the newest visit in an average score


def losses_of(predicted, noise):
    """float32[b], of float32[b, 64] twice: the mean over a sample's pixels."""
    return F.mse_loss(predicted, noise, reduction="none").mean(1)


class Usual(nn.Module):
    """The running mean loss of each bin of noise levels.

    It holds buffers: checkpoints have them, and DDP gives those of rank 0 to all ranks at each step.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("means", torch.zeros(BINS))
        self.register_buffer("visits", torch.zeros(BINS))

    @torch.no_grad()
    def score(self, losses, t, weight):
        """float32[b]: losses float32[b] at the levels int64[b], in units of what is usual there.

        Kept samples stand, by their weight float32[b], for those that were pruned: the means are those of all.
        """
        bins = t * BINS // LEVELS
        weights = torch.zeros(BINS).index_add(0, bins, weight)
        means = torch.zeros(BINS).index_add(0, bins, weight * losses) / weights.clamp(min=1e-6)
        self.visits += weights > 0
        step = (1 / self.visits.clamp(min=1)).clamp(min=0.05)  # at first a mean of all, later of some 20 steps
        self.means += torch.where(weights > 0, step * (means - self.means), 0)
        usual = self.means[bins]
        return torch.where(usual > 0, losses / usual.clamp(min=1e-12), 1)  # 0: rank 0 has not met this bin yet


class Denoiser(nn.Module):
    """Predicts the noise in float32[b, 64] at the levels int64[b]. LayerNorm, so that samples do not affect others."""

    def __init__(self, width=256, depth=3):
        super().__init__()
        self.usual = Usual()
        self.register_buffer("signal", torch.cos(torch.arange(1, LEVELS + 1) / LEVELS * 1.54) ** 2)  # its share
        self.into = nn.Linear(64 + 12, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(depth)
        )
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 64))

    def forward(self, x, t):
        angles = t[:, None] * 2 ** torch.arange(6) * math.pi / LEVELS
        x = self.into(torch.cat([x, angles.sin(), angles.cos()], 1))
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)

    def noisy(self, images, t, noise):
        """The images at these levels."""
        signal = self.signal[t][:, None]
        return signal.sqrt() * images + (1 - signal).sqrt() * noise


@torch.no_grad()
def true_losses(model, images):
    """float32[n]: the means over 100 levels, with the same noise at every call."""
    total, generator = torch.zeros(len(images)), torch.Generator().manual_seed(0)
    for level in range(LEVELS // 200, LEVELS, LEVELS // 100):
        t, noise = torch.full((len(images),), level), torch.randn(images.shape, generator=generator)
        total += losses_of(model(model.noisy(images, t, noise), t), noise)
    return total / 100


def main():
    parser = argparse.ArgumentParser(description="Train a diffusion model with InfoBatch.")
    add_policy_options(parser, default="soft", fraction=0.25)
    parser.add_argument("--score", choices=("loss", "usual", "average"), default="average")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=64, help="of all processes together")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", type=Path, default=Path("scores-diffusion.zarr"))
    parser.add_argument("--tiny", action="store_true", help="a run of seconds, to see that it works")
    args = parser.parse_args()

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if ranks > 1 else 0

    images = torch.from_numpy(load_digits().data).float() / 8 - 1
    test, train = images[::10], images[torch.arange(len(images)) % 10 > 0][: 256 if args.tiny else None]
    torch.manual_seed(args.seed + 1000 * rank)  # noise of its own for each rank; DDP gives all the weights of rank 0
    model = Denoiser()
    net = nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)

    trained, before = 0, torch.full((len(train),), torch.nan)
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
            for batch, picks in loader:
                set_rates(optimizer, cosine(loader.progress, args.lr))
                t, noise = torch.randint(LEVELS, (len(batch),)), torch.randn(batch.shape)
                losses = losses_of(net(model.noisy(batch, t, noise), t), noise)
                score = losses if args.score == "loss" else model.usual.score(losses, t, picks.weight)
                if args.score == "average":
                    old = before[picks.index]
                    score = torch.where(old.isnan(), score, old + NEWEST * (score - old))
                loss = loader.update(losses, picks, score=score)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            trained += loader.stats["kept"]
            if rank == 0:
                print(f"epoch {epoch}: {loader.stats['kept']} of {len(train)} samples")
            loader.commit()
            before = torch.from_numpy(ScoreStore.open(args.store, "r").scores.copy())  # of all ranks
    if rank == 0:
        saved = 1 - trained / (len(train) * loader.epochs)
        print(f"test loss {true_losses(model, test).mean():.4f}, trained on {trained} samples, saved {saved:.1%}")
        print(f"rank correlation of scores and true losses: {spearmanr(before, true_losses(model, train))[0]:.2f}")
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
