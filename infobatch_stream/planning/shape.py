"""What planning knows of a dataset: how many samples it has, in which shards, and which entries an epoch draws from."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Pool", "Shape"]


@dataclass(frozen=True)
class Pool:
    """The entries that one epoch may draw from, when they are not simply 0..N-1 (stream mixing).

    index: int64[P], sample indices, with repeats, unit by unit.
    units: int64[U], how many entries each unit (a visit to a shard) has; they sum to P.
    """

    index: NDArray[np.int64]
    units: NDArray[np.int64]


class Shape(Protocol):
    """N samples, in S shards or none."""

    @property
    def num_samples(self) -> int:
        """N: samples have the indices 0..N-1, in the order (shard, row)."""

    @property
    def shard_sizes(self) -> NDArray[np.int64] | None:
        """int64[S], samples per shard, summing to N; None where samples lie in no shards (map-style)."""

    def pool(self, epoch: int) -> Pool | None:
        """The entries of ``epoch``; None for each sample once. The same on every rank."""
