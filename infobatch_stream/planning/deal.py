"""How many of an epoch's kept entries a step holds, and which of them go to a lane and to a rank.

As published, every step holds the global batch and the last one is filled up, so a pruned epoch has fewer steps. With
constant steps an epoch has as many as if nothing were pruned, and each holds an even share: the first ones an entry
more than the others. Whatever is cut into equal parts is cut at ``size * part // parts``. Cuts into lanes and
cuts into ranks then fall together where they can, and sizes differ by at most one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Self

__all__ = ["Deal", "Span", "Stretch", "count_steps"]


def count_steps(entries: int, global_batch: int, drop_last: bool) -> int:
    """Steps of an epoch of ``entries``: the last one incomplete, or dropped unless it is the only one."""
    return max(1, entries // global_batch) if drop_last else -(-entries // global_batch)


class Span(NamedTuple):
    """Places start..stop-1 of the reading order of a lane; those behind its end are to be filled up."""

    lane: int
    start: int
    stop: int


class Stretch(NamedTuple):
    """From the place ``first`` of a lane on, it gives ``width`` entries to each step."""

    first: int
    width: int


@dataclass(frozen=True)
class Deal:
    """How the steps of an epoch are cut.

    Attributes:
        steps: How many there are.
        lanes: From how many lanes each is dealt.
        size: Entries of a step over all ranks.
        longer: How many of the first steps have one entry more than that.
        lane_sizes: Entries of each lane.
    """

    steps: int
    lanes: int
    size: int
    longer: int
    lane_sizes: tuple[int, ...]

    @classmethod
    def full(cls, kept: int, lanes: int, global_batch: int, drop_last: bool) -> Self:
        """Steps of the global batch, which the last one is filled up to; the lanes are equal shares of ``kept``."""
        share, extra = divmod(kept, lanes)
        sizes = tuple(share + (lane < extra) for lane in range(lanes))
        return cls(count_steps(kept, global_batch, drop_last), lanes, global_batch, 0, sizes)

    @classmethod
    def even(cls, kept: int, lanes: int, steps: int) -> Self:
        """``kept`` entries in so many ``steps``; the lanes are what the steps take from them."""
        size, longer = divmod(kept, steps)
        deal = cls(steps, lanes, size, longer, ())
        return cls(steps, lanes, size, longer, tuple(deal._before(lane, steps) for lane in range(lanes)))

    def size_of(self, step: int) -> int:
        """Entries of ``step`` over all ranks."""
        return self.size + (step < self.longer)

    def _before(self, lane: int, step: int) -> int:
        """How many entries of ``lane`` the steps before ``step`` hold."""
        longer = min(step, self.longer)
        return longer * self._width(lane, self.size + 1) + (step - longer) * self._width(lane, self.size)

    def _width(self, lane: int, size: int) -> int:
        return size * (lane + 1) // self.lanes - size * lane // self.lanes

    def stretches(self, lane: int) -> tuple[Stretch, ...]:
        """How ``lane`` is read, from its start on."""
        longer, rest = Stretch(0, self._width(lane, self.size + 1)), self._width(lane, self.size)
        return (longer, Stretch(self._before(lane, self.longer), rest)) if self.longer else (Stretch(0, rest),)

    def spans(self, step: int, rank: int, world_size: int) -> Iterator[Span]:
        """What ``rank`` of ``world_size`` reads in ``step``, lane by lane; nothing where there are fewer entries."""
        size = self.size_of(step)
        low, high = size * rank // world_size, size * (rank + 1) // world_size
        lane = low * self.lanes // max(1, size)
        while low < high:
            begin, end = size * lane // self.lanes, size * (lane + 1) // self.lanes
            if low < end:
                place = self._before(lane, step) - begin
                yield Span(lane, place + low, place + min(high, end))
                low = end
            lane += 1

    def idle(self, step: int, rank: int, world_size: int) -> Span:
        """One entry, of those that a step near ``step`` holds, for a rank that has none."""
        filled = [lane for lane, size in enumerate(self.lane_sizes) if size]
        lane = min(filled, key=lambda lane: abs(lane - rank * self.lanes // world_size))
        place = min(self._before(lane, step), self.lane_sizes[lane] - 1)
        return Span(lane, place, place + 1)
