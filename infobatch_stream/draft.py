"""A store that is being made beside its place: invisible until it is whole, and gone if it never is."""

import errno
import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from infobatch_stream import layout
from infobatch_stream.errors import StoreError
from infobatch_stream.history import carry
from infobatch_stream.litter import abandoned, hold, remove_abandoned

__all__ = ["Draft", "put_back", "tidy"]


class Draft:
    """The files of a new store, in a hidden folder next to ``path``; `place` makes them the store at ``path``.

    Every byte is written at once, so that a run cannot hit a full disk later. A draft whose process was killed is
    removed by the next one for the same path: its folder is locked (flock) as long as its process lives.

    Raises StoreError when ``path`` is taken by something else than a store to be replaced, when the folder cannot be
    written or the disk is full.
    """

    def __init__(
        self,
        path: Path,
        header: layout.Header,
        *,
        scores: ArrayLike | None = None,
        pending: ArrayLike | None = None,
        replace: bool = False,
    ) -> None:
        self._path = path
        self._replace = replace
        self._header = header
        self._lock = -1
        self._new = path.with_name(f".{path.name}.new-{secrets.token_hex(4)}")
        self._needed = 2 * layout.file_size(header.num_samples)
        try:
            if path.exists():
                if not replace:
                    raise _taken(path)
                layout.check_is_store(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            tidy(path)
            if shutil.disk_usage(path.parent).free < self._needed:  # or other programs would feel the full disk first
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._new.mkdir()
            self._lock = hold(self._new)
            layout.write_new(self._new, header, {"scores": scores, "pending": pending})
        except OSError as error:
            self.discard()
            raise self._failure(error) from error
        except BaseException:
            self.discard()
            raise

    def fill(self, array: str, start: int, values: NDArray[np.float32]) -> None:
        """Put ``values`` (float32[k]) at ``start`` of "scores" or "pending"."""
        whole = layout.map_array(self._new, array, self._header.num_samples, "r+")
        whole[start : start + len(values)] = values
        whole.flush()

    def keep_history(self) -> None:
        """Take over what is known of earlier epochs from the store at the path, if it is of the same data."""
        with suppress(StoreError):  # damaged: it is replaced for that
            old = layout.read_header(self._path)
            if (old.num_samples, old.fingerprint) == (self._header.num_samples, self._header.fingerprint):
                carry(self._path, self._new, self._header.epoch)

    def place(self) -> None:
        """Make it the store at the path, by renaming; a store to be replaced is moved aside first, then removed."""
        old = self._path.with_name(f".{self._path.name}.old-{secrets.token_hex(4)}")
        held = -1
        try:
            if self._replace and self._path.exists():
                held = hold(self._path)
                self._path.rename(old)
            try:
                self._new.rename(self._path)
            except OSError as error:
                if old.exists():
                    old.rename(self._path)
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):  # another process was quicker
                    raise _taken(self._path) from error
                raise
            layout.sync_folder(self._path.parent)
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
        shutil.rmtree(self._new, ignore_errors=True)
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
        aside[0].rename(path)


def tidy(path: Path) -> None:
    """Remove what processes that were killed left beside ``path``: drafts, stores moved aside, marks of ranks."""
    with suppress(OSError):
        for kind in ("new", "rank", *(["old"] if path.exists() else [])):
            remove_abandoned(path.parent, f".{path.name}.{kind}-")


def _taken(path: Path) -> StoreError:
    return StoreError(f"{path} exists. Open it with ScoreStore.open, or choose another path.")
