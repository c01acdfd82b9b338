"""How things are measured: contenders in turn, medians with spread, memory and disk reads from /proc."""

import gc
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "Spread", "anonymous_bytes", "busy_seconds", "disk_bytes_read", "drop_cache", "in_child", "in_turn", "ratio",
    "seconds",
]  # fmt: skip

_TICK = 0.005  # seconds between two looks at the memory of a child


@dataclass(frozen=True)
class Spread:
    """Median, lowest and highest of several measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """The spread of ``values``, at least one."""
        return cls(statistics.median(values), min(values), max(values))

    def scaled(self, factor: float) -> "Spread":
        """Each of the three times ``factor``, which is positive."""
        return Spread(self.median * factor, self.low * factor, self.high * factor)


def seconds(action: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call, garbage collected before it."""
    gc.collect()
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def busy_seconds(device: str) -> float:
    """A clock for work on ``device``: on a CPU that of the processor, which other work on the machine does not move; on
    another that of the wall, when all that was asked of the device is done."""
    if device == "cpu":
        return time.process_time()
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


def in_turn(contenders: Mapping[str, Callable[[], float]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """What each contender returns, round by round: A B C, A B C, ... so that all see the same machine."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(warmup + rounds):
        for name, measure in contenders.items():
            value = measure()
            if number >= warmup:
                found[name].append(value)
    return found


def ratio(above: list[float], below: list[float]) -> Spread:
    """above / below, round by round."""
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])


def anonymous_bytes(pid: int | str = "self") -> int:
    """Anonymous memory (heap, not mapped files) that a process has now, in bytes; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)


def in_child(function: Callable[..., Any], *args: Any) -> tuple[Any, int]:
    """``function(*args)`` in a fresh process: (what it returns, growth of its anonymous memory at the peak, in bytes).

    The growth is counted from when the child has imported the function's module, and sampled every 5 ms.
    """
    context = multiprocessing.get_context("forkserver")  # a clean process that has what takes seconds to import
    context.set_forkserver_preload(["torch", "infobatch_stream"])
    ours, theirs = context.Pipe()
    child = context.Process(target=_child, args=(theirs, function, args))
    child.start()
    theirs.close()
    ours.recv()  # imported
    before = anonymous_bytes(child.pid or 0)
    ours.send(None)
    peak = before
    while not ours.poll(_TICK):
        peak = max(peak, anonymous_bytes(child.pid or 0))
    value, error = ours.recv()
    child.join()
    if error is not None:
        raise RuntimeError(f"{function.__name__} failed in a child process: {error}")
    return value, peak - before


def _child(pipe: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    pipe.send(None)
    pipe.recv()
    try:
        pipe.send((function(*args), None))
    except Exception as error:
        pipe.send((None, f"{type(error).__name__}: {error}"))


def disk_bytes_read() -> int:
    """Bytes that this process had fetched from storage so far (read_bytes of /proc/self/io)."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise RuntimeError("/proc/self/io has no read_bytes")


def drop_cache(folder: Path) -> None:
    """Have the system forget the pages of all files below ``folder``, so that the next read comes from the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            try:
                os.fsync(handle)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)
