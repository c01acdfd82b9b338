"""Train a small CNN on scikit-learn's handwritten digits, as MDS shards, with Ray Train and InfoBatch.

    python examples/ray_train.py --epochs 10                     # two workers; Ray is started here, and ends with it
    python examples/ray_train.py --epochs 10 --kill-after 40     # a worker is killed in mid-epoch, and Ray goes on
    RAY_ADDRESS=auto python examples/ray_train.py --workers 8    # on a cluster; --folder on a disk that all nodes see

Run it again with the same --folder to go on from the last checkpoint there.
"""

import argparse
import math
import os
import signal
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from infobatch_stream import InfoBatchLoader
from infobatch_stream.convert import write_shards

NEEDS = "{}. What this example needs: pip install 'infobatch-stream[mds,tools,trainers]'"

try:
    import ray
    import ray.train
    from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer, get_device, prepare_model
    from sklearn.datasets import load_digits
    from streaming import StreamingDataset
except ImportError as error:  # Ray's own, where parts of ray[train] are missing
    raise SystemExit(NEEDS.format(error)) from error

TRAIN = 1500  # of 1,797; the rest are held out
FILE = "state.pt"


def to_batch(samples):
    """Samples of the shards as float32[b, 1, 8, 8] and int64[b]."""
    images = np.stack([sample["image"] for sample in samples])
    return torch.tensor(images, dtype=torch.float32)[:, None] / 16, torch.tensor([s["label"] for s in samples])


def train(config: dict) -> None:
    """What each worker does; again from the last checkpoint, when Ray starts it anew."""
    context = ray.train.get_context()
    rank, ranks, device = context.get_world_rank(), context.get_world_size(), get_device()
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 4 * 4, 10),
    ).to(device)  # fmt: skip
    model = prepare_model(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    batch_size = config["global_batch"] // ranks  # so that the run may go on with another number of workers
    loader = InfoBatchLoader(
        StreamingDataset(local=config["shards"], batch_size=batch_size),
        "scores.zarr",  # in the working folder that Ray gives to this run on each node
        batch_size=batch_size,
        epochs=config["epochs"],
        collate_fn=to_batch,
        constant_steps=config["constant_steps"],
        existing="overwrite",  # what a try without a checkpoint left; load_state_dict replaces the scores anyway
    )
    checkpoint = ray.train.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder, FILE), map_location=device, weights_only=True)
        net.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        loader.load_state_dict(state["loader"])
        if rank == 0:
            print(f"goes on at step {loader.step} of epoch {loader.epoch}")

    def save(**metrics) -> None:
        state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "loader": loader.state_dict()}
        with tempfile.TemporaryDirectory() as folder:
            if rank == 0:  # it has the scores; the others took part in loader.state_dict()
                torch.save(state, Path(folder, FILE))
            mine = Checkpoint.from_directory(folder) if rank == 0 else None
            ray.train.report({"epoch": loader.epoch, "saved": loader.stats["saved"], **metrics}, checkpoint=mine)

    steps = 0
    with loader:
        for epoch in range(loader.epoch, loader.epochs):
            for (images, labels), picks in loader:
                losses = F.cross_entropy(model(images.to(device)), labels.to(device), reduction="none")
                loader.update(losses, picks).backward()
                for group in optimizer.param_groups:
                    group["lr"] = 0.05 * 0.5 * (1 + math.cos(math.pi * loader.progress))
                optimizer.step()
                optimizer.zero_grad()
                steps += 1
                if loader.step % config["save_every"] == 0:
                    save()
                if steps == config["kill_after"] and rank == ranks - 1 and not checkpoint:
                    ray.train.get_all_reported_checkpoints()  # returns when Ray has taken note of the last one
                    os.kill(os.getpid(), signal.SIGKILL)
            if rank == 0:
                print(f"epoch {epoch}: {loader.step} steps, saved {loader.stats['saved']:.1%}")
    digits = load_digits()
    held_out = config["held_out"]
    with torch.no_grad():
        images = torch.tensor(digits.images[held_out], dtype=torch.float32, device=device)[:, None] / 16
        right = net(images).argmax(1).cpu() == torch.tensor(digits.target[held_out])
    save(accuracy=right.float().mean().item())


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small CNN on digits with Ray Train and InfoBatch.")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--global-batch", type=int, default=64, help="of all workers together")
    parser.add_argument("--constant-steps", action="store_true")
    parser.add_argument("--save-every", type=int, default=10, help="steps of an epoch between checkpoints")
    parser.add_argument("--folder", type=Path, default=Path("digits-ray"), help="of shards and checkpoints")
    parser.add_argument("--kill-after", type=int, default=-1, help="kill a worker after that many steps, to try that")
    args = parser.parse_args()

    folder = args.folder.resolve()
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    if not (folder / "shards").exists():
        samples = ({"image": digits.images[i].astype(np.uint8), "label": int(digits.target[i])} for i in order[:TRAIN])
        write_shards(samples, folder / "shards", "mds")
    config = {name: value for name, value in vars(args).items() if name not in {"workers", "folder"}}
    config |= {"shards": str(folder / "shards"), "held_out": order[TRAIN:]}
    if not os.environ.get("RAY_ADDRESS"):
        ray.init("local", num_cpus=args.workers)
    trainer = TorchTrainer(
        train,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=args.workers, use_gpu=torch.cuda.is_available()),
        run_config=RunConfig(
            name="digits", storage_path=str(folder / "runs"), failure_config=FailureConfig(max_failures=3)
        ),
    )
    result = trainer.fit()
    print(f"accuracy {result.metrics['accuracy']:.3f} on {len(order) - TRAIN} held out")


if __name__ == "__main__":
    main()
