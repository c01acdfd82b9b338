"""Where a run stands: the one account of it, which the loader moves on, plans are made for and states are made of."""

from dataclasses import dataclass
from typing import Any, Final, Self

from infobatch_stream.policies.base import Moment

__all__ = ["RunPosition"]

_MOST: Final = 1 << 48  # epochs: random draws take so many bits of one
_MOST_COUNTED: Final = 1 << 63


@dataclass
class RunPosition:
    """Where a run stands.

    Attributes:
        epoch: The epoch that is trained, or comes next.
        step: How many of its steps were updated.
        begun: How many epochs the run had when this one was begun (it stays what it is when ``epochs`` is raised), or
            None before that.
        entries: Of all epochs before.
        trained: How many of those were trained on.
        knows_all: Whether these two count all epochs before, or only those since the run was continued without a
            checkpoint.
        updated: Whether a step of this epoch was updated.
        exhausted: Whether it was iterated to its end.
    """

    epoch: int = 0
    step: int = 0
    begun: int | None = None
    entries: int = 0
    trained: int = 0
    knows_all: bool = True
    updated: bool = False
    exhausted: bool = False

    @property
    def spent(self) -> bool:
        """Whether something of this epoch was used, so that the next iteration is of the next one."""
        return self.updated or self.exhausted

    def advance(self, entries: int, trained: int) -> None:
        """Stand before the next epoch; of this one so many entries were ``trained`` on."""
        self.epoch, self.step, self.begun = self.epoch + 1, 0, None
        self.entries += entries
        self.trained += trained
        self.updated = self.exhausted = False

    def moment(self, epochs: int, annealing: int, entries: int, seeded: float = 0.0) -> Moment:
        """What a schedule of policies sees, of a run of ``epochs`` that anneals from ``annealing`` on.

        entries: of this epoch. seeded: share of the samples that had a score before the first.
        """
        offered, skipped = (self.entries, self.entries - self.trained) if self.knows_all else (None, None)
        return Moment(self.epoch, epochs, annealing, entries, offered, skipped, seeded)

    def to_state(self, steps: int, lanes: int) -> dict[str, Any]:
        """The ``progress`` of a state. steps: of this epoch; lanes: of every plan."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "done": self.exhausted or self.step >= steps,
            "begun": self.begun if self.step else None,
            "lanes": lanes,
            "offered": self.entries,
            "kept": self.trained,
            "knows_all": self.knows_all,
        }

    @classmethod
    def of_state(cls, progress: dict[str, Any]) -> tuple[Self, bool, int]:
        """The position in a state; whether its epoch is over; and the lanes.

        Raises TypeError, KeyError or ValueError for what no run can have reached.
        """
        names = ("epoch", "step", "done", "begun", "lanes", "offered", "kept", "knows_all")
        if progress.keys() != set(names):
            raise ValueError(f"it says {sorted(progress)} of the run, not {sorted(names)}")
        epoch, step, done, begun, lanes, entries, trained, knows_all = (progress[name] for name in names)
        counts = (epoch, step, lanes - 1, trained, entries - trained)
        whole = all(type(count) is int and 0 <= count < _MOST_COUNTED for count in counts) and epoch < _MOST
        fits = step == 0 if begun is None else type(begun) is int and epoch < begun < _MOST
        if not whole or not fits or type(done) is not bool or type(knows_all) is not bool:
            raise ValueError(f"{progress} is no place in a run")
        return cls(epoch, step, begun, entries, trained, knows_all), done, lanes
