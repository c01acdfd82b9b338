"""The last few values of a function, kept."""

from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Recent"]

T = TypeVar("T")


class Recent(Generic[T]):
    """The values for the last ``size`` numbers that were asked for. Threads may share it.

    It is given the function each time: one that held a method of its owner (as lru_cache does) would make a cycle,
    and keep the owner's memory until the garbage collector comes by.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: tuple[tuple[int, T], ...] = ()  # replaced as a whole, never changed

    def get(self, number: int, make: Callable[[int], T]) -> T:
        """``make(number)``, which is made only if it is not kept."""
        kept = self._kept
        for known, value in kept:
            if known == number:
                return value
        value = make(number)
        self._kept = ((number, value), *kept[: self._size - 1])
        return value
