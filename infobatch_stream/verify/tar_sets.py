"""Checks of the tars of one folder together: of their names before they are read, and of their members after."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from infobatch_stream.formats.shard_list import Listed, read_shard_list
from infobatch_stream.formats.shard_names import Family, family_of
from infobatch_stream.verify.diagnostics import Checked, Diagnostics, Severity
from infobatch_stream.verify.members import differences
from infobatch_stream.verify.sidecars import check_gaps, check_unfinished, columns_of, count_classes, read_or_report
from infobatch_stream.verify.tar_columns import CheckedColumns
from infobatch_stream.verify.tars import TarShard

__all__ = ["TarSet", "open_tars"]

_SHOWN = 5  # missing shards that are named
_INDEX = ".index.npz"


@dataclass(frozen=True)
class TarSet:
    """Tars of one folder, in the order in which the user named them."""

    folder: Path
    shards: tuple[TarShard, ...]
    columns: CheckedColumns

    def compare(self, checked: Sequence[Checked], asked: Sequence[str]) -> Diagnostics:
        """Compare the shards with each other, by what was found in each. asked: columns that each sample must have."""
        diagnostics = Diagnostics(str(self.folder))
        families = defaultdict[Family, list[int]](list)
        for place, shard in enumerate(self.shards):
            families[family_of(Path(shard.name).name)].append(place)
        there = {name for one in checked for name in one.members.counts}
        meant = {extension for name in asked for extension in self.columns.meant(name, there)}
        severity = Severity.NOTE if self.columns.differ else Severity.WARNING
        for places in families.values():
            if not any(checked[place].samples for place in places):
                if all(checked[place].readable for place in places):
                    diagnostics.error(f"there is no sample in {self.shards[places[0]].name}, nor in others of its set")
                continue
            for found in differences([checked[place].members for place in places], meant):
                shard = self.shards[places[found.tar]]
                level = severity if found.likely else Severity.NOTE
                diagnostics.add(level, found.what, found.row, shard.key(found.row), shard.name)
        if self.shards and any(one.samples for one in checked) and all(one.readable for one in checked):
            self.columns.compare(there, diagnostics)
        return diagnostics


def open_tars(folder: Path, names: Sequence[str], diagnostics: Diagnostics, *, whole: bool) -> TarSet:
    """The tars ``names`` (paths) of one folder. whole: the user means all that are there."""
    there = {file.name for file in folder.glob("*")}
    inside = [Path(name).name for name in names]
    tars = {name for name in there if name.endswith(".tar")}
    check_gaps(inside, tars, diagnostics, whole=whole)
    check_unfinished(folder, there, diagnostics)
    listed = read_or_report(lambda: read_shard_list(folder), diagnostics) or {}
    if whole:
        _check_lost(tars | set(inside), there, listed, diagnostics)
    classes, columns = count_classes(folder, diagnostics), CheckedColumns(columns_of(folder, diagnostics) or {})
    shards = tuple(TarShard(name, classes, columns, listed.get(Path(name).name)) for name in names)
    if listed:
        for name in sorted(set(inside) - listed.keys()):
            diagnostics.add(Severity.WARNING, f"{name} is not in {next(iter(listed.values())).place}")
    return TarSet(folder, shards, columns)


def _check_lost(tars: set[str], there: set[str], listed: dict[str, Listed], diagnostics: Diagnostics) -> None:
    """Report shards that are missing, but in the list of shards, or have an index."""
    if lost := sorted(listed.keys() - tars):
        place = listed[lost[0]].place
        diagnostics.error(
            f"{len(lost):,} of the {len(listed):,} shards that {place} lists are missing: {_some(lost)}; fetch them or "
            f"convert the data again, or remove {place} if they were taken out on purpose"
        )
    left = {name.removesuffix(_INDEX) for name in there if name.endswith(_INDEX)}
    if lost := sorted(left - there - listed.keys()):
        what = f"{len(lost):,} shards are missing of which the index was left behind: {_some(lost)}"
        diagnostics.error(f"{what}; fetch them, or remove <shard>{_INDEX} if they were never to be read again")


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:_SHOWN], "..."] if len(names) > _SHOWN else names)
