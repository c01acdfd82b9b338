"""The published algorithm (Qin et al., ICLR 2024), written anew from its description: the peer for planning.

An epoch is chosen on whole arrays: masks below the mean, a choice without replacement, a list of all kept indices that
is shuffled. Every rank does so, for itself.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["first_batch"]


def first_batch(
    scores: NDArray[np.float32], ratio: float, seed: int, batch: int
) -> tuple[list[int], NDArray[np.float64]]:
    """Plan an epoch, and give the indices and weights of its first batch."""
    random = np.random.RandomState(seed)
    well_learned = scores < scores.mean()
    low = np.where(well_learned)[0]
    chosen = random.choice(low, int((1 - ratio) * len(low)), replace=False)
    kept = np.where(~well_learned)[0].tolist()
    kept.extend(chosen.tolist())
    weights = np.ones(len(scores))
    weights[chosen] = 1 / (1 - ratio)
    random.shuffle(kept)
    first = kept[:batch]
    return first, weights[first]
