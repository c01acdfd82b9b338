"""Shards brought to this machine before they are needed, by threads that live as long as there is something to do."""

import os
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from infobatch_stream.sources.base import Source

__all__ = ["THREADS", "Prefetcher"]

THREADS = 2  # per process, besides the one that reads


@dataclass
class _Wanted:
    """What the threads of one process are to bring. It outlives the Prefetcher by the downloads that are under way."""

    source: Source
    now: deque[int] = field(default_factory=deque)  # a batch waits for these
    later: deque[int] = field(default_factory=deque)
    here: set[int] = field(default_factory=set)  # what was brought before, if nothing is ever dropped
    waiting: int = 0  # batches that wait
    running: int = 0  # threads
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self) -> int | None:
        """The next shard for a thread; None: end. Nothing for later is begun while a batch waits."""
        with self.lock:
            for queue in (self.now, *([] if self.waiting else [self.later])):
                while queue:
                    shard = queue.popleft()
                    if shard not in self.here:
                        return shard
            self.running -= 1
            return None

    def work(self) -> None:
        """Bring shards until there is none to bring. What fails will be met again by whoever reads it."""
        while (shard := self.take()) is not None:
            with suppress(Exception):
                self.bring(shard)

    def bring(self, shard: int) -> None:
        """Have ``shard`` here; raises as `Source.bring`."""
        self.source.bring(shard)
        if self.source.capacity is None:
            self.here.add(shard)

    def bring_all(self, shards: list[int]) -> dict[int, Exception]:
        """Have ``shards`` here, several at once; what went wrong, by shard."""
        failed: dict[int, Exception] = {}
        with self.lock:
            self.now.extend(shards[1:])
        self.begin(len(shards) - 1)
        for shard in shards:
            try:
                self.bring(shard)
            except Exception as error:
                failed[shard] = error
        return failed

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Within, a batch waits."""
        with self.lock:
            self.waiting += 1
        try:
            yield
        finally:
            with self.lock:
                self.waiting -= 1
                if not self.waiting:
                    self.now.clear()

    def begin(self, most: int) -> None:
        """Have up to ``most`` threads at work."""
        with self.lock:
            new = max(0, min(most, THREADS) - self.running)
            self.running += new
        for _ in range(new):
            threading.Thread(target=self.work, name="infobatch-ahead", daemon=True).start()


class Prefetcher:
    """Brings shards of a source: at once those that a batch waits for, and between times those that others need next.

    The threads are daemons, so they keep no process alive; they are begun anew in each process that this is passed to,
    and when it is dropped they end after the download that each is at. Under way, at most `THREADS` + 1 downloads per
    process.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._start()

    def _start(self) -> None:
        self._process = os.getpid()
        self._place: tuple[int, int] = -1, -1
        self._wanted = _Wanted(self._source)
        weakref.finalize(self, self._wanted.later.clear).atexit = False

    def __getstate__(self) -> dict[str, Any]:
        """State without threads, and what they were at."""
        return {"_source": self._source}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The state, with nothing to bring yet."""
        vars(self).update(state)
        self._start()

    def bring(self, place: tuple[int, int], now: Iterable[Iterable[int]], later: Iterable[int]) -> dict[int, Exception]:
        """Have the shards ``now`` here, and begin to bring those for ``later``.

        place: (epoch, step) that asks; when it is not behind the one before, what was wanted for later is forgotten.
        now: in groups, of which one is complete before the next is begun: else what the worker with the next batch
        wants would take a share of the line from what the first one waits for. Returns what went wrong, by shard.
        """
        if self._process != os.getpid():
            self._start()  # forked: the threads, and whoever held the lock, are of another process
        wanted = self._wanted
        with wanted.lock:
            if place <= self._place or place[0] != self._place[0]:
                wanted.later.clear()
            self._place = place
            wanted.later.extend(later)
        missing = [part for group in now if (part := [shard for shard in group if shard not in wanted.here])]
        failed: dict[int, Exception] = {}
        if missing:
            with wanted.awaited():
                for group in missing:
                    failed |= wanted.bring_all(group)
        wanted.begin(len(wanted.later))
        return failed
