"""Downloads shards before they are needed, in threads that end when nothing is left to do."""

import os
import threading
import weakref
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from infobatch_stream.sources.base import Source
from infobatch_stream.sources.per_process import PerProcess

__all__ = ["THREADS", "Prefetcher"]

THREADS = 2  # per process, besides the one that reads


@dataclass
class _Wanted:
    """What the threads of one process have to fetch. It outlives the Prefetcher until its last download has ended."""

    source: Source
    now: deque[int] = field(default_factory=deque)  # a batch waits for these
    later: deque[int] = field(default_factory=deque)
    here: set[int] = field(default_factory=set)  # fetched before, if nothing is ever evicted
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
        """Fetch shards until none is left. An error is raised again where the shard is read."""
        while (shard := self.take()) is not None:
            with suppress(Exception):
                self.fetch(shard)

    def fetch(self, shard: int) -> None:
        """Have ``shard`` local; raises as `Source.ensure_local`."""
        self.source.ensure_local(shard)
        if self.source.capacity is None:
            self.here.add(shard)

    def fetch_all(self, shards: list[int]) -> dict[int, Exception]:
        """Have ``shards`` local, several at once; what failed, by shard."""
        failed: dict[int, Exception] = {}
        with self.lock:
            self.now.extend(shards[1:])
        self.begin(len(shards) - 1)
        for shard in shards:
            try:
                self.fetch(shard)
            except Exception as error:
                failed[shard] = error
        return failed

    def fetch_groups(self, groups: list[list[int]]) -> dict[int, Exception]:
        """Have ``groups`` of shards local, one after the other, while a batch waits; what failed, by shard."""
        failed: dict[int, Exception] = {}
        with self.lock:
            self.waiting += 1
        try:
            for group in groups:
                failed |= self.fetch_all(group)
        finally:
            with self.lock:
                self.waiting -= 1
                if not self.waiting:
                    self.now.clear()
        return failed

    def begin(self, most: int) -> None:
        """Have up to ``most`` threads at work."""
        with self.lock:
            new = max(0, min(most, THREADS) - self.running)
            self.running += new
        for _ in range(new):
            threading.Thread(target=self.work, name="infobatch-prefetch", daemon=True).start()


class Prefetcher(PerProcess):
    """Fetches shards of a source: first those that a batch waits for, then those that later batches need.

    The threads are daemons, so they keep no process alive. Each process that this is passed to starts its own. When it
    is dropped, each thread ends after its current download. At most `THREADS` + 1 downloads run at once per process.
    """

    _own = "_process", "_place", "_wanted"

    def __init__(self, source: Source) -> None:
        self._source = source
        self._renew()

    def _renew(self) -> None:
        self._process = os.getpid()
        self._place: tuple[int, int] = -1, -1
        self._wanted = _Wanted(self._source)
        weakref.finalize(self, self._wanted.later.clear).atexit = False

    def queue(self, place: tuple[int, int], later: Iterable[int]) -> None:
        """Have the shards ``later`` fetched by threads, which start at the next `fetch`.

        place: (epoch, step) that asks. If it does not follow the one before, what was queued before is dropped.
        """
        if self._process != os.getpid():
            self._renew()  # forked: the threads, and whoever held the lock, are of another process
        wanted = self._wanted
        with wanted.lock:
            if place <= self._place or place[0] != self._place[0]:
                wanted.later.clear()
            self._place = place
            wanted.later.extend(later)

    def fetch(self, now: Iterable[Iterable[int]]) -> dict[int, Exception]:
        """Return when the shards ``now`` are local; what failed, by shard. Several threads may call it at once.

        now: groups of shards. A group is complete before the next begins: otherwise the next batch's shards would take
            bandwidth from those of the batch that is waited for.
        """
        wanted = self._wanted
        missing = [part for group in now if (part := [shard for shard in group if shard not in wanted.here])]
        failed = wanted.fetch_groups(missing) if missing else {}
        wanted.begin(len(wanted.later))
        return failed
