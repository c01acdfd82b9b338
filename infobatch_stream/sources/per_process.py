"""Objects that travel to worker processes, and hold something that does not."""

from typing import Any, ClassVar

__all__ = ["PerProcess"]


class PerProcess:
    """An object of which some attributes belong to one process, such as open files, connections and locks.

    Pickle leaves the attributes `_own` out, and each process makes its own by `_renew`.
    """

    _own: ClassVar[tuple[str, ...]]

    def _renew(self) -> None:
        """Set all attributes of `_own`, with nothing open yet. `__init__` calls it too."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        """The attributes that travel."""
        return {name: value for name, value in vars(self).items() if name not in self._own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The attributes that travelled, and those of this process."""
        vars(self).update(state)
        self._renew()
