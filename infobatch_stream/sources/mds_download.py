"""The downloader of a stream, for one process: streaming's own, without what it shares and draws in secret."""

from random import Random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streaming import Stream

__all__ = ["downloader_of"]


def downloader_of(stream: "Stream") -> Any:
    """A downloader as that of ``stream``, with connections of its own.

    Processes that were forked from one that has connected would send and receive on the same connection.
    """
    from streaming.base.storage.download import CloudDownloader, S3Downloader

    usual, given = CloudDownloader.get(stream.remote), stream._downloader
    if type(usual) is not type(given):  # one of the user's
        return given
    return _s3() if type(usual) is S3Downloader else usual


def _s3() -> Any:
    import s3transfer.utils  # type: ignore[import-untyped]
    from streaming.base.storage.download import S3Downloader

    # It names unfinished files by the global generator, from which the augmentation of a batch may draw meanwhile.
    s3transfer.utils.random = Random()  # noqa: S311 - a name

    class Single(S3Downloader):
        """Each request once: botocore's pauses are drawn in the same way, and to try again is up to us."""

        def _create_s3_client(self, *args: Any, **kwargs: Any) -> Any:
            created = super()._create_s3_client(*args, **kwargs)
            if self._s3_client is not None:
                self._s3_client.meta.events.unregister("needs-retry.s3", unique_id="retry-config-s3")
            return created

    return Single()  # type: ignore[no-untyped-call]
