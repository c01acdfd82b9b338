"""Train a small MLP on scikit-learn's handwritten digits with FSDP2, tensor parallelism and distributed checkpoints.

    torchrun --nproc-per-node 4 examples/fsdp.py --tp 2 --epochs 10

Run it again to go on from the last checkpoint in --folder, with as many ranks or with others: --batch-size times the
ranks over which data is split (all / --tp) has to stay the same. --stop-after N ends a run after N steps, to try that.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import TensorDataset

from infobatch_stream import BudgetPruning, InfoBatchLoader

NEEDS = "{}. What this example needs: pip install 'infobatch-stream[tools]'"

try:
    from sklearn.datasets import load_digits
except ModuleNotFoundError as error:
    raise SystemExit(NEEDS.format(error)) from error

TRAIN = 1500  # of 1,797; the rest are held out


class Model:
    """Model and optimizer, for a distributed checkpoint."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.parts = model, optimizer

    def state_dict(self):
        model, optimizer = get_state_dict(*self.parts)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state):
        set_state_dict(*self.parts, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small MLP on digits with FSDP2 and InfoBatch.")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32, help="per rank over which data is split")
    parser.add_argument("--tp", type=int, default=1, help="ranks that share a layer")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--folder", type=Path, default=Path("digits-fsdp"), help="of scores and checkpoints")
    parser.add_argument("--stop-after", type=int, default=-1)
    args = parser.parse_args()

    cuda = torch.cuda.is_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    device = torch.device("cuda", dist.get_node_local_rank(0)) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    ranks = dist.get_world_size()
    mesh = init_device_mesh(device.type, (ranks // args.tp, args.tp), mesh_dim_names=("dp", "tp"))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)

    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    loader = InfoBatchLoader(
        TensorDataset(images[:TRAIN], labels[:TRAIN]),
        args.folder / "scores.zarr",
        batch_size=args.batch_size,
        epochs=args.epochs,
        policy=BudgetPruning(0.3, spread="even"),
        constant_steps=True,
        process_group=mesh["dp"],
        existing="overwrite",  # the checkpoint has the scores
    )
    parts = {"model": Model(model, optimizer), "loader": loader}

    def save() -> None:
        dcp.save(parts, checkpoint_id=args.folder / f"checkpoint-{loader.epoch:03}-{loader.step:06}")

    if saved := sorted(args.folder.glob("checkpoint-*/.metadata")):  # which is written last
        dcp.load(parts, checkpoint_id=saved[-1].parent)
        if dist.get_rank() == 0:
            print(f"goes on at step {loader.step} of epoch {loader.epoch}")
    steps = 0
    with loader:
        for _ in range(loader.epoch, loader.epochs):
            for (x, y), picks in loader:
                losses = F.cross_entropy(model(x.to(device)), y.to(device), reduction="none")
                loader.update(losses, picks).backward()
                optimizer.step()
                optimizer.zero_grad()
                steps += 1
                if steps == args.stop_after:  # as a job does whose time is over; nothing is committed
                    save()
                    dist.destroy_process_group()
                    raise SystemExit
            save()
    with torch.no_grad():
        logits = model(images[TRAIN:].to(device))
    logits = logits.full_tensor() if isinstance(logits, DTensor) else logits
    right = logits.argmax(1).cpu() == labels[TRAIN:]
    if dist.get_rank() == 0:
        print(f"accuracy {right.float().mean():.3f} on {len(right)} held out, saved {loader.stats['saved']:.1%}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
