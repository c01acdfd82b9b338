"""A score store at one moment, its history with it, also while a run goes on with it."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from infobatch_stream import ScoreStore
from infobatch_stream._platform import free_memory
from infobatch_stream.errors import StoreError
from infobatch_stream.report.loss_history import Losses
from infobatch_stream.store.history import SHARES, Epoch, Training, epochs, training
from infobatch_stream.store.run_lock import RunLock

__all__ = ["Snapshot", "check_bounds"]

_TRIES: Final = 5
_BLOCK: Final = 1 << 20
_BYTES: Final = 16  # of memory that looking at a sample takes: its score, twice, and when it was trained on
_MOST: Final = 1 << 20  # epochs that a page can show

Floats = NDArray[np.float64]


def check_bounds(store: ScoreStore) -> None:
    """Raise StoreError for a store that would take more memory, or time, than there is."""
    free, needed = free_memory(), store.num_samples * _BYTES
    if free is not None and needed > free:
        raise StoreError(
            f"{store.path} has {store.num_samples:,} samples, and looking at them takes {needed / 2**30:.1f} GiB of "
            f"memory; {free / 2**30:.1f} GiB are free here. Do it on a larger machine."
        )
    if store.epoch > _MOST:
        raise StoreError(f"{store.path} says that it has {store.epoch:,} epochs; no more than {_MOST:,} can be shown.")


@dataclass(frozen=True)
class Snapshot:
    """What a store holds after ``epoch`` epochs. scores: float32[N], NaN = never seen; epochs: those that are known.

    user: the process that trains on it, if one does. training, losses: None where they were not kept.
    """

    store: ScoreStore
    epoch: int
    scores: NDArray[np.float32]
    user: str
    epochs: list[Epoch]
    training: Training | None
    losses: Losses | None

    @classmethod
    def take(cls, path: Path) -> Self:
        """The store at ``path``. Raises StoreError when there is none, or it cannot be read."""
        for _ in range(_TRIES):
            store = ScoreStore.open(path, mode="r")
            check_bounds(store)
            epoch, scores = store.epoch, np.array(store.scores)
            scores[np.isinf(scores)] = np.nan  # a bit was flipped; as a run takes it
            if ScoreStore.open(path, mode="r").epoch == epoch:  # else the scores may be of both
                break
        else:
            raise StoreError(f"{path} was committed to {_TRIES} times while it was read; try again.")
        # What comes later than this epoch may be half written.
        return cls(
            store,
            epoch,
            scores,
            RunLock.of(store.path),
            [one for one in epochs(store.path) if one.number < epoch],
            training(store.path, epoch),
            Losses.open(store.path, store.num_samples, epoch),
        )

    @property
    def never_seen(self) -> int:
        """Samples without a score."""
        parts = range(0, self.scores.size, _BLOCK)
        return sum(int(np.count_nonzero(np.isnan(self.scores[start : start + _BLOCK]))) for start in parts)

    def now(self) -> Epoch:
        """The scores as they are, described as those that an epoch left."""
        return Epoch(self.epoch - 1, 0, 0, 0, math.nan, math.nan).describing(self.scores)

    def by_epoch(self, name: str) -> Floats:
        """float64[E]: a fact of each epoch, NaN where it is not known."""
        found = np.full(self.epoch, np.nan)
        for one in self.epochs:
            found[one.number] = getattr(one, name)
        return found

    def quantile(self, share: float) -> Floats:
        """float64[E]: a quantile, of SHARES, of the scores that each epoch left; NaN where it is not known."""
        found = np.full(self.epoch, np.nan)
        for one in self.epochs:
            found[one.number] = one.quantiles[SHARES.index(share)]
        return found

    def histograms(self) -> NDArray[np.int64]:
        """int64[E, 256]: of the scores that each epoch left, between EDGES; 0 where it is not known."""
        found = np.zeros((self.epoch, 256), np.int64)
        for one in self.epochs:
            found[one.number] = one.histogram
        return found

    @property
    def saved(self) -> float:
        """Share of the entries of the known epochs that was not trained on; NaN without any."""
        entries = sum(one.entries for one in self.epochs)
        return 1 - sum(one.trained for one in self.epochs) / entries if entries else math.nan

    def seconds(self) -> tuple[Floats, Floats]:
        """float64[E] each: what an epoch took, and what it would have taken with all of its entries; NaN = not known.

        The latter is an estimate: so many seconds for each entry as it took for each that it trained on.
        """
        took, entries, trained = (self.by_epoch(name) for name in ("seconds", "entries", "trained"))
        with np.errstate(divide="ignore", invalid="ignore"):
            whole = np.where(trained > 0, took * entries / trained, np.nan)
        return np.where(np.isnan(whole), np.nan, took), whole
