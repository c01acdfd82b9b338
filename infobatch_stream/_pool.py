"""A function applied to many items by several processes, with the results in the order of the items."""

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial
from multiprocessing import forkserver, get_context, resource_tracker
from multiprocessing.connection import Connection, Pipe
from types import FrameType
from typing import Any, NoReturn, TypeVar

from infobatch_stream.errors import ConfigError

__all__ = ["await_server", "default_workers", "ordered_map", "start_server"]

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST_BY_DEFAULT = 8
_functions: list[Callable[[Any], Any]] = []  # of this worker
_PATIENCE = 5.0  # seconds that a worker has to remove what it has half written


def default_workers() -> int:
    """The processor cores that this process may use, at most 8."""
    return min(len(os.sched_getaffinity(0)), _MOST_BY_DEFAULT)


def ordered_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    *,
    ahead: int = 2,
    preload: Sequence[str] = (),
) -> Generator[Result, None, None]:
    """``function(item)`` of each item, in the order of ``items``, by ``workers`` processes.

    function: of a module's top level, or a `functools.partial` of one. It is pickled once for each worker, items and
        results one by one.
    workers: 1 or less works in this process, one item when the next result is asked for.
    ahead: items that are taken per worker before the first result of them was asked for, which bounds memory.
    preload: modules that the function imports, to be imported once for all workers; those that are missing do no harm.

    Raises what ``items`` and the function raise (of an item, when it is its turn), and ConfigError when a worker ended,
    killed for example. Close the iterator, or drop it, to end the workers: what they are doing is then broken off by
    SystemExit. They end as well when this process is killed.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    start_server(function, preload)
    until, stop = Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, get_context("forkserver"), initializer=_begin, initargs=(until, function))
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(_work, item))
            if len(waiting) >= ahead * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
        pool.shutdown()
    except BrokenProcessPool as error:
        raise ConfigError(
            f"One of {workers} worker processes was killed, or crashed, so the work was broken off. The system kills "
            "processes when memory runs out: use fewer (--workers; with 1 the work is done in this process)."
        ) from error
    finally:
        stop.close()
        pool.shutdown(cancel_futures=True)
        until.close()


def start_server(function: Callable[..., object], preload: Sequence[str] = ()) -> None:
    """Start the process from which workers fork, with what they need imported once for all of them.

    (Not this process: one with threads cannot be forked safely.) Ctrl-C goes to all processes of a terminal. Workers
    are ended by this one, so they come to life with the signal blocked, instead of each printing its traceback.
    """
    while isinstance(function, partial):
        function = function.func
    forkserver.set_forkserver_preload([__name__, function.__module__, *preload])
    resource_tracker.ensure_running()  # a part of the next, but one that unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def await_server() -> None:
    """Return when the process that `start_server` started has imported all it was to, and makes workers."""
    process = get_context("forkserver").Process(target=default_workers)  # whatever does nothing
    process.start()
    process.join()


def _begin(until: Connection, function: Callable[[Any], Any]) -> None:
    """In a new worker, which gets ``function`` once, since that may hold much.

    It ends when the other end of ``until`` is closed, which it is too when the parent is killed.
    """
    _functions[:] = [function]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server may be older, and not ours
    threading.Thread(target=_watch, args=(until,), daemon=True).start()


def _watch(until: Connection) -> None:
    with suppress(EOFError, OSError):
        until.recv_bytes()
    # Not to the process: a thread other than the main one could get it, whose system call then goes on.
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
    time.sleep(_PATIENCE)
    os._exit(1)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _work(item: Any) -> Any:
    signal.signal(signal.SIGTERM, _end)
    try:
        return _functions[0](item)
    except SystemExit:  # the executor would take it for the item's result
        os._exit(1)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # there is nothing to remove while it waits
