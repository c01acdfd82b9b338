"""CSV files, read as the bytes that their values are."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.csv

from infobatch_stream.convert.readers.options import check_once
from infobatch_stream.convert.readers.plain_arrow import reading
from infobatch_stream.errors import DataError

__all__ = ["CsvFile", "is_csv"]

_BLOCK = 1 << 24  # bytes that are in memory at once, about; and of the longest row
_START = 1 << 16  # bytes that have the names of the columns, as a rule
_READ = pa.csv.ReadOptions(block_size=_BLOCK, use_threads=False)


def is_csv(table: Path) -> bool:
    """Whether a file of this name is a CSV."""
    return table.name.endswith((".csv", ".csv.gz"))


class CsvFile:
    """One file, UTF-8 as a rule, with the names of its columns in the first row.

    names: of the columns; ``unnamed`` ones are called as pandas calls them, "Unnamed: 0" (0 is the first column).
    Where no comma is between the names, the separator is the semicolon, tab or bar that is.
    """

    def __init__(self, path: Path) -> None:
        """Raises DataError and ConfigError."""
        self._path = path
        with _reading(path):
            with pa.input_stream(str(path)) as file:
                start: bytes = file.read(_START)
            if start.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise DataError(f"{path} is UTF-16; write it again as UTF-8, e.g. iconv -f utf-16 -t utf-8.")
            self._parse = pa.csv.ParseOptions(delimiter=_separator(start), newlines_in_values=True)
            with self._open(pa.csv.ConvertOptions()) as reader:
                self._raw: list[str] = reader.schema.names
        self.names = [name or f"Unnamed: {number}" for number, name in enumerate(self._raw)]
        self.unnamed = {name for name, raw in zip(self.names, self._raw, strict=True) if not raw}
        check_once(self.names, path)

    def batches(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The columns ``names``, all of them binary. Raises DataError."""
        places = [self.names.index(name) for name in names]
        convert = pa.csv.ConvertOptions(column_types=dict.fromkeys(self._raw, pa.binary()))
        if len(set(self._raw)) == len(self._raw):
            convert.include_columns = [self._raw[place] for place in places]
            places = list(range(len(places)))
        with _reading(self._path), self._open(convert) as reader:
            for batch in reader:
                yield pa.RecordBatch.from_arrays([batch.column(place) for place in places], list(names))

    def _open(self, convert: pa.csv.ConvertOptions) -> pa.csv.CSVStreamingReader:
        return pa.csv.open_csv(pa.input_stream(str(self._path)), _READ, self._parse, convert)


def _separator(start: bytes) -> str:
    """What is between the names of the columns, in the first line of a file that begins with ``start``."""
    line = re.sub(rb'"[^"]*"', b"", start).lstrip().partition(b"\n")[0]
    counts = {separator: line.count(separator.encode()) for separator in ",;\t|"}
    return "," if counts[","] or not any(counts.values()) else max(counts, key=counts.__getitem__)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raises DataError for what pyarrow says of a CSV that is damaged, or none."""
    try:
        with reading(path, remedy="correct it"):
            yield
    except UnicodeDecodeError as error:
        raise DataError(f"{path} has names of columns that are no UTF-8 ({error}); write it again as UTF-8.") from error
