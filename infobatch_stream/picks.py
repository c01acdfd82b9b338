"""What travels with a batch: which samples it holds and what they weigh."""

from typing import Any, Self

import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Picks"]


class Picks:
    """The indices and weights of a batch of b samples.

    Attributes:
        index: int64[b] on the CPU, always: it is for looking up and recording, and never becomes a float.
        weight: float32[b], 1 / keep probability; 0 where the batch was filled up (such entries are not recorded).
    """

    __slots__ = ("_epoch", "_record", "_replaced", "_step", "index", "weight")

    def __init__(
        self, index: Tensor, weight: Tensor, record: Tensor, epoch: int, step: int | None, replaced: tuple[str, ...]
    ) -> None:
        """For the loader.

        record: bool[b], which entries record. epoch, step: the moment of the batch; step None for one that was
        only peeked at. replaced: why samples of the batch could not be read.
        """
        self.index = index
        self.weight = weight
        self._record = record
        self._epoch = epoch
        self._step = step
        self._replaced = replaced

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel as arrays. From a worker, a tensor would take a shared memory file and a connection of its own."""
        rest = (self._epoch, self._step, self._replaced)
        if self.weight.device.type != "cpu":  # copied within a process; workers have none such
            return type(self), (self.index, self.weight, self._record, *rest)
        arrays = (self.index.numpy(), self.weight.numpy(), self._record.numpy())
        return _of_arrays, (type(self), arrays, *rest)

    def _with_weight(self, weight: Tensor) -> Self:
        return type(self)(self.index, weight, self._record, self._epoch, self._step, self._replaced)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Self:
        """Picks with the weight on ``device``; the index stays on the CPU."""
        return self._with_weight(self.weight.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Picks with the weight in pinned memory; a DataLoader with ``pin_memory=True`` calls this."""
        return self._with_weight(self.weight.pin_memory())

    def __len__(self) -> int:
        """How many samples the batch holds, filled-up ones included."""
        return int(self.index.numel())

    def __repr__(self) -> str:
        """Size, epoch and step."""
        return f"Picks({len(self)} samples, epoch={self._epoch}, step={self._step})"


def _of_arrays(
    kind: type[Picks], arrays: tuple[NDArray[Any], ...], epoch: int, step: int | None, replaced: tuple[str, ...]
) -> Picks:
    index, weight, record = map(torch.from_numpy, arrays)
    return kind(index, weight, record, epoch, step, replaced)
