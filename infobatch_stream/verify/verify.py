"""The check of a set of shards, MDS or tars: what is wrong, and where."""

import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from infobatch_stream._pool import ordered_map
from infobatch_stream._urls import is_remote, local_path
from infobatch_stream.errors import DataError
from infobatch_stream.formats.shard_list import holds_mds
from infobatch_stream.sources.urls import expand_shards
from infobatch_stream.verify.diagnostics import LISTED, Checked, Checks, Diagnostics, Problem, Severity
from infobatch_stream.verify.duplicates import CONTENT_BYTES, KEY_BYTES, Groups, find_duplicates, label_of
from infobatch_stream.verify.mds import MdsShard, read_mds_index
from infobatch_stream.verify.sidecars import check_gaps, check_unlisted, count_classes
from infobatch_stream.verify.tar_sets import TarSet, open_tars

__all__ = ["Report", "Shard", "Progress", "verify"]

_PRELOAD = ("webdataset.tariterators", "PIL.Image")
_PLACES = 5  # equal samples that are listed
_WILD = re.compile(r"[*?[]")

Progress = Callable[[int, int], None]
"""Progress callback, called after each shard with the number of all shards, and the bytes of this one."""


class Shard(Protocol):
    """A shard that can be checked in any process."""

    @property
    def name(self) -> str:
        """What to call it."""

    def check(self, checks: Checks) -> Checked:
        """Everything that can be wrong with it."""

    def key(self, row: int) -> str | None:
        """The key of a sample, where samples have keys."""


@dataclass(frozen=True)
class Report:
    """What `verify` found.

    Attributes:
        shards: Number of shards.
        samples: Number of samples in them.
        size: Bytes of their files.
        errors: Number of errors, including those that are not listed in ``problems``.
        warnings: Number of warnings, likewise.
        notes: Number of notes, likewise.
        problems: Errors first, then warnings, then notes, each in the order of the shards. Of each severity at most 10
            per file are listed.
    """

    shards: int
    samples: int
    size: int
    errors: int
    warnings: int
    notes: int
    problems: tuple[Problem, ...]


def verify(
    shards: Iterable[str | os.PathLike[str]],
    *,
    columns: Sequence[str] = (),
    duplicates: bool = False,
    decode: bool = False,
    workers: int = 1,
    on_progress: Progress = lambda total, size: None,
) -> Report:
    """Check local shards, and report everything that is wrong with them. Nothing is written.

    Each worker needs memory for a few blocks and its largest sample, or for the whole of a shard that is compressed by
    zstd or snappy. The report needs 8 bytes per sample, with ``duplicates`` 32.

    Args:
        shards: Folders with an index.json (MDS), folders of tars, tars, and names with braces or globs.
        columns: Columns that each sample must have. Of tars: columns in columns.json, or extensions of members, as
            ``jpg;png`` for one of several.
        duplicates: Look for samples with the same content, first for those with different labels. Images are compared
            by the main image, other samples by all fields but key, ``name`` and label; with ``columns``, by these.
        decode: Decode images, arrays, JSON and numbers. Pickled values are never loaded.
        workers: Number of processes. The report does not depend on it.
        on_progress: Called after each shard with the number of all shards, and the bytes of this one.

    Returns:
        The problems, and how many there are. A shard that cannot be read is a problem, not an exception.

    Raises:
        ConfigError: For arguments that cannot be meant.
        MissingExtraError: If a library that a check needs is not installed.
    """
    found: list[Diagnostics] = []
    opened = [one for item in shards for one in _open(os.fspath(item), found)]
    sets = {tuple(shard.name for shard in one.shards): one for one in opened if isinstance(one, TarSet)}
    tasks = _tasks(opened)
    checked: dict[str, Checked] = {}
    check = partial(_check, Checks(tuple(columns), decode, duplicates))
    with closing(ordered_map(check, tasks, workers, preload=_PRELOAD)) as results:
        for task, done in zip(tasks, results, strict=True):
            checked[task.name] = done
            on_progress(len(tasks), done.size)
    found += [done.diagnostics for done in checked.values()]
    found += [one.compare([checked[name] for name in names], columns) for names, one in sets.items()]
    found.append(_check_indexes([name for name, done in checked.items() if not done.indexed]))
    for folder in dict.fromkeys(Path(task.name).parent for task in tasks):  # two sets may well have the same keys
        own = [task for task in tasks if Path(task.name).parent == folder]
        found.append(_equal_keys(own, [checked[task.name].keys for task in own]))
    if duplicates:
        contents, labels = [done.contents for done in checked.values()], [done.labels for done in checked.values()]
        found = [*_equal_contents(tasks, contents, labels), *found]
    counts = sum((diagnostics.counts for diagnostics in found), Counter[Severity]())
    problems = [problem for diagnostics in found for problem in diagnostics.problems()]
    problems.sort(key=lambda problem: list(Severity).index(problem.severity))
    return Report(
        len(tasks), sum(done.samples for done in checked.values()), sum(done.size for done in checked.values()),
        counts[Severity.ERROR], counts[Severity.WARNING], counts[Severity.NOTE], tuple(problems),
    )  # fmt: skip


def _tasks(opened: Iterable[MdsShard | TarSet]) -> list[Shard]:
    """The shards that were named, each once."""
    shards: dict[str, Shard] = {}
    for one in opened:
        for shard in one.shards if isinstance(one, TarSet) else [one]:
            shards[shard.name] = shard
    return list(shards.values())


def _check(checks: Checks, shard: Shard) -> Checked:
    """Run in a worker."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of odd but readable images
        return shard.check(checks)


def _open(item: str, found: list[Diagnostics]) -> list[MdsShard] | list[TarSet]:
    """The shards of ``item``: those of an MDS folder, or tars by their folders.

    found: gets the problems that show before shards are read.
    """
    path = local_path(item)
    is_folder = os.path.isdir(path)  # noqa: PTH112  # Path.is_dir raises for a name that is too long
    if is_folder and holds_mds(Path(path)):
        folder = Path(path)
        found.append(Diagnostics(path))
        shards = read_mds_index(folder, found[-1], count_classes(folder, found[-1]))
        names = [shard.entry.raw.name for shard in shards]
        check_gaps(names, names, found[-1], whole=True, unlikely=Severity.WARNING)  # MDSWriter counts from 0
        check_unlisted(folder, {file.name for shard in shards for file in shard.entry.files()}, found[-1])
        return shards
    try:
        if is_remote(item):
            raise DataError(f"{item} is not on this machine, and only local shards are checked: copy them here")
        names = [local_path(url) for url in expand_shards(item)]
    except DataError as error:
        found.append(Diagnostics(item))
        found[-1].error(str(error))
        return []
    sets = []
    for folder in dict.fromkeys(Path(name).parent for name in names):
        found.append(Diagnostics(str(folder)))
        inside = [name for name in names if Path(name).parent == folder]
        sets.append(open_tars(folder, inside, found[-1], whole=is_folder or bool(_WILD.search(path))))
    return sets


def _check_indexes(without: list[str]) -> Diagnostics:
    """Warn of tars without an index, once for all, since before the first use none has one."""
    diagnostics = Diagnostics("")
    if without:
        others = f", and {len(without) - 1:,} other tars have none" if len(without) > 1 else ""
        what = f"it has no index{others}; the first use makes it, or infobatch-stream index"
        diagnostics.add(Severity.WARNING, what, file=without[0])
    return diagnostics


def _equal_keys(tasks: Sequence[Shard], digests: list[bytes]) -> Diagnostics:
    """Warn of samples with the same key."""
    twice = find_duplicates(digests, KEY_BYTES, LISTED)
    diagnostics = Diagnostics("")
    for (shard, row), others in _listed(twice.first, tasks):
        what = f"the same key in {others}"
        diagnostics.add(Severity.WARNING, what, row, tasks[shard].key(row), tasks[shard].name)
    diagnostics.counts[Severity.WARNING] = twice.groups
    if twice.groups:
        diagnostics.add(Severity.NOTE, f"{twice.copies:,} samples have the key of an earlier one")
    return diagnostics


def _equal_contents(
    tasks: Sequence[Shard], digests: list[bytes], labels: list[bytes]
) -> tuple[Diagnostics, Diagnostics]:
    """Warn of samples with the same content; those with different labels come first."""
    twice = find_duplicates(digests, CONTENT_BYTES, LISTED, labels)
    conflicts, equal = Diagnostics(""), Diagnostics("")
    for (shard, row), others in _listed(twice.conflicting, tasks, labels):
        what = f"the same content under different labels: here{_label(labels[shard], row) or ' one'}, and {others}"
        conflicts.add(Severity.WARNING, what, row, None, tasks[shard].name)
    for (shard, row), others in _listed(twice.first, tasks):
        equal.add(Severity.WARNING, f"the same content in {others}", row, None, tasks[shard].name)
    conflicts.counts[Severity.WARNING] = twice.conflicts
    equal.counts[Severity.WARNING] = twice.groups - twice.conflicts
    if twice.groups:
        equal.add(Severity.NOTE, f"{twice.copies:,} samples have the content of an earlier one")
    return conflicts, equal


def _listed(
    groups: Groups, tasks: Sequence[Shard], labels: Sequence[bytes] | None = None
) -> Iterator[tuple[tuple[int, int], str]]:
    """Of each group the place of its first sample, and a text that lists the others, with their labels."""
    for count, (first, *others) in groups:
        texts = [f"{tasks[s].name} row {r}{_label(labels[s], r) if labels else ''}" for s, r in others[: _PLACES - 1]]
        more = count - len(texts) - 1
        yield first, ", ".join([*texts, f"and {more:,} more"] if more else texts)


def _label(codes: bytes, row: int) -> str:
    label = label_of(codes, row)
    return "" if label is None else f" (label {label})"
