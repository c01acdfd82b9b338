"""Train a small CNN on scikit-learn's handwritten digits with Lightning and InfoBatch: one process or torchrun.

    python examples/lightning_ddp.py --epochs 10
    torchrun --nproc-per-node 2 examples/lightning_ddp.py --epochs 10

Run it again to go on from the last checkpoint in --folder; --stop-after N ends a run after N steps, to try that.
"""

import argparse
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from infobatch_stream import InfoBatchLoader

NEEDS = "{}. What this example needs: pip install 'infobatch-stream[examples,tools]'"

try:
    from lightning.pytorch import LightningModule, Trainer, seed_everything
    from lightning.pytorch.callbacks import ModelCheckpoint
    from sklearn.datasets import load_digits

    from infobatch_stream.frameworks.lightning import InfoBatchCallback
except ModuleNotFoundError as error:
    raise SystemExit(NEEDS.format(error)) from error


class Digits(LightningModule):
    def __init__(self, loader: InfoBatchLoader, lr: float, stop_after: int) -> None:
        super().__init__()
        self.loader, self.lr, self.stop_after = loader, lr, stop_after
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(32 * 4 * 4, 10),
        )  # fmt: skip

    def training_step(self, batch, batch_idx):
        (images, labels), picks = batch
        losses = F.cross_entropy(self.net(images), labels, reduction="none")
        return self.loader.update(losses, picks)

    def on_train_start(self):
        if self.loader.progress:
            self.print(f"goes on at step {self.loader.step} of epoch {self.loader.epoch}")

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.trainer.should_stop |= self.global_step == self.stop_after

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        accuracy = (self.net(images).argmax(1) == labels).float().mean()
        self.log("accuracy", accuracy, batch_size=len(labels), sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        schedule = LambdaLR(optimizer, lambda _: 0.5 * (1 + math.cos(math.pi * self.loader.progress)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small CNN on digits with Lightning and InfoBatch.")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32, help="per process")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("digits-lightning"), help="of scores and checkpoints")
    parser.add_argument("--stop-after", type=int, default=-1)
    args = parser.parse_args()

    seed_everything(0, verbose=False)
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target))
    train, held_out = torch.utils.data.random_split(data, [1500, 297], torch.Generator().manual_seed(0))
    loader = InfoBatchLoader(
        train,
        args.folder / "scores.zarr",
        batch_size=args.batch_size,
        epochs=args.epochs,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
    )
    trainer = Trainer(
        max_epochs=loader.epochs,
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", "1")),
        callbacks=[InfoBatchCallback(loader), ModelCheckpoint(args.folder, save_last=True)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model, validation = Digits(loader, args.lr, args.stop_after), DataLoader(held_out, 256)
    trainer.fit(model, loader, validation, ckpt_path="last")
    (metrics,) = trainer.validate(model, validation, verbose=False)
    if trainer.is_global_zero:
        print(f"epoch {loader.epoch}, step {loader.step}, saved {loader.stats['saved']:.1%}")
        print(f"accuracy {metrics['accuracy']:.3f} on {len(held_out)} held out")


if __name__ == "__main__":
    main()
