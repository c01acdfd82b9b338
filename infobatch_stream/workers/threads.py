"""Batches made ahead of their use by threads of this process, in order."""

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Self

import torch

from infobatch_stream._process_wide import at_exit
from infobatch_stream.workers.fetch import Request

__all__ = ["ThreadedBatches"]

_PATIENCE = 5.0  # seconds in which threads end at the exit of the interpreter

_Make = Callable[[Request], Any]


class ThreadedBatches:
    """An iterator of the batches of ``requests``, in their order.

    make: makes a batch; called by several threads at once. threads: how many. ahead: batches that are made, or under
    way, before they are asked for. pin_memory: whether tensors are copied to pinned memory, where CUDA is.

    What ``make`` raises is raised when its batch is asked for. Requests are taken from the iterator in the thread that
    asks. When this is dropped, each thread ends after the batch that it is at.
    """

    def __init__(self, requests: Iterator[Request], make: _Make, *, threads: int, ahead: int, pin_memory: bool) -> None:
        self._requests = requests
        self._ahead = ahead
        self._waiting: deque[Future[Any]] = deque()
        device = torch.cuda.current_device() if pin_memory and torch.cuda.is_available() else None
        self._crew = _Crew(make, device)
        weakref.finalize(self, self._crew.dismiss)
        self._submit()
        self._crew.start(min(threads, len(self._waiting)))

    def _submit(self) -> None:
        while len(self._waiting) < self._ahead and (request := next(self._requests, None)) is not None:
            self._waiting.append(self._crew.submit(request))

    def __iter__(self) -> Self:
        """It."""
        return self

    def __next__(self) -> Any:
        """The next batch."""
        try:
            if not self._waiting:
                raise StopIteration
            batch = self._waiting.popleft().result()
            self._submit()
        except BaseException:
            self._crew.dismiss()
            self._waiting.clear()  # those that were dropped are never made
            raise
        return batch


class _Crew:
    """The threads of an iterator, which it outlives until their last batch is made."""

    def __init__(self, make: _Make, device: int | None) -> None:
        self._make = make
        self._device = device
        self._todo: SimpleQueue[tuple[Request, Future[Any]] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def submit(self, request: Request) -> Future[Any]:
        """Have the batch of ``request`` made."""
        future: Future[Any] = Future()
        self._todo.put((request, future))
        return future

    def start(self, threads: int) -> None:
        """Have so many threads at work."""
        _crews.add(self)
        for _ in range(threads):
            thread = threading.Thread(target=self._work, name="infobatch-batches", daemon=True)
            thread.start()
            self._threads.append(thread)
            _alive.add(thread)

    def dismiss(self) -> None:
        """Have the threads end; what is not begun is dropped."""
        with suppress(Empty):
            while True:
                self._todo.get_nowait()
        for _ in self._threads:
            self._todo.put(None)

    def _work(self) -> None:
        while self._answer():
            pass

    def _answer(self) -> bool:
        """Make one batch; False when there is none left to make. No batch is held while the next one is waited for."""
        task = self._todo.get()
        if task is None:
            return False
        request, future = task
        try:
            batch = self._make(request)
            future.set_result(batch if self._device is None else _pinned(batch, self._device))
        except BaseException as error:
            future.set_exception(error)
        finally:
            del task, future  # else the error's traceback would keep the future, which keeps the error
        return True


def _pinned(batch: Any, device: int) -> Any:
    """``batch`` with its tensors in pinned memory, as a DataLoader does it: nothing public does.

    device: the main thread's; another thread would begin to use the first one.
    """
    from torch.utils.data._utils.pin_memory import pin_memory

    with torch.cuda.device(device):
        return pin_memory(batch)  # type: ignore[no-untyped-call]


_crews: weakref.WeakSet[_Crew] = weakref.WeakSet()
_alive: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


def _end() -> None:
    """Have all threads end before the interpreter does: one that comes back from torch afterwards aborts the process.

    Daemons they are all the same, so that one that hangs, as in a file system that is gone, does not keep it alive.
    """
    for crew in list(_crews):
        crew.dismiss()
    until = time.monotonic() + _PATIENCE
    for thread in list(_alive):
        thread.join(max(0.0, until - time.monotonic()))


at_exit(_end)
