"""A store that is being made beside its place: invisible until it is whole, and gone if it never is."""

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from infobatch_stream._files import abandoned, hold, make_held, mark, remove_abandoned, sync
from infobatch_stream.errors import StoreError
from infobatch_stream.store import layout
from infobatch_stream.store.header import Header, check_is_store, read_header
from infobatch_stream.store.history import carry, mend

__all__ = ["StagedStore", "PathTakenError", "put_back", "tidy"]


class PathTakenError(StoreError):
    """Something stands at the path of a store that was to be made there."""


class StagedStore:
    """The files of a new store, in a hidden folder next to ``path``; `place` makes them the store at ``path``.

    Every byte is written at once, so that a run cannot hit a full disk later. One whose process was killed is
    removed by the next one for the same path: its folder is locked (flock) as long as its process lives.

    Raises StoreError when ``path`` is taken by something else than a store to be replaced, when the folder cannot be
    written or the disk is full.
    """

    def __init__(
        self,
        path: Path,
        header: Header,
        *,
        scores: ArrayLike | None = None,
        pending: ArrayLike | None = None,
        replace: bool = False,
    ) -> None:
        self._path = path
        self._replace = replace
        self._header = header
        self._lock = -1
        self.folder = path  # until there is one
        self._old: int | None = None
        self._needed = 2 * layout.file_size(header.num_samples)
        try:
            if path.exists():
                if not replace:
                    raise _taken(path)
                check_is_store(path)
                self._old = path.stat().st_ino
            path.parent.mkdir(parents=True, exist_ok=True)
            tidy(path)
            if shutil.disk_usage(path.parent).free < self._needed:  # or other programs would feel the full disk first
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.folder, self._lock = make_held(self._make)
            layout.write_new(self.folder, header, {"scores": scores, "pending": pending})
        except OSError as error:
            self.discard()
            raise self._failure(error) from error
        except BaseException:
            self.discard()
            raise

    def _make(self) -> Path:
        self.folder = self._path.with_name(f".{self._path.name}.new-{mark()}")
        self.folder.mkdir()
        return self.folder

    def fill(self, array: str, start: int, values: NDArray[np.float32]) -> None:
        """Put ``values`` (float32[k]) at ``start`` of "scores" or "pending"."""
        whole = layout.map_array(self.folder, array, self._header.num_samples, "r+")
        whole[start : start + len(values)] = values
        whole.flush()

    def keep_history(self) -> None:
        """Take over what is known of earlier epochs from the store at the path, if it is of the same data."""
        with suppress(StoreError):  # damaged: it is replaced for that
            old = read_header(self._path)
            if (old.num_samples, old.fingerprint) != (self._header.num_samples, self._header.fingerprint):
                return
            with suppress(StoreError):
                if old.state != "apply":  # then these are the scores that its last epoch left
                    layout.check_files(self._path, old.num_samples)
                    mend(self._path, old.epoch, layout.map_array(self._path, "scores", old.num_samples, "r"))
            # Of an epoch that it did not commit there may be half a row.
            carry(self._path, self.folder, old.num_samples, min(old.epoch, self._header.epoch))

    def place(self) -> None:
        """Make it the store at the path, by renaming; a store to be replaced is moved aside first, then removed."""
        old = self._path.with_name(f".{self._path.name}.old-{mark()}")
        held = -1
        try:
            if self._replace and self._path.exists():
                held = hold(self._path)
                if os.fstat(held).st_ino != self._old:  # another process has replaced it already
                    raise _taken(self._path)
                self._path.rename(old)
            try:
                self.folder.rename(self._path)
            except OSError as error:
                if old.exists():
                    old.rename(self._path)
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):  # another process was quicker
                    raise _taken(self._path) from error
                raise
            sync(self._path.parent)
        except OSError as error:
            raise self._failure(error) from error
        finally:
            self.discard()
            if held >= 0:
                os.close(held)
        shutil.rmtree(old, ignore_errors=True)
        tidy(self._path)  # an earlier process may have been killed before it came so far

    def discard(self) -> None:
        """Remove what was not placed."""
        if self.folder != self._path:
            shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _failure(self, error: OSError) -> StoreError:
        return StoreError(
            f"cannot create the score store {self._path}: {error.strerror or error}. "
            f"It needs {self._needed:,} bytes on a disk that can be written."
        )


def put_back(path: Path) -> None:
    """Undo a replacement whose process was killed between the two renames: what stood at ``path`` lies beside it."""
    if path.exists() or not path.parent.is_dir():
        return
    aside = list(abandoned(path.parent, f".{path.name}.old-"))
    if len(aside) == 1:
        with suppress(OSError):  # another process was quicker
            aside[0].rename(path)


def tidy(path: Path) -> None:
    """Remove what processes that were killed left beside ``path``: staged and replaced stores, marks of ranks."""
    with suppress(OSError):
        for kind in ("new", "rank", *(["old"] if path.exists() else [])):
            remove_abandoned(path.parent, f".{path.name}.{kind}-")


def _taken(path: Path) -> PathTakenError:
    return PathTakenError(f"{path} exists. Open it with ScoreStore.open, or choose another path.")
