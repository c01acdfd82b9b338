"""Train a small CNN on image shards with InfoBatch: one process or torchrun, MDS or WebDataset, resumable.

    infobatch-stream convert IMAGES SHARDS --format mds        # or wds; IMAGES/<class>/<image>
    python examples/train.py SHARDS --epochs 10
    torchrun --nproc-per-node 2 examples/train.py SHARDS --epochs 10 --batch-size 32

SHARDS is a folder, or a URL: s3://bucket/folder of MDS shards, 's3://bucket/folder/*.tar' of tars; they are kept in
--cache as they are needed.

Run it again with the same --checkpoint to go on where it stopped, on any number of processes that divides the batch.
"""

import argparse
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from infobatch_stream import IndexedWebDataset, InfoBatchLoader

NEEDS = "{}. What this example needs: pip install 'infobatch-stream[tools,mds,wds]'"

try:
    from PIL import Image
except ModuleNotFoundError as error:
    raise SystemExit(NEEDS.format(error)) from error

SIDE = 32


def to_batch(samples):
    """A batch of MDS's dicts or WebDataset's tuples, as float32[b, 3, SIDE, SIDE] and int64[b]."""
    pairs = [(s["image"], s["label"]) if isinstance(s, dict) else s for s in samples]
    images = [Image.fromarray(image) if isinstance(image, np.ndarray) else image for image, _ in pairs]
    pixels = [np.asarray(image.convert("RGB").resize((SIDE, SIDE)), dtype=np.float32) for image in images]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255, torch.tensor(
        [int(label) for _, label in pairs]
    )


def open_dataset(shards: str, cache: str):
    """The dataset in a folder or at a URL, whichever kind the shards are."""
    if shards.endswith(".tar") or list(Path(shards).glob("*.tar")):
        return IndexedWebDataset(shards, cache_dir=cache).decode("pil").to_tuple("jpg;jpeg;png", "cls")
    try:
        from streaming import StreamingDataset
    except ModuleNotFoundError as error:
        raise SystemExit(NEEDS.format(error)) from error

    if "://" in shards:
        return StreamingDataset(remote=shards, local=cache)
    if not Path(shards, "index.json").exists():
        raise SystemExit(f"{shards} has neither index.json nor *.tar: infobatch-stream convert makes shards of images")
    return StreamingDataset(local=shards)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small CNN on image shards with InfoBatch.")
    parser.add_argument("shards", help="folder or URL of MDS shards or tars")
    parser.add_argument("--cache", default="cache", help="folder for shards that are downloaded")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64, help="per process")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--store", type=Path, default=Path("scores-train.zarr"), help="made if it is not there")
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoint.pt"), help="a run goes on from it")
    args = parser.parse_args()
    args.checkpoint.parent.mkdir(parents=True, exist_ok=True)

    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if distributed:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    leads = not distributed or dist.get_rank() == 0
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else "cpu"
    if torch.cuda.is_available():
        torch.cuda.set_device(device)

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * (SIDE // 4) ** 2, args.classes),
    ).to(device)  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    net = nn.parallel.DistributedDataParallel(model) if distributed else model

    with InfoBatchLoader(
        open_dataset(args.shards, args.cache),
        args.store,
        batch_size=args.batch_size,
        epochs=args.epochs,
        collate_fn=to_batch,
        num_workers=args.workers,
    ) as loader:
        if args.checkpoint.exists():
            try:
                saved = torch.load(args.checkpoint, weights_only=True, map_location="cpu")
            except Exception as error:  # torch has many for a file that was cut off
                raise SystemExit(f"{args.checkpoint} cannot be read ({error}): take an earlier one.") from error
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            loader.load_state_dict(saved["loader"])
            if leads and loader.epoch == loader.epochs:
                print(f"{args.checkpoint} is of a run that is complete; raise --epochs to train on")
        for epoch in range(loader.epoch, loader.epochs):
            for (images, labels), picks in loader:
                for group in optimizer.param_groups:
                    group["lr"] = args.lr * 0.5 * (1 + math.cos(math.pi * loader.progress))
                losses = F.cross_entropy(net(images.to(device)), labels.to(device), reduction="none")
                loss = loader.update(losses, picks)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            state = loader.state_dict()  # of all ranks together; rank 0 has the scores
            if leads:
                saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "loader": state}
                torch.save(saved, args.checkpoint.with_suffix(".new"))
                args.checkpoint.with_suffix(".new").replace(args.checkpoint)
                stats = loader.stats
                print(f"epoch {epoch}: {stats['steps']} steps, loss {loss.item():.3f}, saved {stats['saved']:.1%}")
    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
