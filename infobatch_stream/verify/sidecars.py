"""What lies beside shards, as far as it can be checked without reading them."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from infobatch_stream.errors import DataError
from infobatch_stream.formats.shard_list import MANIFEST
from infobatch_stream.formats.shard_names import gaps
from infobatch_stream.formats.shard_set import STATE
from infobatch_stream.sources.sidecars import read_columns
from infobatch_stream.verify.diagnostics import Diagnostics, Severity
from infobatch_stream.verify.tar_columns import CheckedColumns

__all__ = ["columns_of", "count_classes", "look_around", "look_for_gaps", "look_for_halves"]

_BESIDE = ("index.json", "classes.json", "columns.json", MANIFEST)
_SHARD = re.compile(r"\.mds(\.|$)")
_HALF = re.compile(r"\.(tmp|part|partial|incomplete|crdownload)([.-]|$)")  # what a writer or download leaves that died
_WHOLE = re.compile(r"\.(tar(\.index\.npz|\.gz|\.bz2|\.xz|\.zst)?|tgz|mds)$")


def count_classes(folder: Path, findings: Diagnostics) -> int | None:
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


def columns_of(folder: Path, findings: Diagnostics) -> CheckedColumns:
    """The columns that the columns.json of ``folder`` names."""
    try:
        return CheckedColumns(read_columns([str(folder)]) or {})
    except DataError as error:
        findings.error(str(error))
        return CheckedColumns()


def look_around(folder: Path, known: set[str], findings: Diagnostics) -> None:
    """Warn of the shards in an MDS folder that its index.json does not name, and note other files."""
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir())
    half = look_for_halves(folder, names, findings)
    for name in names:
        if name not in known | half and Path(name).name not in _BESIDE:
            severity = Severity.WARNING if _SHARD.search(name) else Severity.NOTE
            findings.add(severity, f"{name} is named by no index.json, so nothing reads it")


def look_for_halves(folder: Path, names: Iterable[str], findings: Diagnostics) -> set[str]:
    """Warn of what a writer or a download left in ``folder`` that was broken off; a shard never is."""
    half = {name for name in names if _HALF.search(name) and not _WHOLE.search(name)}
    for name in sorted(half):
        if (folder / name / STATE).is_dir():
            what = f"{name} holds a conversion that was broken off or is running, and can be resumed (convert --resume)"
            findings.add(Severity.NOTE, what)
        else:
            findings.add(Severity.WARNING, f"{name} was left by something that was broken off; remove it")
    return half


def look_for_gaps(
    names: Iterable[str],
    there: Iterable[str],
    findings: Diagnostics,
    *,
    whole: bool,
    unlikely: Severity = Severity.NOTE,
) -> None:
    """Warn of shards that are missing by the numbers in their names; see `gaps`."""
    for gap in gaps(names, set(there), whole=whole):
        findings.add(Severity.WARNING if gap.likely else unlikely, gap.what)
