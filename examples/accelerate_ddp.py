"""Train a small CNN on scikit-learn's handwritten digits, as WebDataset tars, with Accelerate and InfoBatch.

    python examples/accelerate_ddp.py --epochs 10
    torchrun --nproc-per-node 2 examples/accelerate_ddp.py --epochs 10     # or: accelerate launch --multi_gpu ...

Run it again to go on from the last checkpoint in --folder; --stop-after N ends a run after N steps, to try that.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from infobatch_stream import IndexedWebDataset, InfoBatchLoader
from infobatch_stream.convert import write_shards

NEEDS = "{}. What this example needs: pip install 'infobatch-stream[examples,tools,wds]'"

try:
    from accelerate import Accelerator
    from accelerate.utils import set_seed
    from sklearn.datasets import load_digits

    from infobatch_stream.frameworks.accelerate import AcceleratedLoader
except ModuleNotFoundError as error:
    raise SystemExit(NEEDS.format(error)) from error

TRAIN = 1500  # of 1,797; the rest are held out


def to_batch(samples):
    """(pixels, label) of the shards as float32[b, 1, 8, 8] and int64[b]."""
    pixels, labels = zip(*samples, strict=True)
    return torch.tensor(np.stack(pixels), dtype=torch.float32)[:, None] / 16, torch.tensor([int(x) for x in labels])


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small CNN on digits with Accelerate and InfoBatch.")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16, help="per process and step of accumulation")
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--mixed-precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--folder", type=Path, default=Path("digits-accelerate"), help="of shards and checkpoints")
    parser.add_argument("--stop-after", type=int, default=-1)
    args = parser.parse_args()

    accelerator = Accelerator(
        gradient_accumulation_steps=args.accumulate,
        mixed_precision=args.mixed_precision,
        cpu=not torch.cuda.is_available(),
    )
    set_seed(0)
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    shards, checkpoint = args.folder / "shards", args.folder / "checkpoint"
    with accelerator.local_main_process_first():  # the others find the shards there
        if not shards.exists():
            samples = ({"npy": digits.images[i], "cls": int(digits.target[i])} for i in order[:TRAIN])
            write_shards(samples, shards, "wds")

    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 4 * 4, 10),
    )  # fmt: skip
    loader = InfoBatchLoader(
        IndexedWebDataset(shards).decode().to_tuple("npy", "cls"),
        args.folder / "scores.zarr",
        batch_size=args.batch_size,
        epochs=args.epochs,
        collate_fn=to_batch,
    )
    batches = AcceleratedLoader(loader, accelerator)
    optimizer = torch.optim.SGD(net.parameters(), lr=args.lr, momentum=0.9)
    schedule = LambdaLR(optimizer, lambda _: 0.5 * (1 + math.cos(math.pi * loader.progress)))
    model, optimizer, schedule = accelerator.prepare(net, optimizer, schedule)

    if checkpoint.exists():
        accelerator.load_state(checkpoint)
        accelerator.print(f"goes on at step {loader.step} of epoch {loader.epoch}")
    steps = 0
    with loader:
        for epoch in range(loader.epoch, loader.epochs):
            for (images, labels), picks in batches:
                with accelerator.accumulate(model):
                    losses = F.cross_entropy(model(images), labels, reduction="none")
                    accelerator.backward(loader.update(losses, picks))
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
                steps += accelerator.sync_gradients
                if steps == args.stop_after:  # as a job does whose time is over; nothing is committed
                    accelerator.save_state(checkpoint)
                    raise SystemExit
            accelerator.save_state(checkpoint)
            accelerator.print(f"epoch {epoch}: {loader.stats['steps']} steps, saved {loader.stats['saved']:.1%}")
    images, labels = to_batch([(digits.images[i], digits.target[i]) for i in order[TRAIN:]])
    with torch.no_grad():
        right = accelerator.unwrap_model(model)(images.to(accelerator.device)).argmax(1).cpu() == labels
    accelerator.print(f"accuracy {right.float().mean():.3f} on {len(right)} held out")
    accelerator.end_training()


if __name__ == "__main__":
    main()
