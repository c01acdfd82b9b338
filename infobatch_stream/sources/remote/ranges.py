"""Parts of remote files, many at once: for the first batches, while whole shards are still on their way."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from infobatch_stream.errors import DataError
from infobatch_stream.sources.remote.download import filesystem, run_on

__all__ = ["Held", "Part", "pays", "read_parts"]

Part = tuple[str, int, int]
"""Url, first byte and number of bytes."""

_AT_ONCE = 64  # requests
_LEAST = 2**24  # bytes of shards that nobody needs to wait for long
_SHARE = 4  # of the bytes of shards at most, which are as well downloaded whole


def pays(parts: Sequence[Part], shards: int) -> bool:
    """Whether ``parts`` come much sooner than their shards, which have so many bytes together."""
    return bool(parts) and shards >= _LEAST and _SHARE * sum(size for _, _, size in parts) <= shards


def read_parts(parts: Sequence[Part], **options: Any) -> list[bytes]:
    """The bytes of each of ``parts``, of one protocol. options: for the file system.

    Nothing is tried twice: whoever cannot have a part can have its shard. Raises DataError, and whatever fsspec does.
    """
    filesystem(parts[0][0], **options)  # the first one that fsspec makes in a forked process is not found there again
    places = {url: filesystem(url, **options) for url in dict.fromkeys(url for url, _, _ in parts)}
    paths = {url: path for url, (_, path) in places.items()}
    fs, *others = {id(fs): fs for fs, _ in places.values()}.values()
    if others or not fs.async_impl:
        raise DataError("The shards are of several servers, or of one that fsspec asks for one part after the other.")
    # The first one alone: a server may know no ranges, and send the whole file each time.
    return [*_read(fs, paths, parts[:1]), *_read(fs, paths, parts[1:])]


def _read(fs: Any, paths: dict[str, str], parts: Sequence[Part]) -> list[bytes]:
    if not parts:
        return []
    places = [paths[url] for url, _, _ in parts], [start for _, start, _ in parts], [a + n for _, a, n in parts]
    found: list[bytes] = run_on(fs, "cat_ranges", *places, on_error="raise", batch_size=_AT_ONCE)
    for (url, _, size), data in zip(parts, found, strict=True):
        if len(data) != size:
            raise DataError(f"{url} sent {len(data):,} bytes for a part of {size:,}.")
    return found


class Held(threading.local):
    """Samples whose shards are still to come, of the batch that a thread makes.

    Attributes:
        samples: By number.
    """

    def __init__(self) -> None:
        self.samples: dict[int, Any] = {}

    @contextmanager
    def holding(self, samples: dict[int, Any]) -> Iterator[None]:
        """Within, these."""
        before, self.samples = self.samples, samples
        try:
            yield
        finally:
            self.samples = before
