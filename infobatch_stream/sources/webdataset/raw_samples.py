"""Samples of a tar as webdataset yields them before any stage, read where the index says that they lie."""

from collections.abc import Callable
from mmap import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.formats.tar_headers import HEADER, LENGTH_AT, LENGTH_DIGITS
from infobatch_stream.formats.tar_index import TarIndex
from infobatch_stream.sources.shard_file import ShardFile

__all__ = ["Copy", "are_small", "block_of", "complete", "raw_sample", "sample_in", "small_samples", "span_of"]

_BLOCK = 2**14  # bytes: a sample that is no longer is read at once; of a longer one each member, which is not copied
_LENGTH = slice(LENGTH_AT, LENGTH_AT + LENGTH_DIGITS)

_Check = Callable[[bytes, int], None]
"""Takes a header that says another length than the index, and that length; raises if the index is wrong."""

Copy = tuple[dict[str, Any], str, mmap, slice]
"""A sample, a field of it, and where its value lies."""


def raw_sample(
    index: TarIndex, row: int, url: str, file: ShardFile, check: _Check, later: list[Copy] | None = None
) -> dict[str, Any]:
    """Sample ``row`` of the shard at ``url``, which is ``file``.

    later: takes what is left to copy into the sample, if given.
    """
    members = index.members(row)
    if not members:
        return {"__key__": index.key(row), "__url__": url}
    start, size = block_of(members)
    block = file.read(start, size) if size <= _BLOCK else None
    return _sample(index.key(row), url, file.path, members, start, block or file, check, later)


def complete(later: list[Copy]) -> None:
    """Copy what `raw_sample` left for later.

    Large values are best copied one after the other: each pushes out of the processor's cache what Python needs to find
    the next.
    """
    for sample, extension, source, place in later:
        sample[extension] = source[place]


def sample_in(block: bytes, index: TarIndex, row: int, url: str, path: str, check: _Check) -> dict[str, Any]:
    """As `raw_sample`, of the bytes that `block_of` says. path: where the shard will lie."""
    members = index.members(row)
    return _sample(index.key(row), url, path, members, block_of(members)[0], block, check)


def are_small(index: TarIndex, rows: NDArray[np.int64]) -> bool:
    """Whether each of ``rows`` has members, and is no longer than `_BLOCK`."""
    shortest, longest = index.extremes
    if shortest > 0 and longest + HEADER <= _BLOCK:
        return True
    if shortest + HEADER > _BLOCK:
        return False
    sizes = index.spans(rows)
    return bool(sizes.min() > 0 and sizes.max() + HEADER <= _BLOCK)


def small_samples(
    index: TarIndex, rows: NDArray[np.int64], url: str, file: ShardFile, check: _Check
) -> list[dict[str, Any]]:
    """As `raw_sample` gives each of ``rows``, which `are_small`, in a third of its time."""
    first, end = index.sample_bounds[rows], index.sample_bounds[rows + 1]
    starts = index.offset[first] - HEADER
    sizes = index.offset[end - 1] + index.length[end - 1] - starts
    places = starts.tolist()
    blocks = file.read_each(places, sizes.tolist())
    keys = index.keys(rows)
    if (end - first == 1).all():  # as below, in half the time
        names, path, samples = index.extensions, file.path, []
        codes, lengths = index.extension[first].tolist(), index.length[first].tolist()
        for key, block, code, length in zip(keys, blocks, codes, lengths, strict=True):
            if block[_LENGTH] != b"%011o" % length:
                check(block[:HEADER], length)
            samples.append({"__key__": key, "__url__": url, names[code]: block[HEADER:], "__local_path__": path})
        return samples
    return [
        _sample(key, url, file.path, index.members(row), start, block, check)
        for key, row, start, block in zip(keys, rows.tolist(), places, blocks, strict=True)
    ]


def span_of(members: list[tuple[str, int, int]]) -> tuple[int, int]:
    """Where the members of a sample begin, and how many bytes there are to the end of the last."""
    start, (_, last, length) = members[0][1], members[-1]
    return start, last + length - start


def block_of(members: list[tuple[str, int, int]]) -> tuple[int, int]:
    """As `span_of`, from the header of the first member on."""
    start, size = span_of(members)
    return start - HEADER, size + HEADER


def _sample(
    key: str,
    url: str,
    path: str,
    members: list[tuple[str, int, int]],
    start: int,
    block: bytes | ShardFile,
    check: _Check,
    later: list[Copy] | None = None,
) -> dict[str, Any]:
    """A sample whose ``members`` lie in ``block``: the bytes from ``start`` on, or the whole file."""
    sample: dict[str, Any] = {"__key__": key, "__url__": url}
    for extension, offset, length in members:
        before = offset - HEADER
        # With its header, whose page is read anyway.
        source, at = (block, before - start) if isinstance(block, bytes) else block.view(before, HEADER + length)
        if source[at + LENGTH_AT : at + LENGTH_AT + LENGTH_DIGITS] != b"%011o" % length:
            check(source[at : at + HEADER], length)
        place = slice(at + HEADER, at + HEADER + length)
        if later is None or isinstance(source, bytes):
            sample[extension] = source[place]
        else:
            sample[extension] = b""  # fields keep their order
            later.append((sample, extension, source, place))
        sample["__local_path__"] = path  # webdataset has it behind the first field
    return sample
