"""Samples of tars that are not here yet, each downloaded by itself."""

from collections.abc import Sequence
from typing import Any

from infobatch_stream.errors import DataError
from infobatch_stream.formats.tar_headers import length_in
from infobatch_stream.formats.tar_index import TarIndex
from infobatch_stream.sources.remote.ranges import Part, pays, read_parts
from infobatch_stream.sources.webdataset.cached_tar import CachedTar
from infobatch_stream.sources.webdataset.raw_samples import block_of, sample_in

__all__ = ["Wanted", "read_samples"]

Wanted = tuple[int, CachedTar, TarIndex, int]
"""Number of a sample, its tar, the index of that, and the sample's row there."""


def read_samples(wanted: Sequence[Wanted]) -> dict[int, dict[str, Any]] | None:
    """The samples by number, as webdataset yields them before any stage.

    None where whole shards come about as soon, or have to: those with a checksum, which is compared first. May raise
    anything.
    """
    parts: list[Part] = []
    for _, tar, index, row in wanted:
        members = index.members(row)
        if index.checksum is not None or not members:
            return None
        parts.append((tar.url, *block_of(members)))
    if not pays(parts, sum({tar.url: index.stamp[0] for _, tar, index, _ in wanted}.values())):
        return None
    return {
        number: sample_in(block, index, row, tar.url, tar.place, _check)
        for (number, tar, index, row), block in zip(wanted, read_parts(parts), strict=True)
    }


def _check(header: bytes, length: int) -> None:
    if length_in(header) != length:
        raise DataError("A member does not lie where the index says.")  # its shard will say more
