"""Downloads of a StreamingDataset, for one process: streaming's own, without what it shares and draws in secret."""

import os
from copy import copy
from functools import cache
from typing import TYPE_CHECKING, Any

from infobatch_stream._process_wide import name_files_by_own_draws
from infobatch_stream.sources.mds.remote_index import is_url
from infobatch_stream.sources.per_process import PerProcess

if TYPE_CHECKING:
    from streaming import Stream, StreamingDataset

__all__ = ["Attempts"]


class Attempts(PerProcess):
    """Single attempts to download shards of ``dataset``, each process with connections of its own."""

    _own = "_process", "_downloaders", "_delivered"

    def __init__(self, dataset: "StreamingDataset") -> None:
        self._dataset = dataset
        self._renew()

    def _renew(self) -> None:
        self._process = os.getpid()
        self._downloaders: dict[int, Any] = {}
        self._delivered: set[int] = set()

    def single(self, stream: int) -> Any:
        """The dataset as it is, but that its ``stream`` tries to download once only: to try again is up to the caller.

        Until its server has delivered something to this process, no shard is removed to make room: it might be gone.
        """
        if self._process != os.getpid():  # forked
            self._renew()
        dataset = self._dataset
        single = object.__new__(_without_end(type(dataset)))
        vars(single).update({name: value for name, value in vars(dataset).items() if name != "_cache_filelock"})
        single.streams = list(dataset.streams)
        single.streams[stream] = copy(dataset.streams[stream])
        single.streams[stream].download_retry = 1  # attempts, though streaming calls them retries
        if stream not in self._downloaders:
            self._downloaders[stream] = _downloader_of(dataset.streams[stream])
        single.streams[stream]._downloader = self._downloaders[stream]
        if stream not in self._delivered and is_url(str(dataset.streams[stream].remote or "")):
            single.cache_limit = None
        return single

    def delivered(self, stream: int) -> None:
        """Note that something came from the remote of ``stream``."""
        self._delivered.add(stream)


def _downloader_of(stream: "Stream") -> Any:
    """A downloader as that of ``stream``, with connections of its own.

    Processes that were forked from one that has connected would send and receive on the same connection.
    """
    from streaming.base.storage.download import CloudDownloader, S3Downloader

    usual, given = CloudDownloader.get(stream.remote), stream._downloader
    if type(usual) is not type(given):  # one of the user's
        return given
    return _s3() if type(usual) is S3Downloader else usual


def _s3() -> Any:
    from streaming.base.storage.download import S3Downloader

    name_files_by_own_draws()

    class Single(S3Downloader):
        """Each request once: botocore's pauses are drawn in the same way, and to try again is up to us."""

        def _create_s3_client(self, *args: Any, **kwargs: Any) -> Any:
            created = super()._create_s3_client(*args, **kwargs)
            if self._s3_client is not None:
                self._s3_client.meta.events.unregister("needs-retry.s3", unique_id="retry-config-s3")
            return created

    return Single()  # type: ignore[no-untyped-call]


@cache
def _without_end(kind: type[Any]) -> type[Any]:
    """``kind``, of which an object ends without ado: the destructor of a copy would close what the first one has."""
    return type(kind.__name__, (kind,), {"__del__": lambda self: None})
