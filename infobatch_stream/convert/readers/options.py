"""Which columns of a source are converted, how they are called and stored."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from infobatch_stream.errors import ConfigError, DataError
from infobatch_stream.formats.extensions import is_extension
from infobatch_stream.formats.mds_encodings import check_encoding, fit
from infobatch_stream.formats.schema import KEY, MEMBERS, Column, Sample

__all__ = ["Choice", "Options", "check_once", "misfit", "unknown"]

_INDEX = re.compile(r"__index_level_\d+__")  # what pandas calls the index of its rows
_RESERVED = (KEY, MEMBERS)


@dataclass(frozen=True)
class Options:
    """What the user says of columns.

    columns: new name -> name in the source, which selects and renames; None for all as they are.
    encodings, extensions: of columns by their new name.
    keys: whether samples keep their keys; else those are left out, and tars get numbers.
    skip: samples that cannot be read are passed over; else what is known of them is raised at once.
    fill: of tables, by their new name: what stands where a column is empty, as text.
    """

    columns: Mapping[str, str] | None = None
    encodings: Mapping[str, str] | None = None
    extensions: Mapping[str, str] | None = None
    keys: bool = True
    skip: bool = False
    fill: Mapping[str, str] | None = None

    def choose(self, found: Mapping[str, Column], where: object) -> "Choice":
        """The chosen ones of the columns ``found`` in the source ``where``. Raises ConfigError."""
        kept = {name: name for name in found if self.keys or name != KEY}
        wanted = kept if self.columns is None else dict(self.columns)
        for name, source in wanted.items():
            if source not in found:
                raise unknown(source, found, where)
            self.check_name(name, own=source)
        return Choice(self.changed({name: found[source] for name, source in wanted.items()}, where), wanted)

    @staticmethod
    def check_name(name: str, own: str | None = None) -> None:
        """Raise ConfigError for a name that no column can have; ``own`` is what it is called in the source."""
        if not name or (name.startswith("__") and name != own):
            raise ConfigError(
                f"a column cannot be called {name!r}, since names that begin with two underscores are WebDataset's own "
                "and would not be read again; give another name (--column NAME=SOURCE, for each column that is wanted)."
            )

    def changed(self, columns: Mapping[str, Column], where: object) -> dict[str, Column]:
        """``columns`` with the encodings and extensions that the user gives. Raises ConfigError."""
        changed = dict(columns)
        known = [name for name in columns if name not in _RESERVED]
        for name in (*(self.encodings or ()), *(self.extensions or ())):
            if name not in known:
                raise unknown(name, columns, where)
        for name, encoding in (self.encodings or {}).items():
            check_encoding(encoding)
            changed[name] = replace(changed[name], mds=encoding)
        for name, extension in (self.extensions or {}).items():
            if not is_extension(extension) or extension != extension.lower():
                raise ConfigError(
                    f"{extension!r} is no extension; lower-case letters, digits, and dots or dashes between them are."
                )
            changed[name] = replace(changed[name], wds=extension)
        owners: dict[str, str] = {}
        for name, column in changed.items():
            for extension in column.wds.split(";") if name not in _RESERVED else ():
                if owners.setdefault(extension, name) != name:
                    raise ConfigError(
                        f"the columns {owners[extension]!r} and {name!r} of {where} both have the extension "
                        f"{extension!r}; give one of them another (--extension {name}=...)."
                    )
        return changed

    def offered(self, names: Sequence[str]) -> list[str]:
        """The columns ``names`` of a table without pandas' index, which is no data, unless the user asks for it."""
        wanted = () if self.columns is None else self.columns.values()
        return [name for name in names if name in wanted or not _INDEX.fullmatch(name)]

    def left_out(self, names: Sequence[str], where: object) -> list[str]:
        """A note on the index that `offered` leaves out."""
        index = [name for name in names if name not in self.offered(names)]
        if not index or self.columns is not None:
            return []
        return [
            f"{where}: {', '.join(index)} is the index that pandas gave its rows, and is left out; it can be taken "
            f"under another name (--column index={index[0]}, with the other columns that are wanted)"
        ]

    def called(self, source: str) -> str:
        """What the column ``source`` of the source is called (by its first name, if it has several)."""
        names = (name for name, own in (self.columns or {}).items() if own == source)
        return next(names, source)

    @property
    def given(self) -> frozenset[str]:
        """The columns whose encoding the user gives."""
        return frozenset(self.encodings or ())


@dataclass(frozen=True)
class Choice:
    """Chosen columns: how each is stored, and what it is called in the source."""

    columns: dict[str, Column]
    sources: dict[str, str]

    def of(self, sample: Sample, where: Callable[[], str]) -> Sample:
        """The chosen fields of ``sample``, in the form of their encoding; ``where`` names the sample in errors."""
        chosen = {}
        for name, source in self.sources.items():
            try:
                chosen[name] = fit(sample[source], self.columns[name].mds)
            except ValueError as error:
                raise misfit(where(), name, self.columns[name].mds, error) from error
        return chosen


def unknown(name: str, found: Iterable[str], where: object) -> ConfigError:
    """The error for a column that is not there."""
    there = [column for column in found if column not in _RESERVED]
    return ConfigError(f"{where} has no column {name!r}; it has {', '.join(map(repr, there[:50]))}.")


def check_once(names: Sequence[str], where: object) -> None:
    """Raise ConfigError for two columns of one name in the table ``where``."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{where} has two columns of one name: {', '.join(map(repr, twice[:9]))}; rename one.")


def misfit(where: str, name: str, encoding: str, error: Exception, other: str | None = "bytes") -> DataError:
    """The error for a value that does not fit the encoding of its column; ``other``: one that it would fit."""
    change = f"Store the column in another way (--encoding {name}={other}, say), leave" if other else "Leave"
    return DataError(
        f"{where}: the column {name!r} is stored as {encoding!r}, and this value cannot be: {error}. {change} such "
        "samples out (--on-error skip), or correct the value."
    )
