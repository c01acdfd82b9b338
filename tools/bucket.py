"""Shards that go to a URL, by fsspec."""

import errno
import json
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from infobatch_stream.errors import ConfigError, MissingExtraError

from .destination import STATE, Destination, Record, broken_off, check_recipe, is_ours, refuse_foreign

__all__ = ["is_url", "url_destination"]

_UPLOADS = 4  # at once


def is_url(dst: object) -> bool:
    """Whether ``dst`` names a place for fsspec, and not a local path."""
    return "://" in str(dst) and not str(dst).startswith("file:")


@contextmanager
def url_destination(
    url: str, *, recipe: Mapping[str, Any] | None = None, resume: bool = False
) -> Iterator[Destination]:
    """``url`` as a `Destination`. A shard is uploaded as a whole; index.json, classes.json come when all are there.

    Nothing keeps two conversions to one URL apart. What is there is never replaced: that could not be undone when the
    new shards fail. Shards are made in a temporary folder, which needs room for a few. Raises ConfigError where ``url``
    holds something, or cannot be written to, and OSError.
    """
    with tempfile.TemporaryDirectory(prefix="infobatch-convert-") as scratch, ThreadPoolExecutor(_UPLOADS) as threads:
        bucket = _Bucket(url, Path(scratch), threads)
        try:
            bucket.begin(recipe, resume)
            yield bucket
            bucket.finish()
        except BaseException as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                error.filename = scratch
            threads.shutdown(cancel_futures=True)
            if bucket.begun and not bucket.leave(keep=recipe is not None):
                error.add_note(f"The shards that are done are kept in {url}: go on with --resume, or remove them.")
            raise


class _Bucket:
    """A `Destination` at a URL."""

    def __init__(self, url: str, scratch: Path, threads: ThreadPoolExecutor) -> None:
        self.scratch = scratch
        self.done: list[Record] = []
        self.begun = False
        self._url = url.rstrip("/")
        self._threads = threads
        self._uploads: deque[Future[None]] = deque()
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

    def begin(self, recipe: Mapping[str, Any] | None, resume: bool) -> None:
        """Look at what is there."""
        with self._told():
            self._fs.invalidate_cache()
            held = [path[len(self._root) :].lstrip("/") for path in self._fs.find(self._root)]
        if f"{STATE}/recipe.json" in held:
            if not resume or recipe is None:
                raise broken_off(self._url, self._url)
            refuse_foreign(self._url, held)
            self._resume(set(held), recipe)
        elif held:
            raise ConfigError(
                f"{self._url} is not empty; give another, or remove what is there: shards in a bucket are not replaced."
            )
        self.begun = True
        self.write(f"{STATE}/recipe.json", json.dumps(recipe))
        self._next = len(self.done)

    def _resume(self, held: set[str], recipe: Mapping[str, Any]) -> None:
        with self._told():
            check_recipe(self._url, self._fs.cat_file(f"{self._root}/{STATE}/recipe.json"), recipe)
            for number in range(len(held)):
                name = f"{STATE}/done/{number:06d}.json"
                if name not in held:
                    break
                record = json.loads(self._fs.cat_file(f"{self._root}/{name}"))
                if not held.issuperset(record["files"]):
                    break
                self.done.append(record)

    def publish(self, record: Record, files: Mapping[str, Path]) -> None:
        while len(self._uploads) >= 2 * _UPLOADS:
            self._uploads.popleft().result()
        self._uploads.append(self._threads.submit(self._upload, self._next, record, dict(files)))
        self._next += 1

    def _upload(self, number: int, record: Record, files: dict[str, Path]) -> None:
        for name, path in files.items():
            with self._told():
                self._fs.put_file(str(path), f"{self._root}/{name}")
            path.unlink()
        self.write(f"{STATE}/done/{number:06d}.json", json.dumps(record))

    def write(self, name: str, text: str) -> None:
        if not name.startswith(STATE):
            self._wait()
        with self._told():
            self._fs.pipe_file(f"{self._root}/{name}", text.encode())

    def _wait(self) -> None:
        while self._uploads:
            self._uploads.popleft().result()

    def finish(self) -> None:
        """All is there."""
        self._wait()
        with self._told():
            self._fs.rm(f"{self._root}/{STATE}", recursive=True)

    def leave(self, keep: bool) -> bool:
        """After a failure: remove all that was put, unless it is to be kept and a task is done; whether that was so."""
        with suppress(Exception):  # what failed before may fail again; the cause passes on
            self._fs.invalidate_cache()
            held = self._fs.find(self._root)
            if keep and any(f"/{STATE}/done/" in path for path in held):
                return False
            self._fs.rm([path for path in held if is_ours(path[len(self._root) :].lstrip("/"))])
        return True

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Say of an error that comes from elsewhere which URL it is about."""
        try:
            yield
        except (ConfigError, MissingExtraError):
            raise
        except Exception as error:  # of whatever library stands behind the protocol
            raise OSError(f"{self._url} cannot be written ({type(error).__name__}: {error}).") from error
