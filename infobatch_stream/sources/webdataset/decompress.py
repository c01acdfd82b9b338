"""Compressed tars, and the output of commands, written to a temporary file as plain tars."""

import bz2
import gzip
import io
import lzma
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, cast

from infobatch_stream.errors import DataError, MissingExtraError
from infobatch_stream.formats.tar_grouping import compression_of

__all__ = ["BadStreamError", "command_output", "decompress"]

_BLOCK = 2**20


class BadStreamError(DataError):
    """Bytes that cannot be decompressed, or end too early."""


def decompress(file: BinaryIO, url: str, part: Path, need: Callable[[int], None]) -> None:
    """Write what is left of ``file``, decompressed, to ``part``; call ``need`` with its size before it grows to that.

    The compression (gzip, bzip2, xz, zstd, none) is recognised by the first bytes. Raises BadStreamError, which names
    ``url``.
    """
    size = 0
    with part.open("wb") as out:
        start = file.read(8)
        kind = compression_of(start)
        again = io.BufferedReader(_Again(start, file), _BLOCK)
        plain: Any = _OPEN[kind](again) if kind else again
        while block := _read(plain, url, kind or "the stream"):
            size += len(block)
            need(size)
            out.write(block)


def _read(plain: Any, url: str, kind: str) -> bytes:
    try:
        return cast(bytes, plain.read(_BLOCK))
    except Exception as error:  # each library has errors of its own
        raise BadStreamError(
            f"{url} cannot be read to its end ({kind}: {str(error) or type(error).__name__}). It is damaged, or was "
            "cut off: write it again."
        ) from error


@contextmanager
def command_output(url: str, folder: Path) -> Iterator[BinaryIO]:
    """The output of the command behind ``pipe:``, run in ``folder`` by webdataset's gopen.

    Raises DataError if the command fails.
    """
    from webdataset.gopen import gopen

    try:
        pipe = gopen(f"pipe:cd {shlex.quote(str(folder))} || exit\n{url.removeprefix('pipe:')}")
    except ValueError as error:  # WDS_SECURE
        raise DataError(f"{url!r} is not run: webdataset refuses commands ({error}).") from error
    try:
        yield pipe.stream
    except BaseException:
        pipe.ignore_errors = True  # it ends since nobody reads on
        pipe.close()
        raise
    try:
        pipe.close()
    except OSError as error:
        raise DataError(
            f"The command of {url!r} failed (exit status {pipe.status}), so what it gave is not used. Run it in a "
            "shell to see why."
        ) from error


class _Again(io.RawIOBase):
    """``start``, and then what is left of ``file``: one cannot go back in a pipe."""

    def __init__(self, start: bytes, file: BinaryIO) -> None:
        self._start = start
        self._file = file

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """The next bytes, as `io.RawIOBase` has it."""
        data = self._start[: len(buffer)] or self._file.read(len(buffer))
        self._start = self._start[len(data) :]
        buffer[: len(data)] = data
        return len(data)


def _zstd(file: BinaryIO) -> Any:
    # Not zstandard, whose reader takes a file that is cut off for a whole one.
    for name in ("compression.zstd", "backports.zstd", "pyarrow"):  # the first comes with Python 3.14
        try:
            module = import_module(name)
        except ImportError:
            continue
        if name == "pyarrow":
            return module.CompressedInputStream(module.PythonFile(file, "r"), "zstd")
        return module.ZstdFile(file)
    raise MissingExtraError(
        "A tar that is compressed by zstd needs pyarrow or backports.zstd: pip install backports.zstd. Or have the "
        "program zstd do it: 'pipe:zstd -dc shard.tar.zst'."
    )


_OPEN: dict[str, Callable[[BinaryIO], Any]] = {
    "gzip": lambda file: gzip.GzipFile(fileobj=file, mode="rb"),
    "bzip2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
    "zstd": _zstd,
}
