"""Samples of MDS shards that are not here yet, each downloaded by itself."""

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from infobatch_stream.errors import DataError
from infobatch_stream.formats.mds_samples import BOUNDS, bounds_at
from infobatch_stream.sources.remote.ranges import Part, pays, read_parts

if TYPE_CHECKING:
    from streaming import Stream, StreamingDataset

__all__ = ["read_samples"]


def read_samples(dataset: "StreamingDataset", indices: list[int], shards: list[int]) -> dict[int, bytes] | None:
    """The bytes of the samples ``indices`` by index, from S3. shards: that has each.

    None where whole shards come about as soon, or have to: those that are compressed, have checksums, or come from
    elsewhere. May raise anything.
    """
    places = {shard: _place(dataset, shard) for shard in set(shards)}
    urls = {shard: url for shard, (url, _) in places.items()}
    if not all(urls.values()):
        return None
    whole = sum(size for _, size in places.values())
    rows = [index - int(dataset.sample_offset_per_shard[shard]) for index, shard in zip(indices, shards, strict=True)]
    options = {"endpoint_url": url} if (url := os.environ.get("S3_ENDPOINT_URL")) else {}  # as streaming has it
    bounds: list[Part] = [(urls[shard], bounds_at(row), BOUNDS.size) for shard, row in zip(shards, rows, strict=True)]
    if not pays(bounds, whole):
        return None
    found = np.frombuffer(b"".join(read_parts(bounds, **options)), "<u4").reshape(-1, 2).tolist()
    parts: list[Part] = [(urls[shard], begin, end - begin) for shard, (begin, end) in zip(shards, found, strict=True)]
    for shard, (begin, end) in zip(shards, found, strict=True):
        if not 0 < begin < end <= places[shard][1]:
            raise DataError(f"{urls[shard]} says that a sample has the bytes {begin:,} to {end:,}.")
    if not pays(parts, whole):
        return None
    return dict(zip(indices, read_parts(parts, **options), strict=True))


def _place(dataset: "StreamingDataset", shard: int) -> tuple[str, int]:
    """Url and bytes of ``shard``; "" where it cannot be had by parts, or has a checksum, which comes first."""
    reader: Any = dataset.shards[shard]
    stream = dataset.streams[int(dataset.stream_per_shard[shard])]
    ((raw, packed),) = reader.file_pairs
    is_s3 = str(stream.remote or "").startswith("s3://")
    if packed is not None or stream.validate_hash or not is_s3 or not _is_streamings(stream):
        return "", 0
    return os.path.join(str(stream.remote), stream.split, raw.basename), int(raw.bytes)  # noqa: PTH118 - a url


def _is_streamings(stream: "Stream") -> bool:
    """Whether it downloads as streaming does, so that what fsspec has by the same url is the same."""
    from streaming.base.storage.download import CloudDownloader, S3Downloader

    return type(stream._downloader) is S3Downloader is type(CloudDownloader.get(stream.remote))
