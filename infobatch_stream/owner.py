"""Who trains on a store: the lock that keeps a second run away from it.

The file ``pending/owner.json`` in the store is locked (flock) by every process of the run as long as it lives, so a
lock never outlasts its run, however that ended. What is written in it names the run in the error that another one
gets; without a lock on it, it means nothing, so a stale or garbled one is no obstacle.
"""

import datetime
import fcntl
import json
import os
import re
import socket
import warnings
import weakref
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, Self

from infobatch_stream.errors import StoreError
from infobatch_stream.node import kernel

__all__ = ["Owner"]

_LIMIT = 4096  # bytes of the file that are read
_PIDS = 1 << 32
_WIDTH = 255  # characters of a text that are shown


class Owner:
    """A hold on the store at ``path``; gone when it is dropped, or its process ends."""

    _all: ClassVar["weakref.WeakSet[Owner]"] = weakref.WeakSet()

    def __init__(self, path: Path) -> None:
        """Use `claim` or `join`."""
        self._path = path
        place = path / "pending" / "owner.json"
        try:
            self._file = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StoreError(
                f"{place} cannot be written ({error.strerror}); a run needs a store on a disk that it may write to."
            ) from error
        self._close = weakref.finalize(self, os.close, self._file)
        self._all.add(self)

    @classmethod
    def claim(cls, path: Path, run: str) -> Self:
        """Take the store for ``run``, a text that only its processes know.

        A process may claim what its run has: a loader is made again in a notebook, say. Raises StoreError when
        processes of another run hold it.
        """
        owner = cls(path)
        if owner._lock(fcntl.LOCK_EX, warn=True):
            owner._write(run)
        else:
            found = owner._read()
            # The number too, since a process that was forked has the text of its parent.
            if (found.get("run"), found.get("pid")) != (run, os.getpid()):
                raise owner._in_use()
        owner._share()
        return owner

    @classmethod
    def join(cls, path: Path) -> Self:
        """Hold the store with the process of this run that claimed it."""
        owner = cls(path)
        owner._share()
        return owner

    @classmethod
    def of(cls, path: Path) -> str:
        """Who trains on the store at ``path``, as far as this machine knows; "" for nobody. Takes no lock itself."""
        place = path / "pending" / "owner.json"
        try:
            inode = place.stat().st_ino
            locks = Path("/proc/locks").read_text()
            held = re.search(rf"\bFLOCK\b.* [0-9a-f]+:[0-9a-f]+:{inode} ", locks)
            return _described(_parsed(place.read_bytes()[:_LIMIT])) if held else ""
        except OSError:
            return ""

    def _lock(self, kind: int, *, warn: bool = False) -> bool:
        """Whether the lock could be had; a file system without locks gives it to everybody."""
        try:
            fcntl.flock(self._file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if warn:
                warnings.warn(
                    f"{self._path} is on a file system without locks ({error.strerror}), so another run that uses it "
                    "is noticed at the end of an epoch only. See to it that there is none.",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return True

    def _share(self) -> None:
        # From exclusive to shared there is a moment without a lock, in which another run may be quicker.
        if not self._lock(fcntl.LOCK_SH):
            raise self._in_use()

    def _in_use(self) -> StoreError:
        return StoreError(
            f"{self._path} is in use: {_described(self._read())}. Two runs on one store would spoil each other's "
            "scores: give this one a store of its own, or end that one (all of its processes)."
        )

    def _write(self, run: str) -> None:
        facts = {
            "run": run,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "boot": kernel(),
            "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        with suppress(OSError):  # on a full disk the lock holds without a name
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, json.dumps(facts).encode(), 0)

    def _read(self) -> dict[str, object]:
        try:
            return _parsed(os.pread(self._file, _LIMIT, 0))
        except OSError:
            return {}

    @classmethod
    def _forget(cls) -> None:
        """In a forked worker, which does not train: it must not keep the lock beyond the life of its parent."""
        for owner in list(cls._all):
            owner._close()


os.register_at_fork(after_in_child=Owner._forget)


def _parsed(text: bytes) -> dict[str, object]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _described(found: dict[str, object]) -> str:
    pid, host, since = (found.get(name) for name in ("pid", "host", "since"))
    if type(pid) is not int or not 0 < pid < _PIDS or not isinstance(host, str) or not isinstance(since, str):
        return "another process holds its lock"
    name, since = f"process {pid} on {host[:_WIDTH]}", since[:_WIDTH]
    if found.get("boot") == kernel() and not Path(f"/proc/{pid}").exists():
        return f"{name}, which began at {since}, is gone, but other processes of its run are still there"
    return f"{name} trains with it since {since}"
