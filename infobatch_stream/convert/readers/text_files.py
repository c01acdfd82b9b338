"""Tables of text, CSV files or JSON lines, whose types are found from their values, in all the files of a source."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from infobatch_stream.convert.readers.csv_files import NULLS, CsvFile, Tally, is_csv, typed
from infobatch_stream.convert.readers.json_lines import JsonFile, JsonTally, is_json, json_typed
from infobatch_stream.convert.readers.options import Options
from infobatch_stream.formats.mds_encodings import ValueKind, value_kind
from infobatch_stream.formats.schema import KEY

__all__ = ["TextFiles"]


class TextFiles:
    """Those among the files of a source that are text; a column has one type in all of them, whatever their splits.

    as_json: the columns that are JSON, which is known when they have a type.
    """

    def __init__(self, tables: Sequence[Path]) -> None:
        """Raises ConfigError, DataError for a table that is damaged."""
        self._files: dict[Path, CsvFile | JsonFile] = {}
        for table in tables:
            if is_json(table) or is_csv(table):
                self._files[table] = JsonFile(table) if is_json(table) else CsvFile(table)
        self.as_json: set[str] = set()
        self._types: dict[tuple[bool, str], pa.DataType] = {}
        self._empty: set[tuple[bool, str]] = set()

    def __contains__(self, table: Path) -> bool:
        """Whether it is one of them."""
        return table in self._files

    def names(self, table: Path) -> list[str]:
        """The columns of a file."""
        return self._files[table].names

    def schema(self, tables: Sequence[Path], chosen: Sequence[str], options: Options, notes: list[str]) -> pa.Schema:
        """The types of the ``chosen`` columns of ``tables``, which are of one kind: of what the user says, or of what
        fits all values. ``notes``: what a user should know is added to them, once for a column.

        Raises ConfigError for numbers that are of no one type.
        """
        json = is_json(tables[0])
        self._find(json, [name for name in chosen if (json, name) not in self._types], options, notes)
        names = list(chosen)
        if options.columns is None:  # commas at the ends of lines make columns, too
            for name in frozenset.intersection(*(frozenset(self._files[table].unnamed) for table in tables)):
                if (json, name) in self._empty:
                    names.remove(name)
        return pa.schema([(name, self._types[json, name]) for name in names])

    def batches(
        self, table: Path, schema: pa.Schema, options: Options
    ) -> Iterator[tuple[pa.RecordBatch, dict[str, dict[int, str]]]]:
        """The rows of ``table`` in the types of `schema`; and column -> row -> why it is null instead of its value."""
        for batch in self._files[table].batches(schema.names):
            arrays, misfits = [], {}
            for field in schema:
                values = batch.column(field.name)
                if is_json(table):
                    found = json_typed(values, field.type, as_json=field.name in self.as_json)
                else:
                    found = typed(values, field.type, _empty(field.name, options))
                arrays.append(found[0])
                misfits[field.name] = found[1]
            yield pa.RecordBatch.from_arrays(arrays, schema=schema), misfits

    def _find(self, json: bool, names: Sequence[str], options: Options, notes: list[str]) -> None:
        """The types of ``names``, of which none is known yet."""
        tallies: dict[str, Tally | JsonTally] = {}
        for name in names:
            known = _known_type(name, options)
            if json:
                called = options.called(name)
                tallies[name] = JsonTally(called, "str" if name == KEY else (options.encodings or {}).get(called))
            elif known is None:
                tallies[name] = Tally(options.called(name))
            else:
                self._types[json, name] = known
        for table, file in self._files.items():
            there = [name for name in tallies if name in file.names] if is_json(table) == json else []
            row = 0
            for batch in file.batches(there) if there else ():
                for name in there:
                    tallies[name].add(batch.column(name), table, row)
                row += batch.num_rows
        for name, tally in tallies.items():
            self._types[json, name] = tally.type()
            notes += tally.notes
            if tally.is_empty:
                self._empty.add((json, name))
            if isinstance(tally, JsonTally) and tally.as_json:
                self.as_json.add(name)


def _known_type(source: str, options: Options) -> pa.DataType | None:
    """What a column of a CSV is read as where that is known: by the encoding that the user gives from the text."""
    if source == KEY:
        return pa.string()
    encoding = (options.encodings or {}).get(options.called(source))
    if encoding is None:
        return None
    return pa.binary() if encoding == "bytes" else pa.string()


def _empty(source: str, options: Options) -> Sequence[str]:
    """The texts that are null in a column that is read as text: it is one of numbers, or the user fills it."""
    name = options.called(source)
    if value_kind((options.encodings or {}).get(name, "str")) in (ValueKind.INT, ValueKind.FLOAT):
        return NULLS
    return ("",) if name in (options.fill or {}) else ()
