"""The process that trains: its rank, device and precision, and what all ranks do together."""

import os
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Subset


class Process:
    """The only process, or one of those that torchrun started.

    rank of world_size; leads: whether it is rank 0, which prints and saves; device: a GPU of its own, or the CPU.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        """``dtype``: of the forward pass; None for float32. float16 has its loss scaled by ``scaler``."""
        self.rank, self.world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.leads = self.rank == 0
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)
        if self.world_size > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        self._dtype = dtype
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype is torch.float16)

    def take(self, tensor: torch.Tensor, **options) -> torch.Tensor:
        """``tensor`` on the device; from pinned memory without waiting for it."""
        return tensor.to(self.device, non_blocking=True, **options)

    def autocast(self):
        """A context in which the forward pass is computed in ``dtype``."""
        return nullcontext() if self._dtype is None else torch.autocast(self.device.type, self._dtype)

    def wrap(self, model: nn.Module) -> nn.Module:
        """``model``, whose gradients are averaged over the ranks."""
        return nn.parallel.DistributedDataParallel(model) if self.world_size > 1 else model

    def first(self, work) -> None:
        """Have rank 0 alone do ``work()``, while the others wait."""
        if self.leads:
            work()
        if self.world_size > 1:
            dist.barrier()

    @torch.no_grad()
    def evaluate(self, model: nn.Module, dataset, collate_fn, batch_size: int, workers: int = 0):
        """(right answers, samples, mean loss) of ``model`` over ``dataset``, each of its samples counted once.

        Every rank reads a share of its own, of consecutive samples so that it needs few shards. The shares are not
        filled up to equal sizes: the model is no DistributedDataParallel, and only the sums at the end are exchanged.
        """
        samples = getattr(dataset, "num_samples", None) or len(dataset)  # len of a StreamingDataset is that of a rank
        bounds = [samples * rank // self.world_size for rank in (self.rank, self.rank + 1)]
        if self.world_size > 1:
            for buffer in model.buffers():  # after a step the running means of BatchNorm are each rank's own
                dist.broadcast(buffer, 0)
        was_training = model.training
        model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        share = Subset(dataset, range(*bounds))
        generator = torch.Generator()  # else the user's own would be drawn from
        for images, answers in DataLoader(
            share, batch_size, collate_fn=collate_fn, num_workers=workers, generator=generator
        ):
            with self.autocast():
                outputs = model(self.take(images))
            labels = self.take(answers)
            losses = F.cross_entropy(outputs.float(), labels, reduction="none")
            right = outputs.argmax(1) == labels
            sums += torch.stack([right, torch.ones_like(right), losses]).double().sum(1)
        model.train(was_training)
        if self.world_size > 1:
            dist.all_reduce(sums)
        right, count, loss = sums.tolist()
        return int(right), int(count), loss / count

    def end(self) -> None:
        """Leave the process group."""
        if self.world_size > 1:
            dist.destroy_process_group()


def save(path: Path, state: dict) -> None:
    """Write ``state`` to ``path``, where it appears when it is whole."""
    new = path.with_suffix(".new")
    torch.save(state, new)
    new.replace(path)


def load(path: Path) -> dict:
    """What `save` wrote; it runs nothing. Ends the script, with the name of the file, when it cannot be read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has many for a file that was cut off
        raise SystemExit(f"{path} cannot be read ({error}): take an earlier checkpoint, or remove it.") from error
