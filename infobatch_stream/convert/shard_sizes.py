"""What samples take in a shard, before it is written; and whether one is larger than a shard."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.convert.worker import Job, add, read
from infobatch_stream.convert.writers import TooLargeError, stored_sizes
from infobatch_stream.errors import DataError
from infobatch_stream.formats.schema import Encoded, Sample, SampleSet

__all__ = ["check_largest", "sizes_in_shards"]

_TRIED = 64  # images that are encoded again, to learn by how much they shrink
_LARGEST = 16  # samples that are tried, where some may be larger than a shard


def sizes_in_shards(job: Job, source: SampleSet) -> NDArray[np.int64]:
    """int64[n]: what each sample takes in a shard; of images that are encoded again, as some of them say."""
    payload, reencoder = source.sizes(), job.reencoder
    if reencoder is not None and (reencoder.resize, reencoder.quality) != (None, None):
        before = after = 1
        for position in np.unique(np.linspace(0, len(source) - 1, _TRIED, dtype=np.int64)).tolist():
            try:
                sample = source[position]
                after += _payload(reencoder(sample, source.columns))
            except (DataError, OSError):
                continue  # raised where it is converted
            before += _payload(sample)
        payload = np.ceil(payload * (after / before)).astype(np.int64)
    return stored_sizes(job.target.format, payload, len(source.columns))


def check_largest(job: Job, sizes: Sequence[NDArray[np.int64]], room: int) -> None:
    """Raise TooLargeError if a sample is larger than a shard, unless those are passed over: before anything is written.

    ``sizes`` are not exact, so the largest are put to the test.
    """
    for one, stored in zip(job.sets, () if job.skip else sizes, strict=False):
        large = np.flatnonzero(stored > room)
        if not large.size:
            continue
        with (
            tempfile.TemporaryDirectory(prefix="infobatch-convert-") as folder,
            job.target.writer(Path(folder), one.columns) as writer,
        ):
            for position in large[np.argsort(-stored[large], kind="stable")][:_LARGEST].tolist():
                sample, place = read(job, one, position)
                try:
                    if not isinstance(sample, DataError):
                        add(writer, one.columns, sample, place)
                except TooLargeError as error:
                    error.add_note("Nothing is written. To leave out what is too large: --on-error skip.")
                    raise
                except DataError:
                    continue  # raised where it is converted


def _payload(sample: Sample) -> int:
    return sum(len(value.data) if isinstance(value, Encoded) else 8 for value in sample.values())
