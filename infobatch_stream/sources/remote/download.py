"""Downloads through fsspec: whole or not at all, and retried where that helps."""

import asyncio
import errno
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from glob import escape
from pathlib import Path
from typing import Any, TypeVar

from infobatch_stream.errors import DataError, InfoBatchError, MissingExtraError
from infobatch_stream.sources.remote.retry import back_off, is_lasting

__all__ = [
    "BadBytesError",
    "ForbiddenError",
    "NotThereError",
    "SpoiledError",
    "download",
    "filesystem",
    "list_files",
    "list_folder",
    "run_on",
    "size_of",
]

T = TypeVar("T")

ATTEMPTS = 6
TIMEOUT = 60.0  # seconds without a byte, after which a server is taken to be gone
_TICK = 0.2  # seconds between two looks at a download
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_filesystems: dict[int, Any] = {}  # all that were made, see filesystem


class BadBytesError(Exception):
    """What came is not what was asked for; the text says how."""


class NotThereError(DataError):
    """There is no such file, or nobody may read it."""


class ForbiddenError(NotThereError):
    """It may be there, but not for those who ask like this."""


class SpoiledError(DataError):
    """The file comes, but time and again with other bytes than it should have."""


def download(
    url: str,
    place: Path,
    size: int | None = None,
    *,
    need: Callable[[int], None] = lambda _: None,
    check: Callable[[Path], None] = lambda _: None,
) -> None:
    """Write the file at ``url`` to ``place``, in a folder that exists.

    size: bytes that it must have, None if not known. need: called with a number of bytes before more are written,
    check: with the place of what came; it may raise BadBytesError. What either raises else passes.

    A server that fails, falls silent for a minute or sends too little is asked again, with pauses that grow. Raises
    NotThereError, SpoiledError or DataError, which name the url, the number of attempts and the cause; OSError if
    ``place`` cannot be written. Nothing is left then.
    """

    def attempt(fs: Any, path: str) -> None:
        try:
            progress = _Progress(size, need)
            run_on(fs, "get_file", path, str(place), progress=progress)
            found = place.stat().st_size
            for expected, who in ((progress.announced, "the server announced"), (size, "it should have")):
                if expected is not None and found != expected:
                    raise BadBytesError(f"it came with {found:,} bytes, {who} {expected:,}")
            check(place)
        except BaseException:
            place.unlink(missing_ok=True)
            raise

    _try(url, attempt)


def size_of(url: str) -> int | None:
    """Bytes of the file at ``url``; None if the server does not tell. Raises as `download`."""
    size = _try(url, lambda fs, path: run_on(fs, "info", path)["size"])
    return None if size is None else int(size)


def list_files(pattern: str) -> list[str]:
    """The urls of files that match the glob ``pattern``; of folders, with a slash behind them, if no file does.

    What exists by this very name is meant literally, also a folder in front. As on a disk, ``*`` matches no hidden
    name, and ``**`` goes into folders of any depth. Raises as `download`.
    """
    kind = _try(pattern, _kind)
    if kind is not None:
        return [pattern if kind == "file" else f"{pattern}/"]
    fixed = len(re.split(r"[*?[]", pattern, maxsplit=1)[0].rpartition("/")[0])  # of what is no pattern
    found = _list(pattern, lambda fs, path: run_on(fs, "glob", _escaped(fs, path), detail=True))
    if "/." not in pattern[fixed:]:
        found = {url: kind for url, kind in found.items() if "/." not in url[fixed:]}
    files = [url for url, kind in found.items() if kind == "file" and not url.endswith("/")]
    return files or [f"{url.rstrip('/')}/" for url in found if len(url) > fixed]


def list_folder(url: str) -> list[str]:
    """The urls of the files in the folder ``url``, which is no pattern, but of hidden ones. Raises as `download`."""
    found = _list(url.rstrip("/"), lambda fs, path: run_on(fs, "find", path, maxdepth=1, detail=True))
    return [file for file in found if not file.endswith("/") and not file.rpartition("/")[2].startswith(".")]


def _list(url: str, attempt: Callable[[Any, str], dict[str, Any]]) -> dict[str, str]:
    """What ``attempt`` finds: url -> "file" or "directory"; nothing where ``url`` is not there."""
    scheme = url.partition("://")[0]
    try:
        found = _try(url, attempt)
    except ForbiddenError:
        raise
    except NotThereError:
        return {}
    return {f"{scheme}://{name}": facts["type"] for name, facts in sorted(found.items())}


def _kind(fs: Any, path: str) -> str | None:
    """Whether there is a "file" or a "directory" at ``path``; None for neither, and where nobody says."""
    try:
        return str(run_on(fs, "info", path)["type"])
    except (FileNotFoundError, PermissionError):
        return None


def _escaped(fs: Any, path: str) -> str:
    """``path`` as a glob in which the folders in front that exist as they are written are meant literally."""
    plain = path.split("/")
    parts = list(plain)
    for place, part in enumerate(plain[:-1]):
        if escape(part) != part:
            if _kind(fs, "/".join(plain[: place + 1])) != "directory":
                break
            parts[place] = escape(part)
    return "/".join(parts)


def _try(url: str, attempt: Callable[[Any, str], T]) -> T:
    """What ``attempt`` gives for the file system and path of ``url``, some time."""
    fs, path = filesystem(url)
    for number in range(1, ATTEMPTS + 1):
        try:
            return attempt(fs, path)
        except InfoBatchError:
            raise
        except Exception as error:
            reason = _reason(error)
            if isinstance(error, OSError) and (error.filename or error.errno in _FULL):  # here, not there
                raise
            if is_lasting(reason) or number == ATTEMPTS:
                raise _failed(url, number, reason) from error
            back_off(number)
    raise AssertionError("unreachable")


def _reason(error: Exception) -> BaseException:
    """``error``, or the one that it hides: fsspec has any failure of a web server for a file that is not there."""
    cause = error.__cause__
    return cause if isinstance(error, FileNotFoundError) and cause is not None and hasattr(cause, "status") else error


def _failed(url: str, attempts: int, error: BaseException) -> DataError:
    kind: type[DataError] = SpoiledError if isinstance(error, BadBytesError) else DataError
    cause = f"{type(error).__name__}: {error}".rstrip(": ") if kind is DataError else str(error)
    advice = "Check the server and the network, then run it again"
    status = getattr(error, "status", None)
    if kind is SpoiledError:
        advice = "Upload it again, or open the dataset again if the shard was replaced on purpose"
    elif "credentials" in cause.lower():
        advice = (
            "Give them to every process (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws); for a public bucket "
            "set FSSPEC_S3_ANON=true"
        )
    elif isinstance(error, FileNotFoundError) or status in (404, 410):
        kind, advice = NotThereError, "Check the url"
    elif isinstance(error, PermissionError) or status in (401, 403):
        kind, advice = ForbiddenError, "Check the url, and what the credentials permit"
    tried = "1 attempt" if attempts == 1 else f"{attempts} attempts"
    return kind(f"{url} could not be read after {tried} ({cause}). {advice}.")


def filesystem(url: str, **more_options: Any) -> tuple[Any, str]:
    """The file system of ``url``, and the path there. Retries are ours, and a file may take as long as it does."""
    try:
        import fsspec
        from fsspec.config import conf
    except ImportError as error:
        raise MissingExtraError.of("fsspec", "remote") from error
    protocol = url.partition("://")[0]
    more = "" if "::" in url else protocol
    options: dict[str, Any] = {}
    try:
        if more in ("http", "https"):
            import aiohttp

            silence = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
            # As the bytes are there: a server may take a .tgz for a tar that is compressed on its way.
            ours = {"timeout": silence, "auto_decompress": False, "trust_env": True}
            options = {"client_kwargs": {**ours, **conf.get(protocol, {}).get("client_kwargs", {})}}
        elif more in ("s3", "s3a"):
            ours = {"connect_timeout": TIMEOUT, "read_timeout": TIMEOUT, "retries": {"max_attempts": 0}}
            # Several parts at once are held in memory, 50 MiB each.
            options = {"max_concurrency": 1, "use_listings_cache": False}
            options["config_kwargs"] = {**ours, **conf.get(protocol, {}).get("config_kwargs", {})}
        fs, path = fsspec.core.url_to_fs(url, **options, **more_options)
    except ImportError as error:
        raise MissingExtraError(
            f"{protocol}:// needs a package that is not installed ({error}). s3:// and http:// come with: "
            "pip install 'infobatch-stream[remote]'"
        ) from error
    except ValueError as error:
        raise MissingExtraError(
            f"{url} cannot be opened ({error}). s3:// and http:// come with pip install 'infobatch-stream[remote]', "
            "other protocols with packages for fsspec (gs:// with gcsfs)."
        ) from error
    if hasattr(fs, "retries") and more in ("s3", "s3a"):
        fs.retries = 1
    # fsspec has others in a child, whose loop has no thread. But it must not close those of the parent there: that
    # waits a second for that loop. Nobody closes what is referred to here.
    _filesystems[id(fs)] = fs
    return fs, path


def run_on(fs: Any, name: str, *args: Any, progress: "_Progress | None" = None, **options: Any) -> Any:
    """What method ``name`` of ``fs`` gives. Raises TimeoutError when it makes no progress (a list may take longer)."""
    if progress is not None:
        options["callback"] = progress.callback()
    future: Future[Any]
    if fs.async_impl:
        future = asyncio.run_coroutine_threadsafe(getattr(fs, f"_{name}")(*args, **options), fs.loop)
    else:
        future = Future()
        threading.Thread(target=_call, args=(future, getattr(fs, name), args, options), daemon=True).start()
    seen, since = -1, time.monotonic()
    try:
        while not wait([future], min(_TICK, TIMEOUT)).done:
            now = progress.value if progress is not None else 0
            if now != seen:
                seen, since = now, time.monotonic()
            elif name not in ("glob", "find") and time.monotonic() > since + TIMEOUT:
                raise TimeoutError(f"nothing came for {TIMEOUT:g} s")
        return future.result()
    finally:
        future.cancel()


def _call(future: "Future[Any]", function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> None:
    try:
        future.set_result(function(*args, **options))
    except BaseException as error:
        with suppress(Exception):  # nobody waits any more
            future.set_exception(error)


class _Progress:
    """Bytes that came so far, and how many the server announced."""

    def __init__(self, size: int | None, need: Callable[[int], None]) -> None:
        self.value = 0
        self.announced: int | None = None
        self._size = size
        self._need = need

    def callback(self) -> Any:
        """The progress callback for fsspec's get_file."""
        from fsspec.callbacks import Callback

        callback = Callback()
        callback.set_size = self._set_size
        callback.relative_update = self._add
        return callback

    def _set_size(self, size: int | None) -> None:
        self.announced = size  # compared at the end: it may be that of the page that says "not found"
        if size is not None and self._size is None:
            self._need(size)

    def _add(self, size: int) -> None:
        self.value += size
        if self._size is None:
            self._need(self.value)
        elif self.value > self._size:
            raise BadBytesError(f"it has more than the {self._size:,} bytes that it should have")
