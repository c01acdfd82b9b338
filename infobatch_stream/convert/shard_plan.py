"""What goes into which shard: decided before the first sample is read, and kept for when a conversion is resumed.

So any number of processes writes the same shards. A conversion can be resumed though image files changed meanwhile, as
long as their shards are still to be made. A shard keeps the samples that it was given at the beginning, without those
whose file is gone.
"""

import json
import zlib
from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.errors import ConfigError
from infobatch_stream.formats.schema import KEY, MEMBERS, Column, FileSet, KeepsColumns, SampleSet

__all__ = ["ShardPlan", "Task", "cut", "order_of"]

_FREE = {KEY, MEMBERS}  # columns that a set of samples with others can have or not
_GONE = -1  # the size of a file that was removed


@dataclass(frozen=True)
class Task:
    """Samples that are written as one shard (as several, where they turn out larger than they were taken for).

    number: 0, 1, ... over all sets. part: number of the set. first: place of the first sample in the order of the set.
    positions: int64[n], of the samples in the set, in their order. gone: of samples that are no more, a text each.
    """

    number: int
    part: int
    first: int
    positions: NDArray[np.int64]
    gone: tuple[str, ...] = ()


def order_of(count: int, seed: int | None) -> NDArray[np.int64]:
    """int64[count]: the positions in the order in which they are written; as they are without a ``seed``."""
    return np.arange(count) if seed is None else np.random.default_rng(seed).permutation(count)


def cut(sizes: NDArray[np.int64], limit: int, most: int | None = None) -> list[int]:
    """Where samples of ``sizes`` bytes, int64[n], are cut: bounds of n+1 at most, the first 0, the last n.

    A piece has as many samples as fit ``limit`` bytes, ``most`` at most, and one at least.
    """
    ends, bounds = np.cumsum(sizes), [0]
    while (start := bounds[-1]) < len(sizes):
        before = int(ends[start - 1]) if start else 0
        stop = max(int(np.searchsorted(ends, before + limit, side="right")), start + 1)
        bounds.append(stop if most is None else min(stop, start + most))
    return bounds


@dataclass(frozen=True)
class Part:
    """What is written into one folder.

    name, samples, fingerprint, classes, columns: of the sample set. bounds: see `cut`. paths, sizes: of its files (str
    and int64[samples] of bytes, -1 for one that was removed); None where a sample is no file of its own.
    """

    name: str
    samples: int
    fingerprint: str
    classes: list[str] | None
    columns: dict[str, Column]
    bounds: list[int]
    paths: bytes | None = None
    sizes: NDArray[np.int64] | None = None

    @classmethod
    def of(cls, one: SampleSet, bounds: list[int]) -> Self:
        """That of a sample set as it is now."""
        paths, sizes = one.files() if isinstance(one, FileSet) else (None, None)
        return cls(one.name, len(one), one.fingerprint, one.classes, one.columns, bounds, paths, sizes)

    def to_json(self) -> dict[str, Any]:
        """As values that JSON has."""
        packed = {} if self.paths is None else {"paths": _packed(self.paths)}
        if self.sizes is not None:
            packed["sizes"] = _packed(self.sizes.astype("<i8").tobytes())
        return {
            "name": self.name, "samples": self.samples, "fingerprint": self.fingerprint, "classes": self.classes,
            "columns": {name: [column.mds, column.wds] for name, column in self.columns.items()},
            "bounds": self.bounds, **packed,
        }  # fmt: skip

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Self:
        """What `to_json` gave. Raises KeyError, TypeError, ValueError or zlib.error for anything else."""
        part = cls(**{**stored, "columns": {name: Column(*pair) for name, pair in stored["columns"].items()}})
        if part.bounds[0] != 0 or part.bounds[-1] != part.samples or min(np.diff(part.bounds), default=1) < 1:
            raise ValueError("its bounds are none")
        if part.paths is None or part.sizes is None:
            return part
        sizes = np.frombuffer(_unpacked(part.sizes), "<i8").astype(np.int64)
        part = replace(part, paths=_unpacked(part.paths), sizes=sizes)
        if not len(part.names()) == len(sizes) == part.samples:
            raise ValueError("it lists other files than it counts")
        return part

    def names(self) -> list[bytes]:
        """The paths of its files."""
        return self.paths.split(b"\0") if self.paths else []


@dataclass(frozen=True)
class ShardPlan:
    """The parts of a conversion, and for each which sample of the source now is the one it had then: int64[samples].

    That is -1 for a file that was removed.
    """

    parts: tuple[Part, ...]
    now: tuple[NDArray[np.int64], ...]

    @classmethod
    def begin(
        cls, sets: Sequence[SampleSet], sizes: Sequence[NDArray[np.int64]], seed: int | None, room: int,
        most: int | None = None,
    ) -> Self:  # fmt: skip
        """For samples that take ``sizes`` bytes in a shard, which has ``room`` bytes, for ``most`` samples."""
        bounds = [cut(one[order_of(len(one), seed)], room, most) for one in sizes]
        parts = [Part.of(one, found) for one, found in zip(sets, bounds, strict=True)]
        return cls(tuple(parts), tuple(np.arange(len(one)) for one in sets))

    @classmethod
    def resume(cls, text: bytes, where: object, sets: Sequence[SampleSet], seed: int | None, done: int) -> Self:
        """The plan that a conversion in ``where`` began with, for the source as it is now; ``done`` tasks are done.

        The sets get the columns that they had then. Raises ConfigError for a source of which more has changed than the
        files of tasks that are not done.
        """
        try:
            parts = [Part.from_json(stored) for stored in json.loads(text)]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, zlib.error) as error:
            raise ConfigError(f"the state of the conversion in {where} is damaged ({error}); remove it.") from error
        if [one.name for one in sets] != [part.name for part in parts]:
            raise _another(where, f"its splits were {[part.name for part in parts]}")
        found = []
        for part, one in zip(parts, sets, strict=True):
            shards = min(done, len(part.bounds) - 1)
            found.append(_followed(part, one, order_of(part.samples, seed)[: part.bounds[shards]], where))
            done -= shards
            _keep_columns(part, one, where)
        return cls(tuple(part for part, _ in found), tuple(now for _, now in found))

    def to_json(self) -> str:
        """As `resume` takes it."""
        return json.dumps([part.to_json() for part in self.parts])

    def tasks(self, seed: int | None) -> list[Task]:
        """All of them, in their order."""
        tasks: list[Task] = []
        for number, (part, now) in enumerate(zip(self.parts, self.now, strict=True)):
            order = order_of(part.samples, seed)
            names = part.names() if np.any(now < 0) else []
            for first, stop in pairwise(part.bounds):
                positions = now[order[first:stop]]
                lost = [names[k].decode(errors="replace") for k in order[first:stop][positions < 0].tolist()]
                gone = tuple(f"{name} was removed after the conversion began" for name in lost)
                tasks.append(Task(len(tasks), number, first, positions[positions >= 0], gone))
        return tasks


def _followed(part: Part, one: SampleSet, done: NDArray[np.int64], where: object) -> tuple[Part, NDArray[np.int64]]:
    """``part`` brought up to date with its set now, and where its samples are there; ``done``: those in shards."""
    if (one.fingerprint, len(one), one.classes) == (part.fingerprint, part.samples, part.classes):
        return part, np.arange(len(one))
    if not isinstance(one, FileSet) or part.sizes is None:
        raise _another(where, "it was changed")
    if one.classes != part.classes:
        raise _another(where, f"its classes were {part.classes}, and are {one.classes}")
    paths, sizes = one.files()
    here = {path: number for number, path in enumerate(paths.split(b"\0"))}
    names = part.names()
    if added := here.keys() - set(names):
        raise _another(where, f"it did not have {min(added).decode(errors='replace')}")
    now = np.array([here.get(name, _GONE) for name in names], np.int64)
    present = np.where(now < 0, _GONE, sizes[now])
    if changed := [int(position) for position in done if present[position] != part.sizes[position]]:
        raise ConfigError(
            f"{names[changed[0]].decode(errors='replace')} was changed or removed since its shard in {where} was made "
            f"({len(changed):,} such files). Put it back as it was, or remove {where} to begin anew."
        )
    return replace(part, fingerprint=one.fingerprint, sizes=present), now


def _keep_columns(part: Part, one: SampleSet, where: object) -> None:
    """Have ``one`` stored as it was: what was mended since, or is passed over now, may change how it would be."""
    if list(one.columns.items()) == list(part.columns.items()):
        return
    if not isinstance(one, KeepsColumns) or one.columns.keys() - _FREE != part.columns.keys() - _FREE:
        then, now = (
            ", ".join(f"{name} ({column.mds})" for name, column in columns.items())
            for columns in (part.columns, one.columns)
        )
        raise _another(where, f"its columns were {then}, and are {now}")
    one.keep_columns(part.columns)


def _another(where: object, what: str) -> ConfigError:
    return ConfigError(
        f"the conversion in {where} was begun with another source: {what}. Resume it with the source as it was (image "
        "files that are not in a shard yet may be mended or removed), or remove it."
    )


def _packed(data: bytes) -> str:
    return b64encode(zlib.compress(data, 1)).decode()


def _unpacked(text: Any) -> bytes:
    return zlib.decompress(b64decode(text, validate=True))
