"""The layout of an MDS shard: where its samples are, and where their values are.

A shard consists of the number n of its samples, n + 1 offsets (all uint32), a description of its columns as JSON, and
the samples. A sample begins with the sizes (uint32) of the values that have no fixed size; the values follow.
"""

from collections.abc import Sequence
from itertools import pairwise
from mmap import mmap
from struct import Struct, unpack_from
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["BOUNDS", "Frame", "bounds_at"]

BOUNDS: Final = Struct("<II")
"""Where a sample begins and ends in its shard: two neighbours in the table of offsets."""


def bounds_at(row: int) -> int:
    """Where the `BOUNDS` of a sample lie in its shard."""
    return 4 + 4 * row


class Frame:
    """Finds the values of samples.

    sizes: bytes of the values of each column; None (or 0) where they differ. head: bytes before the values.
    """

    def __init__(self, sizes: Sequence[int | None]) -> None:
        self._sizes = [size or 0 for size in sizes]
        variable = sum(not size for size in self._sizes)
        self._format, self.head = f"<{variable}I", 4 * variable

    def ends(self, source: bytes | mmap, at: int, length: int) -> list[int]:
        """The bounds of the values of the sample that has ``length`` bytes of ``source``, from ``at`` on.

        Value k is source[ends[k]:ends[k+1]]. Raises ValueError for a damaged sample.
        """
        if length < self.head:
            raise ValueError(f"a sample of {self.head // 4} columns has {length:,} bytes")
        found = iter(unpack_from(self._format, source, at))
        ends = [at + self.head]
        for size in self._sizes:
            ends.append(ends[-1] + (size or next(found)))  # each needs the one before
        if ends[-1] != at + length:
            raise ValueError(f"a sample of {length:,} bytes has values of {ends[-1] - at - self.head:,}")
        return ends

    def each(self, samples: Sequence[bytes]) -> list[list[bytes]]:
        """The values of each of ``samples``. Raises ValueError for a damaged one."""
        if len(self._sizes) == 1 and 0 < self.head <= min(map(len, samples), default=0):  # as below, in half the time
            head = self.head
            values = [[sample[head:]] for sample in samples]
            if [size for (size,) in map(Struct(self._format).unpack_from, samples)] == [len(v) for (v,) in values]:
                return values
        found = []
        for sample in samples:
            ends = self.ends(sample, 0, len(sample))
            found.append([sample[start:stop] for start, stop in pairwise(ends)])
        return found

    def rows(
        self, data: NDArray[np.uint8], bounds: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Starts and sizes, int64[n, columns], of the values of many samples, and the bytes of each sample, int64[n].

        bounds: int64[n + 1], of the samples in ``data``. Where the bytes differ from those between its bounds, a sample
        is damaged, and its starts mean nothing.
        """
        fixed = np.array(self._sizes, np.int64)
        lengths, head = np.diff(bounds), self.head
        sizes = np.tile(fixed, (len(lengths), 1))
        fits = lengths >= head
        heads = data[bounds[:-1][fits, None] + np.arange(head)]
        sizes[np.ix_(fits, fixed == 0)] = heads.view("<u4") if head else 0
        starts = bounds[:-1, None] + head + sizes.cumsum(1) - sizes
        return starts, sizes, head + sizes.sum(1)
