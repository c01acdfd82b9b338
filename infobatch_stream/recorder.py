"""Losses from the device to the store, without a step waiting for the device."""

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infobatch_stream.pinned_ring import PinnedRing
from infobatch_stream.store.score_store import ScoreStore

__all__ = ["Recorder"]


class Recorder:
    """Hands losses to the store.

    Losses on the CPU are recorded at once. Those on a CUDA device are copied to pinned memory in the stream's own
    order, and recorded when the copies of several steps are found finished: in a later step, or at `flush`.

    Attributes:
        ring: By which weights go to the device, and losses come back.
        not_finite: How many losses were NaN or infinite, and so not recorded.
    """

    def __init__(self) -> None:
        self._store: ScoreStore | None = None
        self.ring = PinnedRing()
        self.not_finite = 0

    def attach(self, store: ScoreStore) -> None:
        """Record to ``store`` from now on; what is under way is of a run that was left, and is dropped."""
        self.ring.drop()
        self._store = store

    def add(self, index: NDArray[np.int64], record: NDArray[np.bool_], losses: Tensor) -> None:
        """Take losses (float[k], any device and float type) of the samples ``index`` where ``record`` is true."""
        values = losses.detach()
        if values.dtype is not torch.float32:
            values = values.to(torch.float32)
        if self.ring.device.holds(values):
            # Copied, so that a worker's shared memory is not held until then.
            self.ring.to_host(values, partial(self._write, index.copy(), record.copy()))
        else:
            self._write(index, record, values.numpy(force=True))  # from whichever device

    def flush(self) -> None:
        """Record everything that was added; waits for the copies that are under way."""
        self.ring.flush()

    def _write(self, index: NDArray[np.int64], record: NDArray[np.bool_], losses: NDArray[np.float32]) -> None:
        # Masked here and not on the device, where a mask would make the step wait.
        if not np.logical_and.reduce(record):  # half the time of record.all()
            index, losses = index[record], losses[record]
        assert self._store is not None
        self.not_finite += self._store.record(index, losses)
