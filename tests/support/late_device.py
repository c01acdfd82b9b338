"""A device whose copies end late: what pinned memory is for, where there is no CUDA."""

import itertools
from collections import Counter, defaultdict

import torch

from infobatch_stream.pinned_ring import Cuda

__all__ = ["LateDevice"]


class LateDevice(Cuda):
    """Copies wait in streams until `work`, or until an event behind them is waited for."""

    def __init__(self):
        self.now = 0  # the stream that work is given to
        self.calls = Counter()
        self._given, self._done = defaultdict(list), Counter()

    def work(self, stream, copies):
        """Have the next ``copies`` of ``stream`` done."""
        for act in itertools.islice(self._given[stream], self._done[stream], self._done[stream] + copies):
            act()
        self._done[stream] = min(self._done[stream] + copies, len(self._given[stream]))

    def holds(self, values):
        return True

    def pinned(self, size):
        self.calls["pinned"] += 1
        return torch.full((size,), torch.nan)

    def stream(self, values):
        return self.now

    def to_device(self, block, beside):
        self.calls["to_device"] += 1
        there = torch.full_like(block, torch.nan)
        self._given[self.now].append(lambda: there.copy_(block))
        return there

    def to_host(self, block, values):
        self.calls["to_host"] += 1
        self._given[self.now].append(lambda: block.copy_(values))

    def mark(self, stream):
        self.calls["events"] += 1
        return _Event(self, stream, len(self._given[stream]))


class _Event:
    def __init__(self, device, stream, behind):
        self.device, self.stream, self.behind = device, stream, behind

    def query(self):
        self.device.calls["queries"] += 1
        return self.device._done[self.stream] >= self.behind

    def synchronize(self):
        if (missing := self.behind - self.device._done[self.stream]) > 0:
            self.device.calls["waits"] += 1
            self.device.work(self.stream, missing)
