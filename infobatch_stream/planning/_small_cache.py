"""The last few values of a function, kept."""

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

__all__ = ["SmallCache"]

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class SmallCache(Generic[K, T]):
    """The values for the last ``size`` keys that were asked for. Threads may share it.

    It is given the function each time: one that held a method of its owner (as lru_cache does) would make a cycle,
    and keep the owner's memory until the garbage collector comes by.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: tuple[tuple[K, T], ...] = ()  # replaced as a whole, never changed

    def get(self, key: K, make: Callable[[K], T]) -> T:
        """``make(key)``, which is made only if it is not kept."""
        kept = self._kept
        for known, value in kept:
            if known == key:
                return value
        value = make(key)
        self._kept = ((key, value), *kept[: self._size - 1])
        return value
