"""Who trains on a store: the lock that keeps a second run away from it.

The file ``pending/owner.json`` in the store is locked (flock) by every process of the run as long as it lives, so a
lock never outlasts its run, however that ended. What is written in it names the run in the error that another one
gets; without a lock on it, it means nothing, so a stale or garbled one is no obstacle.
"""

import datetime
import json
import os
import re
import socket
import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, Self

from infobatch_stream._files import lock
from infobatch_stream._platform import kernel
from infobatch_stream._process_wide import at_fork_in_child
from infobatch_stream.errors import StoreError
from infobatch_stream.store.safe_files import open_inside

__all__ = ["RunLock"]

_NAME = "pending/owner.json"
_LIMIT = 4096  # bytes of the file that are read
_PIDS = 1 << 32
_WIDTH = 255  # characters of a text that are shown


class RunLock:
    """A hold on the store at ``path``; gone when it is dropped, or its process ends."""

    _all: ClassVar["weakref.WeakSet[RunLock]"] = weakref.WeakSet()

    def __init__(self, path: Path, shown: Path | None = None) -> None:
        """Use `acquire` or `join`."""
        self._path = shown or path
        place = path / _NAME
        try:
            self._file = open_inside(path, _NAME, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise StoreError(
                f"{place} cannot be written ({error.strerror}); a run needs a store on a disk that it may write to."
            ) from error
        self._close = weakref.finalize(self, os.close, self._file)
        if os.fstat(self._file).st_nlink > 1:
            raise StoreError(f"{place} has other names (hard links), which would be written to; remove it.")
        self._iterator: Callable[[], object] = _nobody
        self._leave: Callable[[], None] | None = None
        self._all.add(self)

    def used_by(self, leave: Callable[[], None]) -> None:
        """Call ``leave`` when another loader of this process takes the store over."""
        self._leave = leave

    def iterated_by(self, iterator: object) -> None:
        """No other loader of this process may have the store as long as this iterator is in use; None: it may."""
        self._iterator = _nobody if iterator is None else weakref.ref(iterator)

    @classmethod
    def acquire(cls, path: Path, run: str, shown: Path | None = None) -> Self:
        """Take the store for ``run``, a text that only its processes know. shown: the path that errors name.

        A process may acquire what its run has: a loader is made again in a notebook, say. The older one then loses it.
        Raises StoreError when processes of another run hold it, or another loader of this process is iterating.
        """
        held = cls(path, shown)
        if held._lock(warn=True):
            held._write(run)
        else:
            found = held._read()
            # The number too, since a process that was forked has the text of its parent.
            if (found.get("run"), found.get("pid")) != (run, os.getpid()):
                raise held._in_use()
            for other in held._others():
                if getattr(other._iterator(), "gi_frame", None) is not None:
                    raise StoreError(
                        f"{held._path} is in use: another loader of this process is in the midst of an epoch with it. "
                        "Give each loader a store of its own; to go on with this one, drop the other's iterator (del). "
                        "A notebook keeps the last error, and the iterator with it: there run this again."
                    )
        held._share()
        return held

    @classmethod
    def join(cls, path: Path) -> Self:
        """Hold the store with the process of this run that acquired it."""
        held = cls(path)
        held._share()
        return held

    @classmethod
    def check_unused(cls, path: Path) -> None:
        """Raise StoreError when another run holds the store, if there is one."""
        if not (path / _NAME).is_file():
            return
        held = cls(path)
        if not held._lock():
            raise held._in_use()

    @classmethod
    def of(cls, path: Path) -> str:
        """Who trains on the store at ``path``, as far as this machine knows; "" for nobody. Takes no lock itself."""
        try:
            with os.fdopen(open_inside(path, _NAME), "rb") as file:
                inode, text = os.fstat(file.fileno()).st_ino, file.read(_LIMIT)
            locks = Path("/proc/locks").read_text()
            held = re.search(rf"\bFLOCK\b.* [0-9a-f]+:[0-9a-f]+:{inode} ", locks)
            return _described(_parsed(text)) if held else ""
        except OSError:
            return ""

    def _lock(self, *, shared: bool = False, warn: bool = False) -> bool:
        """Whether the lock could be had; a file system without locks gives it to everybody."""
        try:
            return lock(self._file, shared=shared)
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
        if not self._lock(shared=True):
            raise self._in_use()

    def take_over(self) -> None:
        """End the use of the store by other loaders of this process."""
        for other in self._others():
            if other._leave:
                other._leave()

    def _others(self) -> list["RunLock"]:
        """Other holds of this process on the same store."""
        mine = os.fstat(self._file)
        found = [other for other in self._all if other is not self and other._close.alive]
        return [other for other in found if os.path.samestat(os.fstat(other._file), mine)]

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
        for held in list(cls._all):
            held._close()


at_fork_in_child(RunLock._forget)


def _nobody() -> None:
    return None


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
