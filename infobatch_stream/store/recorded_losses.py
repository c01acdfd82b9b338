"""The losses of every epoch, where a run kept them (InfoBatchLoader(history=True)), and the scores they come to."""

from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.errors import StoreError
from infobatch_stream.store.header import read_header
from infobatch_stream.store.history import blocks, initial_form, reading, recorded_form, step
from infobatch_stream.store.history_array import HistoryArray, has_group

__all__ = ["Recorded", "replay", "scores_at"]


class Recorded:
    """The losses of every epoch of the store at ``path``, where they were kept.

    Attributes: epochs: of how many there is a row. since: the first whose losses are there; the row before it is the
    scores as they were then. step: samples that are read at once at best.
    """

    def __init__(self, path: Path, rows: HistoryArray, num_samples: int, epochs: int) -> None:
        """Use `open`."""
        self._path, self._rows, self.num_samples, self.step = path, rows, num_samples, step()
        self.epochs = min(rows.rows, epochs)
        self.since = rows.attributes.get("since", 0)
        self._initial: HistoryArray | None = None

    @classmethod
    def open(cls, path: Path, num_samples: int, epochs: int) -> Self | None:
        """Those of the first ``epochs``, None without any. Raises StoreError for what cannot be read."""
        with reading(path):
            rows = HistoryArray.open(path, "recorded", recorded_form(num_samples)) if has_group(path) else None
            if rows is None:
                return None
            found = cls(path, rows, num_samples, epochs)
            found._initial = HistoryArray.open(path, "initial", initial_form(num_samples))
        return found

    def row(self, epoch: int, block: int) -> NDArray[np.float32]:
        """float32[k] of an epoch: block number ``block`` of ``step`` samples. NaN: not seen. Raises StoreError."""
        return self._read(self._rows, epoch, block)

    def initial(self, block: int) -> NDArray[np.float32]:
        """float32[k] likewise: the scores before the first epoch. NaN: not known. Raises StoreError."""
        if self._initial is None:
            return np.full(min(self.num_samples - block * self.step, self.step), np.nan, np.float32)
        return self._read(self._initial, 0, block)

    def _read(self, rows: HistoryArray, row: int, block: int) -> NDArray[np.float32]:
        with reading(self._path):
            size = min(self.num_samples - block * self.step, self.step)
            losses: NDArray[np.float32] = rows.read(row, block)[0, :size]
            losses[np.isinf(losses)] = np.nan  # which nothing that is written has
            return losses


def scores_at(path: Path, num_samples: int, epoch: int) -> NDArray[np.float32]:
    """float32[N]: the scores that the first ``epoch`` epochs left, NaN = never seen.

    Raises StoreError when the losses of one of them were not kept.
    """
    recorded = Recorded.open(path, num_samples, read_header(path).epoch)
    first, last = (1, 0) if recorded is None else (recorded.since, recorded.epochs)
    if recorded is None or not first <= epoch <= last:
        kept = f"those of {first} to {last} epochs" if first <= last else "none"
        raise StoreError(
            f"{path} does not have the scores that {epoch} epochs left, but {kept}; they are kept with "
            "InfoBatchLoader(history=True)."
        )
    scores = np.full(num_samples, np.nan, np.float32)
    for number, block in enumerate(blocks(num_samples)):
        part = scores[block]
        for row in range(epoch - 1, max(first - 1, 0) - 1, -1):  # the newest first: most often few are needed
            unseen = np.isnan(part)
            if not unseen.any():
                break
            part[unseen] = recorded.row(row, number)[unseen]
        if first == 0:
            np.copyto(part, recorded.initial(number), where=np.isnan(part))
    return scores


def replay(path: Path, num_samples: int) -> Iterator[NDArray[np.float32]]:
    """The scores that each epoch was planned with, and those that the last one left, float32[N].

    Nothing where they were not all kept. One array, which changes in place.
    """
    recorded = Recorded.open(path, num_samples, read_header(path).epoch)
    if recorded is None or recorded.since:
        return
    scores = np.full(num_samples, np.nan, np.float32)
    for number, block in enumerate(blocks(num_samples)):
        scores[block] = recorded.initial(number)
    yield scores
    for row in range(recorded.epochs):
        for number, block in enumerate(blocks(num_samples)):
            losses = recorded.row(row, number)
            np.copyto(scores[block], losses, where=~np.isnan(losses))
        yield scores
