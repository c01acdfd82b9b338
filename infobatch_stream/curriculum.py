"""Which samples the epochs of a run are of, when not of all; it may change from epoch to epoch."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.errors import ConfigError
from infobatch_stream.per_sample import SampleValues
from infobatch_stream.planning.position import RunPosition

__all__ = ["Curriculum"]


class Curriculum:
    """The masks of a run, each bool[N]; None stands for all samples.

    Attributes:
        first: That the loader was made with.
        now: Of the epoch where the run stands.
        next: Of the epochs behind it.
    """

    def __init__(self, first: SampleValues | None) -> None:
        self.first = self.now = self.next = first

    @property
    def include(self) -> NDArray[np.bool_] | None:
        """bool[N]: the samples of the epoch where the run stands."""
        return None if self.now is None else self.now.values

    def change(self, mask: SampleValues | None, position: RunPosition) -> bool:
        """Have ``mask`` from the next epoch that begins on; whether that is the one at ``position``.

        Raises ConfigError for another mask than that of an epoch that goes on from a state.
        """
        now = not position.spent and _digest(mask) != _digest(self.now)
        if now and position.step:
            raise ConfigError(
                f"include names other samples than those that epoch {position.epoch} was begun with, of which "
                f"{position.step} step(s) are done. Set it when the next epoch comes."
            )
        self.next = mask
        if now:
            self.now = mask
        return now

    def facts(self) -> dict[str, Any]:
        """What tells its masks from others."""
        return {"include": _digest(self.now), "next include": _digest(self.next)}

    def to_state(self) -> NDArray[np.uint8] | None:
        """The masks of now and next in bits, uint8[2, N / 8]; a row of zeros for all. None: both are the first."""
        masks = (self.now, self.next)
        if {_digest(mask) for mask in masks} == {_digest(self.first)}:
            return None
        size = next(mask.values.size for mask in (*masks, self.first) if mask is not None)
        nothing = np.zeros(-(-size // 8), dtype=np.uint8)
        return np.stack([nothing if mask is None else np.packbits(mask.values) for mask in masks])

    def of_state(self, bits: NDArray[np.uint8] | None, num_samples: int) -> "Curriculum":
        """That of a run whose state has these ``bits``. Raises ConfigError for what `to_state` cannot have given."""
        found = Curriculum(self.first)
        if bits is not None:
            if bits.shape != (2, -(-num_samples // 8)):
                raise ConfigError(
                    f"the state is damaged: its masks are {list(bits.shape)} bytes of {num_samples} samples."
                )
            masks = np.unpackbits(bits, axis=1, count=num_samples).astype(np.bool_)
            found.now, found.next = (SampleValues(mask) if mask.any() else None for mask in masks)
        return found


def _digest(mask: SampleValues | None) -> str | None:
    return None if mask is None else mask.digest
