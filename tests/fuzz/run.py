"""Runs a target on mutated inputs and watches its time and memory."""

import random
import resource
import signal
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .mutate import MUTATIONS, any_bytes
from .seeds import SEEDS
from .targets import TARGETS

_SLOW, _HUNG = 1.0, 60.0  # seconds of processor time for one input; by the clock, for a batch of them
_MEMORY = 256  # MiB by which inputs of some KiB may raise the peak
_BATCH, _LONGEST = 32, 1 << 14


@dataclass
class Report:
    """What a run came to. peak, growth: MiB of the process, and by how much this run raised it."""

    target: str
    runs: int
    seconds: float
    peak: int
    growth: int
    accepted_seeds: int


class Hung(BaseException):
    """An input, one of a batch, that does not end; no Exception, which a parser may take for damage."""


def inputs(target: str, runs: int, seed: int) -> Iterator[bytes]:
    """The seeds, then mutations of them, and of mutations; the same for the same seed."""
    corpus = list(SEEDS[target]())
    yield from corpus[:runs]
    rng = random.Random(seed)
    kept = len(corpus)
    mutation = MUTATIONS[target]
    for number in range(runs - kept):
        data = corpus[rng.randrange(kept if rng.random() < 0.6 else len(corpus))]
        data = any_bytes(rng, data, corpus) if rng.random() < 0.15 else mutation(rng, data, corpus)
        if number % 50 == 0 and len(data) < _LONGEST:  # a pool of mutations, to go on from
            if len(corpus) < 3 * kept:
                corpus.append(data)
            else:
                corpus[rng.randrange(kept, len(corpus))] = data
        yield data


def fuzz(target: str, runs: int, seed: int, crashes: Path | None = None) -> Report:
    """Run ``target`` on ``runs`` inputs. Raises what the target raises, or AssertionError where it was slow or large.

    The input at fault is in the error's notes, or in the folder ``crashes``.
    """
    call = TARGETS[target]
    SEEDS[target]()
    before, began, done = _peak(), time.perf_counter(), 0
    for data in inputs(target, runs, seed):
        if done % _BATCH == 0:
            _check_memory(before, done)
            signal.setitimer(signal.ITIMER_REAL, _HUNG)
        start = time.process_time()
        try:
            call(data)
            assert time.process_time() - start < _SLOW, f"{time.process_time() - start:.1f} s"
        except BaseException as error:
            if crashes is not None:
                (crashes / f"{target}-{seed}-{done}").write_bytes(data)
            error.add_note(f"input {done} of target {target!r} with seed {seed}: {data[:2000]!r}")
            raise
        done += 1
    _check_memory(before, done)
    return Report(target, done, time.perf_counter() - began, _peak(), _peak() - before, len(SEEDS[target]()))


@contextmanager
def watched() -> Iterator[None]:
    """Let what hangs end with `Hung`; `fuzz` gives each batch its time anew."""

    def stop(number: int, frame: object) -> None:
        raise Hung

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, _HUNG)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@contextmanager
def memory_below(limit: int) -> Iterator[None]:
    """Fail where more than ``limit`` bytes are allocated within; where they are only reserved, with MemoryError."""
    old = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, old[1]))
    tracemalloc.start()
    try:
        with watched():
            yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()
        resource.setrlimit(resource.RLIMIT_AS, old)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def _check_memory(before: int, done: int) -> None:
    assert _peak() - before < _MEMORY, f"peak memory rose by {_peak() - before} MiB within {done} inputs"
