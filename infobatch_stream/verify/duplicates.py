"""Equal samples, found by digests. Memory is 16 bytes per sample, 8 for its label, and little more."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "CONTENT_BYTES",
    "KEY_BYTES",
    "Duplicates",
    "Groups",
    "digest",
    "find_duplicates",
    "key_digest",
    "label_code",
    "label_of",
]

CONTENT_BYTES, KEY_BYTES = 16, 8
_WORD = 1 << 63  # codes below are labels that are whole numbers, codes from here on digests of texts
_NONE = (1 << 64) - 1
_NUMBER = re.compile(rb"0|[1-9]\d{0,17}")
_PARTS = 16  # digests are sorted in so many parts, since sorting all at once would need their memory again


def digest(values: Iterable[tuple[int, Iterable[bytes]]]) -> bytes:
    """16 bytes for the values of a sample, each given as length and blocks, in the same order for all formats."""
    found = hashlib.blake2b(digest_size=CONTENT_BYTES)
    for length, blocks in values:
        found.update(length.to_bytes(8, "little"))
        for block in blocks:
            found.update(block)
    return found.digest()


def key_digest(key: bytes) -> bytes:
    """8 bytes for the key of a sample."""
    return hashlib.blake2b(key, digest_size=KEY_BYTES).digest()


def label_code(label: bytes | None) -> bytes:
    """8 bytes for the label of a sample; None stands for a sample without a label."""
    text = (label or b"").strip()
    if label is None:
        code = _NONE
    elif _NUMBER.fullmatch(text):
        code = int(text)
    else:
        code = min(int.from_bytes(key_digest(text), "little") | _WORD, _NONE - 1)
    return code.to_bytes(8, "little")


def label_of(codes: bytes, row: int) -> int | None:
    """The label of a sample by the concatenated ``codes``, if it is a whole number."""
    code = int.from_bytes(codes[8 * row : 8 * row + 8], "little")
    return code if code < _WORD else None


Groups = tuple[tuple[int, tuple[tuple[int, int], ...]], ...]
"""For each group of equal samples, how many they are, and the places (shard, row) of the first of them."""


@dataclass(frozen=True)
class Duplicates:
    """Groups of equal samples.

    groups: number of groups. copies: samples in them that are not the first of their group. first: the first groups.
    conflicts: number of groups with different labels. conflicting: the first of those; they are not in ``first``.
    """

    groups: int
    copies: int
    first: Groups
    conflicts: int = 0
    conflicting: Groups = ()


def find_duplicates(
    digests: Sequence[bytes], width: int, most: int, labels: Sequence[bytes] | None = None
) -> Duplicates:
    """Find the samples with equal digests.

    digests: per shard, the digests of its samples, concatenated. width: bytes of a digest, a multiple of 8.
    most: at most so many groups are listed, by the order of their first samples, and so many places of each.
    labels: per shard, the `label_code` of its samples, concatenated.
    """
    shards = [np.frombuffer(shard, "<u8").reshape(-1, width // 8) for shard in digests]
    codes = [np.frombuffer(shard, "<u8") for shard in labels or ()]
    begins = np.cumsum([0, *map(len, shards)])
    groups = copies = conflicts = 0
    listed: list[NDArray[np.int64]] = []
    conflicting: list[NDArray[np.int64]] = []
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
        if codes:
            its = np.concatenate([shard[rows] for shard, rows in zip(codes, chosen, strict=True)])[order]
            differ = several[_differ(its, bounds)[several]]
            conflicts += len(differ)
            conflicting = _earliest(conflicting, differ, places, bounds, most)
            several = np.setdiff1d(several, differ, assume_unique=True)
        listed = _earliest(listed, several, places, bounds, most)
    texts = [tuple((len(found), _places(found[:most], begins)) for found in some) for some in (listed, conflicting)]
    return Duplicates(groups, copies, texts[0], conflicts, texts[1])


def _differ(labels: NDArray[np.uint64], bounds: NDArray[np.int64]) -> NDArray[np.bool_]:
    """bool[groups]: whether a group, which lies between two ``bounds``, has different labels."""
    highest = np.maximum.reduceat(np.where(labels == _NONE, np.uint64(0), labels), bounds[:-1])
    lowest = np.minimum.reduceat(labels, bounds[:-1])
    return np.logical_and(highest > lowest, lowest != _NONE)


def _earliest(
    listed: list[NDArray[np.int64]], groups: NDArray[np.int64], places: NDArray[np.int64], bounds: NDArray[np.int64],
    most: int,
) -> list[NDArray[np.int64]]:  # fmt: skip
    """The ``most`` groups that begin first, of those in ``listed`` and the new ones."""
    early = groups[np.argsort(places[bounds[groups]])][:most]
    listed = listed + [places[bounds[group] : bounds[group + 1]] for group in early]
    return sorted(listed, key=lambda found: int(found[0]))[:most]


def _places(found: NDArray[np.int64], begins: NDArray[np.int64]) -> tuple[tuple[int, int], ...]:
    shards = np.searchsorted(begins, found, "right") - 1
    return tuple(zip(shards.tolist(), (found - begins[shards]).tolist(), strict=True))
