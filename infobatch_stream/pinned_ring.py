"""Pinned memory for the copies of a step: none of them waits for the device, and few need memory or an event anew."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["PinnedRing"]

_COPIES = 32  # of the size at hand that a block has room for: 16 steps, of weights and losses each
_BLOCKS = 4  # under way at most: bounds pinned memory, and how far the host runs ahead of the device

Use = Callable[[NDArray[np.float32]], None]


class Event(Protocol):
    """A mark in a stream."""

    def query(self) -> bool:
        """Whether the stream has passed it."""

    def synchronize(self) -> None:
        """Wait until it has."""


class Cuda:
    """What the ring asks of a device; in tests another class takes its place."""

    def holds(self, values: Tensor) -> bool:
        """Whether copies from and to the device of ``values`` go through the ring."""
        return values.is_cuda

    def pinned(self, size: int) -> Tensor:
        """float32[size], anything."""
        return torch.empty(size, dtype=torch.float32, pin_memory=True)

    def stream(self, values: Tensor) -> Any:
        """The one that work on the device of ``values`` is given to now."""
        return torch.cuda.current_stream(values.device)

    def to_device(self, block: Tensor, beside: Tensor) -> Tensor:
        """A copy of ``block`` on the device of ``beside``, begun."""
        return block.to(beside.device, non_blocking=True)

    def to_host(self, block: Tensor, values: Tensor) -> None:
        """Begin to copy ``values`` to ``block``."""
        block.copy_(values, non_blocking=True)

    def mark(self, stream: Any) -> Event:
        """An event behind all that ``stream`` was given so far."""
        event: Event = stream.record_event()
        return event


@dataclass
class _Block:
    memory: Tensor
    stream: Any = None
    used: int = 0
    arriving: deque[tuple[NDArray[np.float32], Use]] = field(default_factory=deque)


class PinnedRing:
    """Copies float32 to and from a device in its stream's own order, by way of a few blocks of pinned memory.

    The copies of a stream end in the order they began. So a block serves the copies of several steps, one event behind
    the last of them tells that all are done, and only then is its memory used again.

    Attributes:
        device: What it asks of the device.
    """

    def __init__(self, device: Cuda | None = None) -> None:
        self.device = device or Cuda()
        self._open: _Block | None = None
        self._closed: deque[tuple[_Block, Event]] = deque()  # take no more; the oldest first
        self._free: list[_Block] = []

    def to_device(self, values: Tensor, beside: Tensor) -> Tensor:
        """A copy of ``values``, float32[n] on the CPU, on the device of ``beside``."""
        block, memory = self._take(len(values), beside)
        block.memory[memory].copy_(values)
        return self.device.to_device(block.memory[memory], beside)

    def to_host(self, values: Tensor, use: Use) -> None:
        """Give ``use`` a copy of ``values``, float32[n] on the device, once it has come: in a later call or `flush`."""
        block, memory = self._take(len(values), values)
        copy = block.memory[memory]
        self.device.to_host(copy, values)
        block.arriving.append((copy.numpy(), use))

    def flush(self) -> None:
        """Wait for all copies to the host, and give them to those who use them, in order."""
        self._close()
        while self._closed:
            self._finish()

    def drop(self) -> None:
        """Forget who would use the copies that are under way."""
        self._close()
        for block, _ in self._closed:
            block.arriving.clear()

    def _take(self, size: int, beside: Tensor) -> tuple[_Block, slice]:
        """A block with room for one more copy on the stream of ``beside``, and where: until the next call."""
        stream, block = self.device.stream(beside), self._open
        if block is None or block.stream != stream or block.used + size > len(block.memory):
            block = self._open = self._next(size, stream)
        start, block.used = block.used, block.used + size
        return block, slice(start, block.used)

    def _next(self, size: int, stream: Any) -> _Block:
        self._close()
        while self._closed and (len(self._closed) >= _BLOCKS or self._closed[0][1].query()):
            self._finish()
        self._free = [block for block in self._free if len(block.memory) >= size]
        block = self._free.pop() if self._free else _Block(self.device.pinned(_COPIES * size))
        block.stream = stream
        return block

    def _close(self) -> None:
        if self._open is not None:
            self._closed.append((self._open, self.device.mark(self._open.stream)))
            self._open = None

    def _finish(self) -> None:
        """Hand on what came to the oldest block, once it has. What raises leaves the rest to the next call."""
        block, done = self._closed[0]
        done.synchronize()
        while block.arriving:
            copy, use = block.arriving.popleft()
            use(copy)
        self._closed.popleft()
        block.used = 0
        self._free.append(block)
