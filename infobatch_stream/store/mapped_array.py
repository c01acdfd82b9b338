"""An array of a store in memory: mapped from its file, which another program may cut or replace meanwhile."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.errors import ConfigError, StoreError
from infobatch_stream.store import layout
from infobatch_stream.store.header import Header

__all__ = ["MappedArray", "finished", "read_only"]

_BLOCK = 1 << 18  # scores handled at once: what is made of them stays in the cache


class MappedArray:
    """The array ``name`` of the checked store at ``path``.

    Attributes:
        values: float32[N], the map.
    """

    def __init__(self, path: Path, name: str, num_samples: int, mode: Literal["r", "r+"]) -> None:
        self._path, self._name = path, name
        self.values = layout.map_array(path, name, num_samples, mode)
        self._identity = layout.identity(path, name)

    def view(self) -> NDArray[np.float32]:
        """Read-only. Raises StoreError when the file was cut; one that was replaced or removed can be read."""
        inode, size = self._identity
        try:
            found = layout.identity(self._path, self._name)
        except StoreError:
            found = inode, size
        if found[0] == inode and found[1] < size:
            raise self._replaced()
        return read_only(self.values)

    def check(self) -> None:
        """Raise StoreError unless the file is the one that is mapped, in full length: else SIGBUS awaits."""
        try:
            found = layout.identity(self._path, self._name)
        except StoreError as error:
            raise StoreError(
                f"{error} What this run recorded since its last commit is lost; go on from a checkpoint "
                "(load_state_dict)."
            ) from error
        if found != self._identity:
            raise self._replaced()

    def _replaced(self) -> StoreError:
        return StoreError(
            f"the files of {self._path} were replaced by another program, or cut, while they were in use; what this "
            "run recorded since is not in them. Do not write to a store that a run has open; go on from a checkpoint "
            "(load_state_dict)."
        )

    def put(self, index: NDArray[Any], values: NDArray[Any]) -> int:
        """Put ``values`` (float[k]) that are finite at ``index`` (int64[k]); how many are not, in float32.

        Raises ConfigError for other shapes and types, and for places that there are not; StoreError as `check`.
        """
        if values.dtype != np.float32:
            if values.dtype.kind not in "fiu":
                raise ConfigError(f"record takes a loss of real numbers; got {values.dtype}.")
            with np.errstate(over="ignore"):
                values = values.astype(np.float32)
        if index.dtype != np.int64 or index.shape != values.shape or index.ndim != 1:
            raise ConfigError(
                f"record takes index int64[k] and loss float[k]; got {index.dtype}{list(index.shape)} "
                f"and {values.dtype}{list(values.shape)}."
            )
        # As uint64 a negative index is larger than any. Methods of arrays take twice as long as these functions.
        if index.size and np.maximum.reduce(index.view(np.uint64)) >= self.values.size:
            raise ConfigError(
                f"record got indices from {index.min()} to {index.max()}; "
                f"this store has the samples 0 to {self.values.size - 1}."
            )
        self.check()
        finite = np.isfinite(values)
        if np.logical_and.reduce(finite):
            self.values[index] = values
            return 0
        self.values[index[finite]] = values[finite]
        return int(index.size - np.count_nonzero(finite))

    def clear(self) -> None:
        """Make every value NaN, on the disk."""
        for block in self._blocks():
            self.values[block] = np.nan
        self.values.flush()

    def take_seen(self, new: NDArray[np.float32]) -> None:
        """Put ``new`` (float32[N]) where it is finite, on the disk. Elsewhere it is NaN, or a bit of it was flipped."""
        old, new = self.values.view(np.ndarray), new.view(np.ndarray)
        for block in self._blocks():
            _take_seen(old[block], new[block])
        self.values.flush()

    def _blocks(self) -> Iterator[slice]:
        for start in range(0, self.values.size, _BLOCK):
            yield slice(start, start + _BLOCK)


def _take_seen(values: NDArray[np.float32], new: NDArray[np.float32]) -> None:
    """As `MappedArray.take_seen`, by arithmetic on the bits.

    NaN come at random, so a branch for each sample, as in copyto(where=), takes five times as long.
    """
    seen = np.isfinite(new)
    if seen.any():  # else the pages need not be written
        bits = values.view(np.int32)
        bits ^= (bits ^ new.view(np.int32)) * seen


def read_only(array: NDArray[np.float32]) -> NDArray[np.float32]:
    """A plain view that cannot be written to."""
    view = array.view(np.ndarray)
    view.flags.writeable = False
    return view


def finished(
    header: Header, scores: NDArray[np.float32], pending: NDArray[np.float32]
) -> tuple[int, NDArray[np.float32], NDArray[np.float32]]:
    """Epoch, scores and pending, float32[N] each, that a commit comes to which is under way, or was cut off."""
    epoch = header.epoch
    if header.state == "apply":  # pending is whole until all of it is in scores
        new = np.array(pending)  # first: once it is cleared, scores have all of it
        scores = np.where(np.isfinite(new), new, scores)
        epoch += 1
    return epoch, np.array(scores), np.full(header.num_samples, np.nan, dtype=np.float32)
