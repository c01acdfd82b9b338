"""In which order samples are written, and which of them go into one shard: known before the first is read.

So any number of processes writes the same shards, and a conversion that was broken off knows what it has.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Task", "cut", "order_of"]


@dataclass(frozen=True)
class Task:
    """Samples that are written as one shard (as several, where they turn out larger than they were taken for).

    number: 0, 1, ... over all sets. part: number of the set. first: place of the first sample in the order of the set.
    positions: int64[n], of the samples in the set, in their order. gone: of samples that are no more, a text each.
    """

    number: int
    part: int
    first: int
    positions: NDArray[np.int64]
    gone: tuple[str, ...] = ()


def order_of(count: int, seed: int | None) -> NDArray[np.int64]:
    """int64[count]: the positions in the order in which they are written; as they are without a ``seed``."""
    return np.arange(count) if seed is None else np.random.default_rng(seed).permutation(count)


def cut(sizes: NDArray[np.int64], limit: int, most: int | None = None) -> list[int]:
    """Where samples of ``sizes`` bytes, int64[n], are cut: bounds of n+1 at most, the first 0, the last n.

    A piece has as many samples as fit ``limit`` bytes, ``most`` at most, and one at least.
    """
    ends, bounds = np.cumsum(sizes), [0]
    while (start := bounds[-1]) < len(sizes):
        before = int(ends[start - 1]) if start else 0
        stop = max(int(np.searchsorted(ends, before + limit, side="right")), start + 1)
        bounds.append(stop if most is None else min(stop, start + most))
    return bounds
