"""The losses of every epoch, where a run kept them (InfoBatchLoader(history=True)): read in blocks of samples."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.store.history import blocks
from infobatch_stream.store.recorded_losses import Recorded

__all__ = ["Losses", "Moments"]

Floats = NDArray[np.float64]

_BLOCK = 1 << 16  # samples whose moments are brought up to date at once: what is made of them stays in the cache


@dataclass(frozen=True)
class Moments:
    """Of the recorded losses of the samples from ``start`` on: how many (float64[n]), mean, standard deviation, lowest.

    NaN for samples without losses.
    """

    start: int
    times: Floats
    mean: Floats
    spread: Floats
    lowest: Floats


class Losses(Recorded):
    """The losses that were recorded; in memory is one epoch of a block of samples at a time."""

    @classmethod
    def open(cls, path: Path, num_samples: int, epochs: int) -> Self | None:
        """Those of the store at ``path``; None where none were kept. Raises StoreError for what cannot be read."""
        found = super().open(path, num_samples, epochs)
        return None if found is None or found.epochs <= found.since else found

    def moments(self) -> Iterator[Moments]:
        """Of all samples, block by block. Raises StoreError for what cannot be read."""
        for number, block in enumerate(blocks(self.num_samples)):
            sums = [_Sums(min(_BLOCK, block.stop - at)) for at in range(block.start, block.stop, _BLOCK)]
            for epoch in range(self.since, self.epochs):
                row = self.row(epoch, number)
                for part, one in enumerate(sums):
                    one.add(row[part * _BLOCK : (part + 1) * _BLOCK])
            parts = zip(*(one.result() for one in sums), strict=True)
            yield Moments(block.start, *map(np.concatenate, parts))

    def moments_of(self, index: NDArray[np.int64]) -> tuple[Floats, Floats, Floats, Floats]:
        """How many losses each of ``index`` (int64[k]) has, their mean, standard deviation, lowest: float64[k] each."""
        sums = _Sums(index.size)
        for losses in self.of(index)[self.since :]:
            sums.add(losses)
        return sums.result()

    def of(self, index: NDArray[np.int64]) -> NDArray[np.float32]:
        """float32[E, k]: the losses of the samples ``index`` (int64[k]) in each epoch, NaN where they have none.

        Epoch since - 1, if there is one, has what the samples' scores were then. Raises StoreError.
        """
        found = np.full((self.epochs, index.size), np.nan, np.float32)
        for number, block in enumerate(blocks(self.num_samples)):
            places = np.flatnonzero((index >= block.start) & (index < block.stop))
            for epoch in range(max(self.since - 1, 0), self.epochs) if places.size else ():
                found[epoch, places] = self.row(epoch, number)[index[places] - block.start]
        return found


class _Sums:
    """Welford's sums of the losses of n samples."""

    def __init__(self, size: int) -> None:
        self._times, self._mean, self._squares = (np.zeros(size) for _ in range(3))
        self._lowest = np.full(size, np.inf)

    def add(self, losses: NDArray[np.float32]) -> None:
        """An epoch: float32[n], NaN for samples without a loss."""
        seen = ~np.isnan(losses)
        self._times += seen
        gap = np.where(seen, losses - self._mean, 0.0)
        self._mean += gap / np.maximum(self._times, 1.0)
        self._squares += gap * np.where(seen, losses - self._mean, 0.0)
        np.fmin(self._lowest, losses, out=self._lowest)

    def result(self) -> tuple[Floats, Floats, Floats, Floats]:
        """times, mean, spread, lowest."""
        times, seen = self._times, self._times > 0
        spread = np.sqrt(self._squares / np.maximum(times, 1.0))
        mean, spread, lowest = (np.where(seen, one, np.nan) for one in (self._mean, spread, self._lowest))
        return times, mean, spread, lowest
