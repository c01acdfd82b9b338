"""Losses from the device to the store, without a step waiting for the device."""

from collections import deque
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infobatch_stream.store.score_store import ScoreStore

__all__ = ["Recorder"]

_IN_FLIGHT = 64  # copies under way at most: bounds pinned memory


class _Copy(NamedTuple):
    samples: NDArray[np.int64]
    record: NDArray[np.bool_]
    values: Tensor
    done: "torch.cuda.Event"


class Recorder:
    """Hands losses to the store.

    Losses on the CPU are recorded at once. Those on a CUDA device are copied to pinned memory in the stream's own
    order, and recorded when the copy is found finished: in a later step, or at `flush`.

    Attributes:
        not_finite: how many losses were NaN or infinite, and so not recorded.
    """

    def __init__(self) -> None:
        self._store: ScoreStore | None = None
        self._copies: deque[_Copy] = deque()
        self.not_finite = 0

    def attach(self, store: ScoreStore) -> None:
        """Record to ``store`` from now on; what is under way is of a run that was left, and is dropped."""
        self._copies.clear()
        self._store = store

    def add(self, index: NDArray[np.int64], record: NDArray[np.bool_], losses: Tensor) -> None:
        """Take losses (float[k], any device and float type) of the samples ``index`` where ``record`` is true."""
        values = losses.detach()
        if values.dtype is not torch.float32:
            values = values.to(torch.float32)
        if not values.is_cuda:
            self._write(index, record, values)
            return
        host = torch.empty(values.shape, dtype=torch.float32, pin_memory=True)
        host.copy_(values, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(values.device))
        # Copied, so that a worker's shared memory is not held until then.
        self._copies.append(_Copy(index.copy(), record.copy(), host, done))
        while self._copies and (len(self._copies) > _IN_FLIGHT or self._copies[0].done.query()):  # type: ignore[no-untyped-call]
            self._finish()

    def flush(self) -> None:
        """Record everything that was added; waits for the copies that are under way."""
        while self._copies:
            self._finish()

    def _finish(self) -> None:
        copy = self._copies.popleft()
        copy.done.synchronize()
        self._write(copy.samples, copy.record, copy.values)

    def _write(self, index: NDArray[np.int64], record: NDArray[np.bool_], values: Tensor) -> None:
        losses = values.numpy(force=True)  # from whichever device
        # Masked here and not on the device, where a mask would make the step wait.
        if not np.logical_and.reduce(record):  # half the time of record.all()
            index, losses = index[record], losses[record]
        assert self._store is not None
        self.not_finite += self._store.record(index, losses)
