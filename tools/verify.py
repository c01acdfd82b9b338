"""What is wrong with a set of shards, MDS or tars, and where."""

import json
import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Protocol

from infobatch_stream.errors import DataError
from infobatch_stream.sources.urls import expand_shards, is_remote, local_path

from .duplicates import CONTENT_BYTES, KEY_BYTES, find_duplicates
from .findings import LISTED, Checked, Checks, Findings, Problem, Severity
from .pool import ordered_map
from .readers.columns import read_columns
from .verify_mds import MdsShard, read_mds_index
from .verify_tars import TarShard

__all__ = ["Report", "Shard", "Track", "verify"]

_BESIDE = ("index.json", "classes.json", "columns.json")
_PRELOAD = ("webdataset.tariterators", "PIL.Image")
_PLACES = 5  # of equal samples, or numbers of missing shards, that are listed
_NUMBERED = re.compile(r"(.*?)(\d+)(\D*)")
_HALF = re.compile(r"\.(tmp|part|partial|incomplete|crdownload)([.-]|$)")  # what a writer or download leaves that died

Track = Callable[[int, int], None]
"""Is called when shards are done: of how many in all, and the bytes of the last."""


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
    """What `verify` found in so many shards and samples, and bytes of shard files.

    problems: errors first, each severity in the order of the shards; of a file with very many, the first.
    errors, warnings, notes: how many there are, those not listed included.
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
    track: Track | None = None,
) -> Report:
    """Check ``shards``: folders with an index.json (MDS), folders of tars, tars, braces and globs; all local.

    columns: each sample must have them: columns of MDS, extensions of tar members.
    duplicates: look for samples of the same content, all fields but the key and ``name``; or ``columns``.
    decode: decode images, arrays, JSON and numbers. Pickled values never are.
    workers: processes; the report is the same for any number. Memory is a few blocks and the largest sample for each,
        and 8 bytes per sample, 24 with ``duplicates``; of a shard compressed by zstd or snappy, all of it.

    Nothing is written. Raises ConfigError for arguments that cannot be meant, and MissingExtraError.
    """
    found: list[Findings] = []
    tasks = list({task.name: task for item in shards for task in _open(os.fspath(item), found)}.values())
    checked: list[Checked] = []
    check = partial(_check, Checks(tuple(columns), decode, duplicates))
    with closing(ordered_map(check, tasks, workers, preload=_PRELOAD)) as results:
        for done in results:
            checked.append(done)
            if track is not None:
                track(len(tasks), done.size)
    found += [done.findings for done in checked]
    found.append(_check_indexes([task.name for task, done in zip(tasks, checked, strict=True) if not done.indexed]))
    for folder in dict.fromkeys(Path(task.name).parent for task in tasks):  # two sets may well have the same keys
        own = [place for place, task in enumerate(tasks) if Path(task.name).parent == folder]
        found.append(_equal([tasks[k] for k in own], [checked[k].keys for k in own], KEY_BYTES, "key"))
    if duplicates:
        found.append(_equal(tasks, [done.contents for done in checked], CONTENT_BYTES, "content"))
    counts = sum((findings.counts for findings in found), Counter[Severity]())
    problems = [problem for findings in found for problem in findings.problems()]
    problems.sort(key=lambda problem: list(Severity).index(problem.severity))
    return Report(
        len(tasks), sum(done.samples for done in checked), sum(done.size for done in checked),
        counts[Severity.ERROR], counts[Severity.WARNING], counts[Severity.NOTE], tuple(problems),
    )  # fmt: skip


def _check(checks: Checks, shard: Shard) -> Checked:
    """Run in a worker."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of odd but readable images
        return shard.check(checks)


def _open(item: str, found: list[Findings]) -> list[MdsShard] | list[TarShard]:
    """The shards that ``item`` means, with what is found without reading them."""
    path = local_path(item)
    if os.path.isdir(path):  # noqa: PTH112  # Path.is_dir raises for a name that is too long
        folder = Path(path)
        if (folder / "index.json").exists() or any(folder.glob("*.mds*")):
            found.append(Findings(path))
            shards = read_mds_index(folder, found[-1], _count_classes(folder, found[-1]))
            _look_around(folder, {file.name for shard in shards for file in shard.files()}, found[-1])
            return shards
    try:
        if is_remote(item):
            raise DataError(f"{item} is not on this machine, and only local shards are checked: copy them here")
        names = [local_path(url) for url in expand_shards(item)]
    except DataError as error:
        found.append(Findings(item))
        found[-1].error(str(error))
        return []
    tars: list[TarShard] = []
    for folder in dict.fromkeys(Path(name).parent for name in names):
        found.append(Findings(str(folder)))
        inside = [name for name in names if Path(name).parent == folder]
        _look_for_gaps([Path(name).name for name in inside], found[-1])
        _look_for_halves((file.name for file in folder.glob("*")), found[-1])
        classes, aside = _count_classes(folder, found[-1]), _names(folder, found[-1])
        tars += [TarShard(name, name, classes, aside) for name in inside]
    return tars


def _count_classes(folder: Path, findings: Findings) -> int | None:
    """The number of names in the classes.json of ``folder``, if there is one."""
    place = folder / "classes.json"
    try:
        classes = json.loads(place.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        findings.error(f"{place} cannot be read ({error})")
        return None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        findings.error(f"{place} is no list of names")
        return None
    return len(classes)


def _names(folder: Path, findings: Findings) -> tuple[str, ...]:
    """The extensions of the column ``name``, by the columns.json of ``folder``."""
    try:
        columns = read_columns([str(folder)]) or {}
    except DataError as error:
        findings.error(str(error))
        return ()
    return tuple(columns["name"].wds.split(";")) if "name" in columns else ()


def _look_around(folder: Path, known: set[str], findings: Findings) -> None:
    """Note the files in an MDS folder that belong to none of its shards."""
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir())
    half = _look_for_halves(names, findings)
    for name in names:
        if name not in known | half and Path(name).name not in _BESIDE:
            findings.add(Severity.NOTE, f"{name} is named by no index.json, so nothing reads it")


def _look_for_halves(names: Iterable[str], findings: Findings) -> set[str]:
    """Warn of what a writer or a download left that was broken off."""
    half = {name for name in names if _HALF.search(name)}
    for name in sorted(half):
        findings.add(Severity.WARNING, f"{name} was left by something that was broken off; remove it")
    return half


def _look_for_gaps(names: list[str], findings: Findings) -> None:
    """Warn of numbers that are missing between those of shards that are called alike."""
    numbers = defaultdict[tuple[str, str], list[str]](list)
    for name in names:
        if (match := _NUMBERED.fullmatch(name)) is not None:
            numbers[match[1], match[3]].append(match[2])
    for (before, behind), texts in numbers.items():
        there = set(map(int, texts))
        first, last = min(there), max(there)
        count = last - first + 1 - len(there)
        if 0 < count <= len(there):  # else they are no numbers of shards
            missing = islice((number for number in range(first, last) if number not in there), _PLACES)
            shown = ", ".join(f"{before}{number:0{len(texts[0])}}{behind}" for number in missing)
            findings.add(
                Severity.WARNING, f"{count:,} missing between the shards {first:,} and {last:,}: {shown}"
                f"{', ...' if count > _PLACES else ''}",
            )  # fmt: skip


def _check_indexes(without: list[str]) -> Findings:
    """Warn once of tars without index: before the first use there is none."""
    findings = Findings("")
    if without:
        others = f", and {len(without) - 1:,} other tars have none" if len(without) > 1 else ""
        what = f"it has no index{others}; the first use makes it, or infobatch-stream index"
        findings.add(Severity.WARNING, what, file=without[0])
    return findings


def _equal(tasks: Sequence[Shard], digests: list[bytes], width: int, what: str) -> Findings:
    """Warn of samples with an equal key or content."""
    twice = find_duplicates(digests, width, LISTED)
    findings = Findings("")
    for count, places in twice.first:
        (shard, row), *others = places[:_PLACES]
        shown = ", ".join(f"{tasks[other].name} row {its}" for other, its in others)
        more = f", and {count - len(others) - 1:,} more" if count > len(others) + 1 else ""
        key = tasks[shard].key(row) if width == KEY_BYTES else None
        findings.add(Severity.WARNING, f"the same {what} in {shown}{more}", row, key, tasks[shard].name)
    findings.counts[Severity.WARNING] = twice.groups
    if twice.groups:
        findings.add(Severity.NOTE, f"{twice.copies:,} samples have the {what} of an earlier one")
    return findings
