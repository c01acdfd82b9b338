"""Random numbers of a sample: the same in threads, in processes, after a resume, and on any number of ranks."""

import struct
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from hashlib import blake2b

import numpy as np
import torch

__all__ = ["AugmentationRng", "augmentation_rng", "batch_read", "each_read", "sample_read"]


class AugmentationRng:
    """Generators to draw from. Each is made when it is first asked for.

    Attributes:
        torch: A torch.Generator on the CPU, as ``torch.rand(3, generator=rng.torch)``.
        numpy: A numpy.random.Generator, as ``rng.numpy.integers(10)``.
    """

    def __init__(self, digest: bytes) -> None:
        """For the library. digest: 24 bytes that they derive from."""
        self._digest = digest

    @cached_property
    def torch(self) -> torch.Generator:
        """Of the first 8 bytes."""
        return torch.Generator().manual_seed(int.from_bytes(self._digest[:8], "little"))

    @cached_property
    def numpy(self) -> np.random.Generator:
        """Of the others."""
        return np.random.default_rng(int.from_bytes(self._digest[8:], "little"))


class _Batch:
    """A batch that is being made.

    seed: seed, epoch, step and rank; None outside of a batch. index: of the sample, while one alone is read.
    made: the generators that were asked for since, by index; those of the batch by None.
    """

    __slots__ = ("index", "made", "seed")

    def __init__(self, seed: tuple[int, int, int, int] | None) -> None:
        self.seed = seed
        self.index: int | None = None
        self.made: dict[int | None, AugmentationRng] = {}


class _Reading(threading.local):
    """The batch that a thread makes. It is asked for once a batch, since a look costs as much as a small sample."""

    def __init__(self) -> None:
        self.batch = _Batch(None)


_reading = _Reading()


def augmentation_rng(index: int | None = None) -> AugmentationRng:
    """Generators for the random augmentation of the sample that is being read.

    They derive from the loader's ``seed``, the epoch and the index of the sample, and from nothing else. So a sample
    is augmented alike in threads and in worker processes, after a resume, and on another number of ranks. Further calls
    for the same sample give the same generators, which go on.

    Call it in a dataset's ``__getitem__`` or in what that calls. Where samples are read together (``__getitems__``,
    ``collate_fn``), give the index of each; without it they are generators of the batch, which are the same after a
    resume with as many ranks. Outside of a loader they are seeded from torch's global generator; so they are in threads
    of your own, which know of no loader: ask for them before, and pass them on.

    Args:
        index: Of the sample, 0..N-1; default the one that is read.

    Returns:
        An object with the attributes ``torch`` (torch.Generator) and ``numpy`` (numpy.random.Generator).
    """
    batch = _reading.batch
    if batch.seed is None:
        return AugmentationRng(torch.randint(256, (24,), dtype=torch.uint8).numpy().tobytes())
    if index is None:
        index = batch.index
    rng = batch.made.get(index)
    if rng is None:
        place = batch.seed if index is None else (*batch.seed[:2], index)
        rng = AugmentationRng(blake2b(struct.pack(f"<{len(place)}Q", *place), digest_size=24).digest())
        batch.made[index] = rng
    return rng


@contextmanager
def batch_read(seed: tuple[int, int, int, int]) -> Iterator[None]:
    """Within, this thread makes the batch of ``seed``: seed, epoch, step and rank."""
    before, _reading.batch = _reading.batch, _Batch(seed)
    try:
        yield
    finally:
        _reading.batch = before


def sample_read(index: int | None) -> None:
    """From now on this thread reads sample ``index``, or several at once; its generators begin anew."""
    batch = _reading.batch
    batch.index = index
    batch.made.pop(index, None)


def each_read(indices: Iterable[int]) -> Iterator[int]:
    """``indices``; this thread reads the sample that was given last, and its generators begin anew."""
    batch = _reading.batch
    for index in indices:
        batch.index = index
        batch.made.pop(index, None)
        yield index
