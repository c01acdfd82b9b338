"""What travels with a batch: which samples it holds and what they weigh."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Origin", "Picks"]


@dataclass(frozen=True)
class Origin:
    """Where a batch comes from.

    Attributes:
        run: Of the loader that made it, a number that no other loader of this process has.
        epoch: Of that run.
        step: None for a batch that was only peeked at.
        replaced: Why samples of the batch could not be read.
    """

    run: int
    epoch: int
    step: int | None
    replaced: tuple[str, ...] = ()


class Picks:
    """The indices and weights of a batch of b samples.

    ``picks[order]`` are those of other rows, for a batch whose rows were put in another order, or left out.

    Attributes:
        index: int64[b] on the CPU, always: it is for looking up and recording, and never becomes a float.
        weight: float32[b], 1 / keep probability; 0 where the batch was filled up (such entries are not recorded).
        sample_weight: float32[b], what the loader's ``sample_weight`` gives these samples; None without.
    """

    __slots__ = ("_origin", "_record", "index", "sample_weight", "weight")

    def __init__(
        self, index: Tensor, weight: Tensor, record: Tensor, origin: Origin, sample_weight: Tensor | None = None
    ) -> None:
        """For the loader. record: bool[b], which entries record."""
        self.index = index
        self.weight = weight
        self.sample_weight = sample_weight
        self._record = record
        self._origin = origin

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel as arrays. From a worker, a tensor would take a shared memory file and a connection of its own."""
        origin = self._origin
        if self.weight.device.type != "cpu":  # copied within a process; workers have none such
            return type(self), (self.index, self.weight, self._record, origin, self.sample_weight)
        arrays = [
            part.numpy() for part in (self.index, self.weight, self._record, self.sample_weight) if part is not None
        ]
        return _of_arrays, (type(self), arrays, origin.run, origin.epoch, origin.step, origin.replaced)

    def _with_weights(self, move: Callable[[Tensor], Tensor]) -> Self:
        given = None if self.sample_weight is None else move(self.sample_weight)
        return type(self)(self.index, move(self.weight), self._record, self._origin, given)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Self:
        """Picks with the weights on ``device``; the index stays on the CPU."""
        return self._with_weights(lambda weight: weight.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Picks with the weights in pinned memory; a DataLoader with ``pin_memory=True`` calls this."""
        return self._with_weights(Tensor.pin_memory)

    def __getitem__(self, order: Tensor | NDArray[Any] | list[int] | list[bool] | slice) -> Self:
        """Picks of the rows ``order``: their places (whole numbers), a bool for each row, or a slice.

        Raises TypeError for one place alone and for a tensor of uint8, IndexError for a place that there is not.
        """
        if isinstance(order, Tensor) and order.dtype == torch.uint8:  # a mask to torch, places to NumPy
            raise TypeError("picks[...] does not take uint8: give mask.bool(), or places.long().")
        places = order if isinstance(order, slice) else np.asarray(torch.as_tensor(order, device="cpu"))
        if isinstance(places, np.ndarray) and not places.size:
            places = places.astype(np.int64)  # an empty list has the type of a float
        chosen = np.arange(len(self))[places]
        if chosen.ndim != 1:
            raise TypeError(f"picks[{order!r}]: give the places of several rows, as picks[[2, 0, 1]] or picks[mask].")
        rows = torch.from_numpy(chosen.copy())
        weight = self.weight[rows.to(self.weight.device)]
        given = None if self.sample_weight is None else self.sample_weight[rows.to(self.sample_weight.device)]
        return type(self)(self.index[rows], weight, self._record[rows], self._origin, given)

    def __len__(self) -> int:
        """How many samples the batch holds, filled-up ones included."""
        return int(self.index.numel())

    def __repr__(self) -> str:
        """Size, epoch and step."""
        return f"Picks({len(self)} samples, epoch={self._origin.epoch}, step={self._origin.step})"


def _of_arrays(kind: type[Picks], arrays: list[NDArray[Any]], *origin: Any) -> Picks:
    index, weight, record, *given = map(torch.from_numpy, arrays)
    return kind(index, weight, record, Origin(*origin), *given)
