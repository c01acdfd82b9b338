"""Checks of the files beside shards, and of the names of shards."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from infobatch_stream.errors import DataError
from infobatch_stream.formats.schema import Column
from infobatch_stream.formats.shard_list import SHARD_LIST
from infobatch_stream.formats.shard_names import gaps
from infobatch_stream.formats.shard_set import STATE
from infobatch_stream.sources.sidecars import read_classes, read_columns
from infobatch_stream.verify.diagnostics import Diagnostics, Severity

__all__ = ["columns_of", "count_classes", "check_unlisted", "check_gaps", "check_unfinished"]

_BESIDE = ("index.json", "classes.json", "columns.json", SHARD_LIST)
_SHARD = re.compile(r"\.mds(\.|$)")
_UNFINISHED = re.compile(r"\.(tmp|part|partial|incomplete|crdownload)([.-]|$)")  # left by killed writers, downloads
_WHOLE = re.compile(r"\.(tar(\.index\.npz|\.gz|\.bz2|\.xz|\.zst)?|tgz|mds)$")


_Content = TypeVar("_Content")


def read_or_report(read: Callable[[], _Content], diagnostics: Diagnostics) -> _Content | None:
    """What ``read`` returns; None, and an error among the ``diagnostics``, where it raises DataError or OSError."""
    try:
        return read()
    except (DataError, OSError) as error:
        diagnostics.error(str(error))
        return None


def count_classes(folder: Path, diagnostics: Diagnostics) -> int | None:
    """The number of names in the classes.json of ``folder``, if there is one that can be read."""
    classes = read_or_report(lambda: read_classes([folder]), diagnostics)
    return None if classes is None else len(classes)


def columns_of(folder: Path, diagnostics: Diagnostics) -> dict[str, Column] | None:
    """The columns in the columns.json of ``folder``, if there is one that can be read."""
    return read_or_report(lambda: read_columns([folder]), diagnostics)


def check_unlisted(folder: Path, known: set[str], diagnostics: Diagnostics) -> None:
    """Warn of shards in an MDS folder that its index.json does not name, and note other files."""
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir())
    unfinished = check_unfinished(folder, names, diagnostics)
    for name in names:
        if name not in known | unfinished and Path(name).name not in _BESIDE:
            severity = Severity.WARNING if _SHARD.search(name) else Severity.NOTE
            diagnostics.add(severity, f"{name} is named by no index.json, so nothing reads it")


def check_unfinished(folder: Path, names: Iterable[str], diagnostics: Diagnostics) -> set[str]:
    """Warn of what an interrupted writer or download left in ``folder``; returns these names."""
    unfinished = {name for name in names if _UNFINISHED.search(name) and not _WHOLE.search(name)}
    for name in sorted(unfinished):
        if (folder / name / STATE).is_dir():
            what = f"{name} holds a conversion that was broken off or is running, and can be resumed (convert --resume)"
            diagnostics.add(Severity.NOTE, what)
        else:
            diagnostics.add(Severity.WARNING, f"{name} was left by something that was broken off; remove it")
    return unfinished


def check_gaps(
    names: Iterable[str],
    there: Iterable[str],
    diagnostics: Diagnostics,
    *,
    whole: bool,
    unlikely: Severity = Severity.NOTE,
) -> None:
    """Warn of shards that are missing by the numbers in their names; see `gaps`."""
    for gap in gaps(names, set(there), whole=whole):
        diagnostics.add(Severity.WARNING if gap.likely else unlikely, gap.what)
