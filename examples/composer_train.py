"""Train a small CNN on scikit-learn's handwritten digits, as MDS shards, with MosaicML Composer and InfoBatch.

    python examples/composer_train.py --epochs 10
    composer -n 2 examples/composer_train.py --epochs 10     # or: torchrun --nproc-per-node 2 ...

Composer 0.32 wants torch 2.7: give it an environment of its own. Run the example again to go on from the last
checkpoint in --folder; --stop-after N ends a run after N batches, to try that.
"""

import argparse
import math
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from infobatch_stream import InfoBatchLoader
from infobatch_stream.convert import write_shards

NEEDS = "{}. What this example needs: pip install mosaicml scikit-learn 'infobatch-stream[mds]'"

try:
    from composer import Callback, Logger, State, Trainer
    from composer.models import ComposerClassifier
    from composer.utils import dist
    from sklearn.datasets import load_digits
    from streaming import StreamingDataset

    from infobatch_stream.frameworks.composer import InfoBatchCallback
except ModuleNotFoundError as error:
    raise SystemExit(NEEDS.format(error)) from error

TRAIN = 1500  # of 1,797; the rest are held out


class StopAfter(Callback):
    """Ends the run after so many batches, as a job does whose time is over; Composer saves a checkpoint."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def batch_end(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch == self.batches:
            state.stop_training()


def to_batch(samples):
    """Samples of the shards as float32[b, 1, 8, 8] and int64[b]."""
    images = torch.tensor(np.stack([sample["image"] for sample in samples]), dtype=torch.float32)
    return images[:, None] / 16, torch.tensor([int(sample["label"]) for sample in samples])


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small CNN on digits with Composer and InfoBatch.")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32, help="per process")
    parser.add_argument("--microbatch", type=int, default=None, help="samples of a batch that are computed at once")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--constant-steps", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("digits-composer"), help="of shards and checkpoints")
    parser.add_argument("--stop-after", type=int, default=-1)
    args = parser.parse_args()

    device = "gpu" if torch.cuda.is_available() else "cpu"
    os.environ.setdefault("NODE_RANK", os.environ.get("GROUP_RANK", "0"))  # which torchrun does not set
    dist.initialize_dist(device)  # before the loader, which is split among the processes
    torch.manual_seed(0)
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    if dist.get_local_rank() == 0 and not (args.folder / "shards").exists():
        samples = ({"image": digits.images[i].astype(np.uint8), "label": int(digits.target[i])} for i in order[:TRAIN])
        write_shards(samples, args.folder / "shards", "mds")
    dist.barrier()

    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 4 * 4, 10),
    )  # fmt: skip
    loader = InfoBatchLoader(
        StreamingDataset(local=str(args.folder / "shards"), batch_size=args.batch_size),
        args.folder / "scores.zarr",
        batch_size=args.batch_size,
        epochs=args.epochs,
        constant_steps=args.constant_steps,
        collate_fn=to_batch,
    )
    infobatch = InfoBatchCallback(loader)
    held_out = [(torch.tensor(digits.images[i][None] / 16).float(), int(digits.target[i])) for i in order[TRAIN:]]
    trainer = Trainer(
        model=ComposerClassifier(net, num_classes=10, loss_fn=partial(F.cross_entropy, reduction="none")),
        train_dataloader=infobatch.data_spec,
        eval_dataloader=torch.utils.data.DataLoader(
            held_out, batch_size=99, sampler=dist.get_sampler(held_out, shuffle=False)
        ),
        optimizers=torch.optim.SGD(net.parameters(), lr=args.lr, momentum=0.9),
        schedulers=lambda state: 0.5 * (1 + math.cos(math.pi * loader.progress)),
        max_duration=f"{args.epochs}ep",
        callbacks=[infobatch, StopAfter(args.stop_after)],
        device=device,
        device_train_microbatch_size=args.microbatch,
        run_name="digits",
        save_folder=str(args.folder / "checkpoints"),
        save_interval="1ep",
        autoresume=True,
        progress_bar=False,
    )
    if trainer.state.timestamp.batch > 0 and dist.get_global_rank() == 0:
        print(f"goes on at step {loader.step} of epoch {loader.epoch}")
    trainer.fit()
    accuracy = float(trainer.state.eval_metric_values["MulticlassAccuracy"])
    saved = loader.stats["saved"]
    trainer.close()
    if dist.get_global_rank() == 0:
        print(f"accuracy {accuracy:.3f} on {len(held_out)} held out, saved {saved:.1%}")


if __name__ == "__main__":
    main()
