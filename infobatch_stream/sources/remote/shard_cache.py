"""Copies of remote shards in a local folder, shared by the processes of this machine and kept within a limit.

Files in the folder for each url (STEM: the beginning of its last part, and a digest of the whole of it):

    STEM.shard             the shard, whole; its access time is its last use
    STEM.index.npz         its index (see `tar_index`)
    FILE.claim             locked by the process that makes FILE (see `single_flight`)
    FILE.room              bytes that process has reserved for it, within the limit; a number as text
    FILE.HEX.part          the unfinished file
"""

import hashlib
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from infobatch_stream._files import lock, locked, unlock
from infobatch_stream._urls import AnyPath
from infobatch_stream._validation import bytes_of
from infobatch_stream.errors import ConfigError, DataError
from infobatch_stream.sources.remote.download import download
from infobatch_stream.sources.remote.single_flight import lock_path, single_flight

__all__ = ["Make", "ShardCache"]

# Writes a file to a place, and calls a function with a number of bytes before it has more of them.
Make = Callable[[Path, Callable[[int], None]], None]

_OURS = re.compile(r"(?s)(?P<file>.*\.[0-9a-f]{32}\.(shard|index\.npz))(?P<more>|\.claim|\.room|\.[0-9a-f]{8}\.part)")
_FIRST = 2**26  # bytes that are reserved at first for a shard of unknown size
_TICK = 0.02  # seconds between two looks at whether there is room


class ShardCache:
    """The folder and its limit, which complete shards and reservations for unfinished ones never exceed.

    folder: default infobatch-stream in $XDG_CACHE_HOME or ~/.cache. limit: bytes, as a number or as "200gb" (powers
    of 1024); None for no limit. To make room, the least recently used shards are removed. Indexes, which take a
    thousandth or so, stay and do not count. Only files that this class named are ever removed.

    Any number of threads and processes may share it; it holds no lock between calls.
    """

    def __init__(self, folder: AnyPath | None = None, limit: int | str | None = None) -> None:
        if folder is None:
            folder = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "infobatch-stream")
        self.folder = Path(folder).absolute()
        self.limit = None if limit is None else bytes_of("cache_limit", limit)
        self._tidied = -1  # the process that removed stale files

    def place(self, url: str, suffix: str = ".shard") -> Path:
        """Where the shard of ``url`` lies, or would; with ".index.npz" its index."""
        return self.folder / f"{_cached_name(url)}{suffix}"

    def find(self, url: str, size: int | None = None) -> str | None:
        """The path of the shard, marked as used now; None if it is not here, or has not ``size`` bytes if given."""
        place = self.place(url)
        try:
            stat = place.stat()
        except OSError:
            return None
        if size is not None and stat.st_size != size:
            return None
        with suppress(OSError):  # of another user, who shares it
            os.utime(place, ns=(time.time_ns(), stat.st_mtime_ns))
        return str(place)

    def ensure_local(self, url: str, expected_size: int | None = None) -> str:
        """The path of the shard, downloaded if it is not local.

        Of several callers one downloads it and the others wait. Under a limit it may be removed again at any moment.
        Raises DataError (see `download`), also for a full disk, and ConfigError if the limit is too small.
        """
        if found := self.find(url, expected_size):
            return found
        self.check(url, expected_size or 0)
        place = self.place(url)
        self.fill(
            place,
            url,
            lambda part, need: download(url, part, expected_size, need=need),
            lambda: self.find(url, expected_size) is not None,
            expected_size,
        )
        return str(place)

    def fill(self, place: Path, url: str, make: Make, is_there: Callable[[], bool], size: int | None = 0) -> None:
        """Have ``make`` write the file at ``place``, unless ``is_there`` once the lock is held.

        size: bytes that it takes within the limit while it is made, None if unknown. Raises as `ensure_local`.
        """
        try:
            self._tidy()
            with single_flight(place) as died:
                if is_there():
                    return
                if died:
                    _remove_parts(place)
                place.unlink(missing_ok=True)
                self._fill(place, url, make, size)
        except OSError as error:
            raise DataError(
                f"{url} could not be kept in {self.folder} ({error.strerror or error}). Make room there, set a "
                "cache_limit, or name another folder with cache_dir=."
            ) from error

    def _fill(self, place: Path, url: str, make: Make, size: int | None) -> None:
        room = _Room(self, place, url, _FIRST if size is None else size)
        try:
            while True:
                room.wait()
                part = place.with_name(f"{place.name}.{secrets.token_hex(4)}.part")
                try:
                    make(part, room.need)
                    with part.open("rb") as file:
                        os.fsync(file.fileno())  # else a crash could leave a truncated file under the final name
                    part.replace(place)
                except _NoRoom:  # start again: two that wait while they hold room would wait for each other
                    continue
                finally:
                    part.unlink(missing_ok=True)
                return
        finally:
            room.leave()

    def check(self, url: str, size: int) -> None:
        """Raise ConfigError if a shard of ``size`` bytes is larger than the limit."""
        if self.limit is not None and size > self.limit:
            raise ConfigError(
                f"cache_limit is {self.limit:,} bytes, but the shard {url} has {size:,}. The limit must hold at least "
                "one shard, and should hold a few hundred, since a shuffled batch is of many."
            )

    def reserve(self, place: Path, size: int) -> bool:
        """Reserve ``size`` bytes for the file at ``place``, removing others; whether there is room."""
        with locked(self.folder / ".lock", os.O_RDWR | os.O_CREAT):  # of all threads and processes one is within
            ready: dict[str, os.stat_result] = {}
            reservations: dict[str, int] = {}
            for path, file, more in self._ours():
                if more == ".room" and file != place.name:
                    with suppress(FileNotFoundError):
                        if not _remove_if_dead(self.folder / file):
                            reservations[file] = int(path.read_text() or 0)
                            continue
                if more in ("", ".room") and file.endswith(".shard"):  # it may be finished since they were listed
                    with suppress(FileNotFoundError):
                        ready[file] = (self.folder / file).stat()
            reserved = size + sum(reservations[file] for file in reservations.keys() - ready.keys())
            assert self.limit is not None
            if reserved > self.limit:
                return False
            total = reserved + sum(stat.st_size for stat in ready.values())
            for file in sorted(ready, key=lambda file: ready[file].st_atime_ns):
                if total <= self.limit:
                    break
                (self.folder / file).unlink(missing_ok=True)
                total -= ready[file].st_size
            place.with_name(f"{place.name}.room").write_text(str(size))
            return True

    def _ours(self) -> Iterator[tuple[Path, str, str]]:
        """Path of each of our files, the file that it belongs to, and what its name has besides."""
        for path in self.folder.iterdir():
            if match := _OURS.fullmatch(path.name):
                yield path, match["file"], match["more"]

    def _tidy(self) -> None:
        """Once in each process, remove the stale unfinished files of dead ones."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._tidied != os.getpid():
            self._tidied = os.getpid()
            for path, file, more in self._ours():
                if more == ".claim":
                    _remove_if_dead(path.parent / file)


class _NoRoom(Exception):  # noqa: N818 - no error: it begins again
    """An unfinished file needs more than could be reserved for it."""


class _Room:
    """The bytes that are reserved for one unfinished file."""

    def __init__(self, cache: ShardCache, place: Path, url: str, size: int) -> None:
        self._cache = cache
        self._place = place
        self._url = url
        self._wanted = size if cache.limit is None else min(size, cache.limit)

    def wait(self) -> None:
        """Return when there is room for what is wanted."""
        if self._cache.limit is None or not self._wanted:
            return
        while not self._cache.reserve(self._place, self._wanted):
            time.sleep(_TICK)

    def need(self, size: int) -> None:
        """Reserve more, if ``size`` bytes are more than there are. Raises _NoRoom if others have it."""
        limit = self._cache.limit
        if limit is None or size <= self._wanted:
            return
        self._cache.check(self._url, size)
        self._wanted = min(limit, max(size, 2 * self._wanted))
        if not self._cache.reserve(self._place, self._wanted):
            self.leave()
            raise _NoRoom

    def leave(self) -> None:
        """Give the reservation back."""
        self._place.with_name(f"{self._place.name}.room").unlink(missing_ok=True)


def _remove_if_dead(place: Path) -> bool:
    """Whether no process makes the file at ``place``; its stale parts are then removed."""
    path = lock_path(place)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        if not lock(descriptor):
            return False
        _remove_parts(place)
        path.unlink(missing_ok=True)
        unlock(descriptor)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _remove_parts(place: Path) -> None:
    """Remove the stale parts of the file at ``place``."""
    for path in place.parent.iterdir():
        if path.name.startswith(f"{place.name}.") and path.name.endswith((".part", ".room")):
            path.unlink(missing_ok=True)


def _cached_name(url: str) -> str:
    """The stem of the names that files of ``url`` have in a cache: no two urls have the same."""
    name = url.rstrip("/").rpartition("/")[2].encode(errors="surrogateescape").replace(b"\0", b"")
    digest = hashlib.sha256(os.fsencode(url)).hexdigest()[:32]
    return f"{os.fsdecode(name[:32])}.{digest}"
