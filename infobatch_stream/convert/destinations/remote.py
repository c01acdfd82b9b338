"""Shards that go to a URL, by fsspec."""

import errno
import json
import re
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from infobatch_stream.convert.destinations.base import Destination, Record, Request, broken_off, drop_empty
from infobatch_stream.errors import ConfigError, MissingExtraError
from infobatch_stream.formats.shard_set import PLAN, STATE, refuse_foreign, refuse_other_sets

__all__ = ["is_url", "url_destination"]

_UPLOADS = 4  # at once
_REMOVALS = 16  # likewise
_MISREAD = re.compile(r"[*?\[\]{}#]|//|/\.{1,2}(/|$)")


def is_url(dst: object) -> bool:
    """Whether ``dst`` names a place for fsspec, and not a local path."""
    return "://" in str(dst) and not str(dst).startswith("file:")


@contextmanager
def url_destination(url: str, request: Request) -> Iterator[Destination]:
    """``url`` as a `Destination`. A shard is uploaded as a whole; index.json, classes.json come when all are there.

    Of two conversions that are begun at once, one is refused where the store can write a key only if it is new, as S3
    can; nothing keeps two apart that go on at once. What is there is never replaced: that could not be undone when the
    new shards fail. Only keys that this conversion wrote are ever removed, each by its whole name. Shards are made in a
    temporary folder, which needs room for a few. Raises ConfigError where ``url`` holds something, cannot be written
    to, or would be taken for a pattern by those who read the shards, and OSError.
    """
    _check_name(url)
    with tempfile.TemporaryDirectory(prefix="infobatch-convert-") as scratch, ThreadPoolExecutor(_UPLOADS) as threads:
        bucket = _Bucket(url, Path(scratch), threads)
        try:
            bucket.begin(request)
            yield bucket
            bucket.finish()
        except BaseException as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                error.filename = scratch
            threads.shutdown(cancel_futures=True)
            if bucket.begun and not bucket.leave(keep=request.recipe is not None):
                error.add_note(request.advise(error, url))
            raise


def _check_name(url: str) -> None:
    """Raise ConfigError for a ``url`` that means something else to a reader: a pattern, a query, a folder above."""
    path = url.partition("://")[2].rstrip("/")
    if found := _MISREAD.search(path):
        raise ConfigError(
            f"{url} has {found[0]!r} in it, so what reads the shards would look for them elsewhere; give a url without "
            "* ? [ ] { } #, without // and without . or .. as a folder."
        )


class _Bucket:
    """A `Destination` at a URL."""

    def __init__(self, url: str, scratch: Path, threads: ThreadPoolExecutor) -> None:
        self.scratch = scratch
        self.done: list[Record] = []
        self.plan: bytes | None = None
        self.begun = False
        self._url = self.where = url.rstrip("/")
        self._threads = threads
        self._uploads: deque[Future[None]] = deque()
        self._put: set[str] = set()  # names of all that this conversion wrote, or began to
        self._named: set[str] = set()  # those of them that stay
        self._recorded = False  # whether a task is done that has shards
        try:
            import fsspec
        except ImportError as error:
            raise MissingExtraError.of("fsspec", "remote") from error
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self._url)
        except ImportError as error:
            raise MissingExtraError(f"{url}: {error}. pip install 'infobatch-stream[remote]' for s3:// .") from error
        except ValueError as error:
            raise ConfigError(f"{url}: {error}") from error

    def begin(self, request: Request) -> None:
        """Look at what is there."""
        with self._naming_url():
            self._fs.invalidate_cache()
            found = self._fs.find(self._root, detail=True)
        # Without what consoles leave to show an empty folder.
        held = [
            path[len(self._root) :].lstrip("/")
            for path, what in found.items()
            if what["type"] != "directory" and not (path.endswith("/") and what["size"] == 0)
        ]
        if f"{STATE}/recipe.json" in held:
            if not request.resume or request.recipe is None:
                raise broken_off(self._url, self._url)
            refuse_foreign(self._url, held)
            refuse_other_sets(self._url, held, request.folders)
            self._put.update(held)
            self._resume(request)
            self.begun = True
        elif held:
            raise ConfigError(
                f"{self._url} is not empty; give another, or remove what is there: shards in a bucket are not replaced."
            )
        else:
            self._begin(json.dumps(request.recipe).encode())
        self._next = len(self.done)

    def _begin(self, recipe: bytes) -> None:
        """Write the recipe, unless somebody else has in the meantime."""
        name = f"{STATE}/recipe.json"
        try:
            self._fs.pipe_file(f"{self._root}/{name}", recipe, mode="create")
        except FileExistsError as error:
            raise broken_off(self._url, self._url) from error
        except Exception:  # a store that has no such mode; if it cannot be written to, the next call raises
            self.begun = True
            self.write(name, recipe.decode())
        self.begun = True
        self._put.add(name)

    def _resume(self, request: Request) -> None:
        with self._naming_url():
            request.check_recipe(self._url, self._fs.cat_file(f"{self._root}/{STATE}/recipe.json"))
            if PLAN in self._put:
                self.plan = self._fs.cat_file(f"{self._root}/{PLAN}")
            for number in range(len(self._put)):
                name = f"{STATE}/done/{number:06d}.json"
                if name not in self._put:
                    break
                record = json.loads(self._fs.cat_file(f"{self._root}/{name}"))
                if not self._put.issuperset(record["files"]):
                    break
                self.done.append(record)
                self._named.update(record["files"])
        drop_empty(self.done)
        self._recorded = bool(self.done)

    def publish(self, record: Record, files: Mapping[str, Path]) -> None:
        while len(self._uploads) >= 2 * _UPLOADS:
            self._uploads.popleft().result()
        self._named.update(files)
        self._put.update(files)
        self._uploads.append(self._threads.submit(self._upload, self._next, record, dict(files)))
        self._next += 1

    def _upload(self, number: int, record: Record, files: dict[str, Path]) -> None:
        for name, path in files.items():
            with self._naming_url():
                self._fs.put_file(str(path), f"{self._root}/{name}")
            path.unlink()
        self.write(f"{STATE}/done/{number:06d}.json", json.dumps(record))
        self._recorded = self._recorded or bool(files)

    def write(self, name: str, text: str) -> None:
        if not name.startswith(STATE):
            self._wait()
            self._named.add(name)
        self._put.add(name)
        with self._naming_url():
            self._fs.pipe_file(f"{self._root}/{name}", text.encode())

    def _wait(self) -> None:
        while self._uploads:
            self._uploads.popleft().result()

    def finish(self) -> None:
        """All is there: remove the state, last of all the recipe, and what a task left that was made again."""
        self._wait()
        recipe = f"{STATE}/recipe.json"
        with self._naming_url():
            self._remove(self._put - self._named - {recipe})
            self._remove([recipe])

    def leave(self, keep: bool) -> bool:
        """After a failure: remove all that was put, unless it is to be kept and a task is done; whether that was so."""
        if keep and self._recorded:
            return False
        with suppress(Exception):  # what failed before may fail again; the cause passes on
            self._remove(self._put)
        return True

    def _remove(self, names: Iterable[str]) -> None:
        """Remove these and nothing else: the file system's ``rm`` takes what has a ``?`` in it for a pattern."""
        with ThreadPoolExecutor(_REMOVALS) as threads:
            list(threads.map(self._remove_one, names))

    def _remove_one(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._root}/{name}")

    @contextmanager
    def _naming_url(self) -> Iterator[None]:
        """Say of an error that comes from elsewhere which URL it is about."""
        try:
            yield
        except (ConfigError, MissingExtraError):
            raise
        except Exception as error:  # of whatever library stands behind the protocol
            raise OSError(f"{self._url} cannot be written ({type(error).__name__}: {error}).") from error
