"""The members of the samples of tars: which ones some samples lack, and where dots in names mix samples up."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.formats.extensions import is_image, split_prefix
from infobatch_stream.formats.tar_index import TarIndex

__all__ = ["Difference", "Members", "differences"]

_IMAGE = "an image"
_SHOWN = 4  # extensions of a sample that are listed
_MOST = 1000  # kinds of members of a tar that are counted; there are only more where keys have dots


@dataclass(frozen=True)
class MemberKind:
    """A kind of member, e.g. ``cls``; images with the same prefix are one kind.

    count: samples that have it. lacking: the first row that lacks it; the number of samples if none does.
    extensions: the extensions of its members.
    """

    count: int
    lacking: int
    extensions: frozenset[str]


@dataclass(frozen=True)
class DottedMembers:
    """Samples whose members have extensions like "a.jpg" and "b.jpg", which few have: how many, and the first."""

    count: int
    row: int
    extensions: tuple[str, ...]


@dataclass(frozen=True)
class Members:
    """The members of the samples of a tar. held: by kind. counts: number of samples by extension."""

    samples: int = 0
    held: Mapping[str, MemberKind] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    dotted: DottedMembers | None = None

    @classmethod
    def of(cls, index: TarIndex, columns: Mapping[str, Sequence[str]]) -> "Members":
        """The members in ``index``. columns: the extensions of each column, where they are known."""
        samples = len(index)
        rows = np.repeat(np.arange(samples), np.diff(index.sample_bounds))
        order = np.argsort(index.extension, kind="stable")
        ends = np.cumsum(np.bincount(index.extension, minlength=len(index.extensions)))
        parts = np.split(rows[order], ends[:-1]) if len(ends) else []
        found = dict(zip(index.extensions, parts, strict=True))
        counts = {name: len(part) for name, part in found.items()}
        kinds: dict[str, list[str]] = {}
        owners = {extension: _kind(extensions[0]) for extensions in columns.values() for extension in extensions}
        for name in sorted(counts, key=lambda name: -counts[name])[:_MOST]:
            kinds.setdefault(owners.get(name, _kind(name)), []).append(name)
        held = {}
        for kind, names in kinds.items():
            having = found[names[0]] if len(names) == 1 else np.unique(np.concatenate([found[name] for name in names]))
            gaps = np.flatnonzero(having != np.arange(len(having)))
            held[kind] = MemberKind(len(having), int(gaps[0]) if gaps.size else len(having), frozenset(names))
        common = dict(sorted(counts.items(), key=lambda one: -one[1])[:_MOST])
        unowned = {name: rows for name, rows in found.items() if name not in owners}
        return cls(samples, held, common, _dotted(samples, unowned))


class Difference(NamedTuple):
    """A sample, by its tar (the place in the set) and row, with other members than most; likely: probably a mistake."""

    what: str
    tar: int
    row: int
    likely: bool


def differences(tars: Sequence[Members], asked: Iterable[str]) -> Iterator[Difference]:
    """What samples of the tars of one set lack that most have, and the first whose names have unusual dots.

    asked: extensions whose absence is reported elsewhere.
    """
    total = sum(tar.samples for tar in tars)
    kinds: dict[str, list[tuple[int, MemberKind]]] = {}
    for place, tar in enumerate(tars):
        for kind, held in tar.held.items():
            kinds.setdefault(kind, []).append((place, held))
    for having in kinds.values():
        names = sorted(frozenset().union(*(held.extensions for _, held in having)))
        lacking = total - sum(held.count for _, held in having)
        if not 0 < lacking < total - lacking or not set(names).isdisjoint(asked):
            continue
        known = dict(having)
        place = next(p for p, tar in enumerate(tars) if tar.samples > (known[p].count if p in known else 0))
        what = f"{lacking:,} of {total:,} samples ha{'s' if lacking == 1 else 've'} no"
        text = f"{what} {' or '.join(map(repr, names))}, which the others have"
        yield Difference(text, place, known[place].lacking if place in known else 0, likely=True)
    dotted = [(place, tar.dotted) for place, tar in enumerate(tars) if tar.dotted is not None]
    for place, one in dotted:
        common = [sum(tar.counts.get(name, 0) for tar in tars) for name in one.extensions]
        if total > 1 and min(common) > total / 2:
            continue  # in a short last tar they only look rare
        shown = ", ".join(map(repr, one.extensions[:_SHOWN])) + (" ..." if len(one.extensions) > _SHOWN else "")
        count = sum(one.count for _, one in dotted)
        text = (
            f"it has members that few others have: {shown} (so have {count:,} samples in all). A key ends at the first "
            "dot of a name: if what follows belongs to it, write the tar again with other names"
        )
        yield Difference(text, place, one.row, likely=False)
        return


def _kind(extension: str) -> str:
    return split_prefix(extension)[0] + _IMAGE if is_image(extension) else extension


def _dotted(samples: int, found: Mapping[str, NDArray[np.int64]]) -> DottedMembers | None:
    """Samples with several members whose extensions end alike and have a rare part before that, as "a.jpg", "b.jpg".

    Where most samples have such a member, one is enough.
    """
    rare = [name for name, rows in found.items() if "." in name and (2 * len(rows) < samples or samples == 1)]
    if not rare:
        return None
    lasts = {name: split_prefix(name)[1] for name in rare}
    codes = {last: code for code, last in enumerate(dict.fromkeys(lasts.values()))}
    rows = np.concatenate([found[name] for name in rare])
    kinds = np.concatenate([np.full(len(found[name]), codes[lasts[name]]) for name in rare])
    pairs, counts = np.unique(rows * len(codes) + kinds, return_counts=True)
    several = pairs[counts >= (3 if samples == 1 else 2)]
    if not several.size and 2 * len(np.unique(rows)) > samples > 2:
        several = pairs
    if not several.size:
        return None
    row, kind = divmod(int(several[0]), len(codes))
    its = tuple(name for name in rare if codes[lasts[name]] == kind and row in found[name])
    return DottedMembers(len(np.unique(several // len(codes))), row, its)
