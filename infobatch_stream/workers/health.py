"""Workers of a DataLoader: what they send through, and those that the system killed, with what to tell the user."""

import fcntl
from contextlib import suppress
from multiprocessing.connection import wait

__all__ = ["advise", "lost_worker", "widen"]

_PIPE = 2**20  # bytes; the most that the system gives without privileges, and sixteen times the usual

_PATIENCE = 0.5  # seconds, in which a process that broke a connection is seen to have ended

_ADVICE = (
    "infobatch-stream: a worker process of the DataLoader is gone. The system kills one most often for lack of memory "
    "(see dmesg): use fewer workers (num_workers) or a smaller prefetch_factor. What was recorded is in the store; "
    "start again from the last state_dict(), or with existing='continue'."
)


def lost_worker(error: BaseException, batches: object) -> bool:
    """Whether ``error`` comes of a worker that has ended; ``batches``: the iterator of a DataLoader that raised it.

    Torch has an error for that, which it raises where it waits for a batch, or from a signal and so anywhere. But the
    batches of that worker that were under way are lost too, which shows as whatever error what they came through has.
    """
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker (pid")
    workers = getattr(batches, "_workers", ())
    if not workers or not isinstance(error, OSError | EOFError):
        return False
    return bool(wait([worker.sentinel for worker in workers], _PATIENCE))


def widen(batches: object) -> None:
    """Give the pipe from the workers to ``batches``, the iterator of a DataLoader, more room, if the system lets it.

    Each time that it is full a worker waits, and this process next: batches of large samples pass half as fast again.
    """
    reader = getattr(getattr(batches, "_worker_result_queue", None), "_reader", None)
    if reader is not None and hasattr(fcntl, "F_SETPIPE_SZ"):
        with suppress(OSError):
            fcntl.fcntl(reader.fileno(), fcntl.F_SETPIPE_SZ, _PIPE)


def advise(error: BaseException) -> None:
    """Add to ``error`` what to do about it."""
    if _ADVICE not in getattr(error, "__notes__", ()):
        error.add_note(_ADVICE)
