"""Parquet and CSV files, unpacked into one file that can be read by position: an Arrow stream in a temporary folder."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from infobatch_stream.errors import ConfigError, DataError

from ..encodings import Form, form_of
from .columns import Options, unknown
from .kinds import plain_type
from .temporary import temporary_folder

__all__ = ["Spool"]

_BATCH = 1 << 24  # bytes of rows that are in memory at once, about; and of a CSV's longest row
_CSV = pa.csv.ParseOptions(newlines_in_values=True)
# In a column of numbers; not NaN, which is one. In a column of texts nothing is null.
_NULLS = ["", "NA", "N/A", "n/a", "#N/A", "NULL", "null"]
_READ = pa.csv.ReadOptions(block_size=_BATCH, use_threads=False)


class Spool:
    """The chosen columns of tables that have the same ones, row by row.

    The file is removed with this object, in the process that made it: what it is to others lies in ``path``.

    path: the Arrow stream. schema: its columns. rows: of each table.
    """

    def __init__(self, tables: Sequence[Path], options: Options) -> None:
        """Raises ConfigError, DataError for a table that is damaged, OSError (the temporary folder is full)."""
        self.path = str(Path(temporary_folder(self), "rows.arrow"))
        self.rows: list[int] = []
        schemas = [_read_schema(table) for table in tables]
        self.schema = _common(tables, schemas, options)
        with pa.OSFile(self.path, "wb") as sink, pa.ipc.new_stream(sink, self.schema) as writer:
            for table in tables:
                rows = 0
                for batch in _batches(table, self.schema):
                    writer.write_batch(batch)
                    rows += batch.num_rows
                self.rows.append(rows)

    def __getstate__(self) -> None:
        """No process but this one has it."""
        raise TypeError("a spool belongs to the process that made it")


def _is_csv(table: Path) -> bool:
    return table.name.endswith((".csv", ".csv.gz"))


@contextmanager
def _reading(table: Path) -> Iterator[None]:
    """Raises DataError for what pyarrow says of a table that is damaged, or none."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's
        remedy = "write it again"
        if _is_csv(table):
            remedy = "correct it, or have a column read as text (--encoding NAME=str): the first rows tell what it is"
        raise DataError(f"{table} cannot be read: {error}; {remedy}.") from error


def _read_schema(table: Path) -> pa.Schema:
    """The columns of a table; of a CSV what they look like in the first rows."""
    with _reading(table):
        if not _is_csv(table):
            return pa.parquet.read_schema(table)
        with _open_csv(table, pa.csv.ConvertOptions(null_values=_NULLS)) as reader:
            return pa.schema([(field.name, _csv_type(field.type)) for field in reader.schema])


def _csv_type(kind: pa.DataType) -> pa.DataType:
    """Dates stay the text that they are."""
    return pa.string() if pa.types.is_temporal(kind) else kind


def _open_csv(table: Path, convert: pa.csv.ConvertOptions) -> pa.csv.CSVStreamingReader:
    return pa.csv.open_csv(pa.input_stream(str(table)), _READ, _CSV, convert)


def _common(tables: Sequence[Path], schemas: Sequence[pa.Schema], options: Options) -> pa.Schema:
    """The chosen columns, of types that those of all tables can be turned into."""
    names = schemas[0].names
    if len(set(names)) < len(names):
        raise ConfigError(f"{tables[0]} has two columns of one name: {', '.join(map(repr, names[:50]))}; rename one.")
    for table, schema in zip(tables, schemas, strict=True):
        if sorted(schema.names) != sorted(names):
            raise ConfigError(
                f"{table} has the columns {', '.join(schema.names[:50])}, and {tables[0]} has {', '.join(names[:50])}; "
                "convert tables with different columns one by one."
            )
    chosen = names if options.columns is None else list(dict.fromkeys(options.columns.values()))
    fields = []
    for name in chosen:
        if name not in names:
            raise unknown(name, names, tables[0])
        told = _told_type(name, options) if _is_csv(tables[0]) else None
        kinds = [pa.schema([pa.field(name, told or plain_type(schema.field(name).type))]) for schema in schemas]
        try:
            common = pa.unify_schemas(kinds, promote_options="permissive").field(0)
        except pa.ArrowException as error:
            raise ConfigError(
                f"the column {name!r} is not of one type in {len(tables)} tables ({error}); convert them one by one."
            ) from error
        if _is_csv(tables[0]) and pa.types.is_null(common.type):
            common = pa.field(name, pa.string())  # what is empty in the first rows may be anything
        fields.append(common)
    return pa.schema(fields, schemas[0].metadata)


def _told_type(source: str, options: Options) -> pa.DataType | None:
    """What a column of a CSV is read as, by the encoding that the user gives."""
    for name, encoding in (options.encodings or {}).items():
        if (options.columns or {name: name}).get(name) == source:
            form = form_of(encoding)
            if form is Form.INT:
                return pa.uint64() if encoding == "uint64" else pa.int64()
            return pa.float64() if form is Form.FLOAT else pa.binary() if encoding == "bytes" else pa.string()
    return None


def _batches(table: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The rows of a table, as ``schema`` has them."""
    with _reading(table):
        if _is_csv(table):
            types = {field.name: field.type for field in schema}
            options = pa.csv.ConvertOptions(column_types=types, include_columns=schema.names, null_values=_NULLS)
            with _open_csv(table, options) as reader:
                yield from (batch.cast(schema) for batch in reader)
            return
        with pa.parquet.ParquetFile(table, pre_buffer=False) as file:
            groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
            row = sum(group.total_byte_size for group in groups) // max(file.metadata.num_rows, 1)
            size = min(max(_BATCH // max(row, 1), 1), 1 << 16)
            for batch in file.iter_batches(size, columns=schema.names, use_threads=False):
                arrays = [_plain(batch.column(name)).cast(schema.field(name).type) for name in schema.names]
                yield pa.RecordBatch.from_arrays(arrays, schema=schema)


def _plain(array: pa.Array) -> pa.Array:
    if isinstance(array, pa.ExtensionArray):
        return _plain(array.storage)
    return array.dictionary_decode() if isinstance(array, pa.DictionaryArray) else array
