"""Samples that are equal, found by digests: 16 bytes of memory for each, and little more."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["CONTENT_BYTES", "KEY_BYTES", "Duplicates", "digest", "find_duplicates", "key_digest"]

CONTENT_BYTES, KEY_BYTES = 16, 8
_PARTS = 16  # looked at one after the other, so that sorting takes a fraction of the memory of the digests


def digest(values: Iterable[tuple[int, Iterable[bytes]]]) -> bytes:
    """16 bytes for the values of a sample, each of a length and in blocks, in an order that no format changes."""
    found = hashlib.blake2b(digest_size=CONTENT_BYTES)
    for length, blocks in values:
        found.update(length.to_bytes(8, "little"))
        for block in blocks:
            found.update(block)
    return found.digest()


def key_digest(key: bytes) -> bytes:
    """8 bytes for the key of a sample."""
    return hashlib.blake2b(key, digest_size=KEY_BYTES).digest()


@dataclass(frozen=True)
class Duplicates:
    """Groups of equal samples: how many, how many samples are in them beyond the first of each, and the first groups.

    first: for each such group the number of its samples, and the places (shard, row) of the first of them.
    """

    groups: int
    copies: int
    first: tuple[tuple[int, tuple[tuple[int, int], ...]], ...]


def find_duplicates(digests: Sequence[bytes], width: int, most: int) -> Duplicates:
    """The samples with equal digests, of ``width`` bytes (a multiple of 8), one behind the other for each shard.

    The groups whose first samples come first are listed, ``most`` of them, and of each ``most`` places.
    """
    shards = [np.frombuffer(shard, "<u8").reshape(-1, width // 8) for shard in digests]
    begins = np.cumsum([0, *map(len, shards)])
    groups = copies = 0
    listed: list[NDArray[np.int64]] = []
    for part in range(_PARTS):
        chosen = [np.flatnonzero(shard[:, 0] % _PARTS == part) for shard in shards]
        if not sum(map(len, chosen)):
            continue
        places = np.concatenate([rows + begin for rows, begin in zip(chosen, begins[:-1], strict=True)])
        values = np.concatenate([shard[rows] for shard, rows in zip(shards, chosen, strict=True)])
        order = np.lexsort(values.T)  # equal ones stay in order
        values, places = values[order], places[order]
        new = np.r_[True, (values[1:] != values[:-1]).any(1), True]
        bounds = np.flatnonzero(new)
        several = np.flatnonzero(np.diff(bounds) > 1)
        groups += len(several)
        copies += int((np.diff(bounds)[several] - 1).sum())
        early = several[np.argsort(places[bounds[several]])][:most]
        listed += [places[bounds[group] : bounds[group + 1]] for group in early]
        listed = sorted(listed, key=lambda found: int(found[0]))[:most]
    return Duplicates(groups, copies, tuple((len(found), _places(found[:most], begins)) for found in listed))


def _places(found: NDArray[np.int64], begins: NDArray[np.int64]) -> tuple[tuple[int, int], ...]:
    shards = np.searchsorted(begins, found, "right") - 1
    return tuple(zip(shards.tolist(), (found - begins[shards]).tolist(), strict=True))
