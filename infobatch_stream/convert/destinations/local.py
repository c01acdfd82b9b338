"""Where shards go: a folder, which appears when it is complete, or a URL, where what names the shards comes last."""

import errno
import json
import os
import secrets
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from infobatch_stream._files import lock
from infobatch_stream.convert.destinations.base import Destination, Record, Request, broken_off, drop_empty
from infobatch_stream.errors import ConfigError
from infobatch_stream.formats.shard_set import PLAN, STATE, is_ours, refuse_foreign, refuse_other_sets

__all__ = ["local_destination"]

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def local_destination(dst: Path, request: Request) -> Iterator[Destination]:
    """A new folder beside ``dst``, renamed to ``dst`` at the end.

    If anything is raised it is removed, or kept with a note at the error, if it can be resumed and some shards are
    done. A kill leaves it. Raises ConfigError where ``dst`` cannot be made: it holds something (with ``overwrite``:
    something else than shards, or shards in other folders), is a file or a mount point, or its parent cannot be written
    to; where a conversion was broken off, or is running; and for another recipe.
    """
    recipe = request.recipe
    dst = Path(dst).resolve()
    _check_free(dst, request)
    made = [folder for folder in dst.parents if not folder.exists()]
    staged = dst.with_name(f"{dst.name}.partial" + ("" if recipe is not None else f"-{secrets.token_hex(4)}"))
    if staged.exists():
        _check_resumable(staged)
        if not request.resume:
            raise broken_off(staged, dst)
    lock = None
    try:
        try:
            (staged / STATE).mkdir(parents=True, exist_ok=request.resume)
            lock = _locked(staged, dst)
            folder = _Folder(staged, request)
        except OSError as error:
            raise ConfigError(f"{dst} cannot be made ({error}); give a folder that can be written to.") from error
        yield folder
        _check_free(dst, request)  # somebody else may have written there in the meantime
        folder.drop_unnamed()
        # With its state, so that whatever happens here the work of hours is not lost.
        if dst.exists() and any(dst.iterdir()):
            _replace(dst, staged)
        else:
            staged.rename(dst)
        shutil.rmtree(dst / STATE, ignore_errors=True)
    except BaseException as error:
        if isinstance(error, OSError) and (error.errno in _FULL or (error.errno and error.filename is None)):
            error.filename = str(dst)  # errors of a full disk name none, or a file that nobody knows
        if lock is None and staged.exists():  # another conversion's
            raise
        if recipe is not None and _holds_shards(staged):
            shutil.rmtree(staged / STATE / "scratch", ignore_errors=True)
            error.add_note(request.advise(error, staged))
            raise
        _remove_ours(staged)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _check_resumable(staged: Path) -> None:
    """Raise ConfigError if ``staged`` is no conversion of ours, or holds something of the user's."""
    if not (staged / STATE / "recipe.json").is_file():
        raise ConfigError(
            f"{staged} is in the way: shards are made there first, and it holds no conversion that can be resumed. "
            "Move it away, or give another destination."
        )
    refuse_foreign(staged, _files(staged))


def _holds_shards(staged: Path) -> bool:
    """Whether a task is done that has shards, and not only samples that were passed over."""
    try:
        return any(json.loads(path.read_bytes())["files"] for path in (staged / STATE / "done").glob("*.json"))
    except (OSError, ValueError, TypeError, KeyError):  # of a record that a power failure damaged
        return True


def _remove_ours(staged: Path) -> None:
    """Remove what a conversion left in ``staged``, and the folder if nobody put anything else there."""
    with suppress(OSError):
        for name in _files(staged):
            if is_ours(name):
                (staged / name).unlink()
        for folder in sorted((path for path in staged.rglob("*") if path.is_dir()), reverse=True):
            with suppress(OSError):  # it holds something
                folder.rmdir()
        staged.rmdir()


def _files(folder: Path) -> list[str]:
    """The paths, in ``folder``, of all that is no folder; a link to a folder is none."""
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]


def _locked(staged: Path, dst: Path) -> int:
    """A descriptor that holds the lock of ``staged`` until it is closed, or this process ends."""
    descriptor = os.open(staged / STATE, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    if not lock(descriptor):
        os.close(descriptor)
        raise ConfigError(f"another process is converting to {dst}; wait for it, or give another folder.")
    return descriptor


class _Folder:
    """A `Destination` on a local disk."""

    def __init__(self, root: Path, request: Request) -> None:
        self.where, self._root, self._state = str(root), root, root / STATE
        self.scratch = self._state / "scratch"
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()
        (self._state / "done").mkdir(exist_ok=True)
        known = self._state / "recipe.json"
        if request.recipe is not None and known.exists():
            request.check_recipe(root, known.read_bytes())
        self._write(known, json.dumps(request.recipe))
        plan = root / PLAN
        self.plan = plan.read_bytes() if plan.exists() else None
        self.done: list[Record] = []
        while (record := self._record(len(self.done))) is not None:
            self.done.append(record)
        drop_empty(self.done)
        self._next = len(self.done)
        self._names = {name for record in self.done for name in record["files"]}

    def drop_unnamed(self) -> None:
        """Remove the shards that a task left that was made again, and then had fewer; nothing that others put there."""
        for name in _files(self._root):
            if is_ours(name) and name not in self._names and not name.startswith(f"{STATE}/"):
                (self._root / name).unlink()

    def _record(self, number: int) -> Record | None:
        """The record of a task whose files are all here."""
        try:
            record: Record = json.loads((self._state / "done" / f"{number:06d}.json").read_bytes())
            whole = all((self._root / name).stat().st_size == size for name, size in record["files"].items())
        except (OSError, ValueError, TypeError, KeyError, AttributeError):  # after a power failure, of any form
            return None
        return record if whole else None

    def publish(self, record: Record, files: Mapping[str, Path]) -> None:
        for name, path in files.items():
            (self._root / name).parent.mkdir(exist_ok=True)
            path.replace(self._root / name)
        self._names.update(files)
        self._write(self._state / "done" / f"{self._next:06d}.json", json.dumps(record))
        self._next += 1

    def write(self, name: str, text: str) -> None:
        (self._root / name).parent.mkdir(exist_ok=True)
        self._names.add(name)
        self._write(self._root / name, text)

    def _write(self, path: Path, text: str) -> None:
        temporary = self.scratch / "text"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)


def _replace(dst: Path, staged: Path) -> None:
    """Put ``staged`` in the place of the folder ``dst``, which is kept until that has happened."""
    old = dst.with_name(f"{dst.name}.old-{secrets.token_hex(4)}")
    dst.rename(old)
    try:
        staged.rename(dst)
    except BaseException:
        old.rename(dst)
        raise
    _remove_ours(old)
    if old.exists():
        warnings.warn(f"{dst} is replaced, but what it held before could not be removed: {old}", stacklevel=3)


def _check_free(dst: Path, request: Request) -> None:
    """Raise ConfigError where ``dst`` (absolute) may not be written; see `local_destination`."""
    if not dst.exists():
        return
    if not dst.is_dir():
        raise ConfigError(f"{dst} is a file; give a folder that does not exist yet.")
    if os.path.ismount(dst):
        raise ConfigError(f"{dst} is a mount point, which cannot be replaced as a whole; give a folder inside it.")
    if not request.overwrite and any(dst.iterdir()):
        raise ConfigError(f"{dst} is not empty; give another folder, or replace this one with --overwrite.")
    names = _files(dst)
    refuse_foreign(dst, names)
    refuse_other_sets(dst, names, request.folders)
