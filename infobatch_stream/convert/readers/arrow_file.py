"""Tables, unpacked into one file that can be read by position: an Arrow stream in a temporary folder."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from infobatch_stream.convert.readers.options import Options, check_once, unknown
from infobatch_stream.convert.readers.plain_arrow import is_list, plain, plain_type, reading
from infobatch_stream.convert.readers.temp_folder import temporary_folder
from infobatch_stream.convert.readers.text_files import TextFiles
from infobatch_stream.errors import ConfigError, DataError

__all__ = ["ArrowFile", "parquet_names", "read_stream"]

_BATCH = 1 << 24  # bytes of rows that are in memory at once, about


class ArrowFile:
    """The chosen columns of tables that have the same ones, row by row.

    The file is removed with this object, in the process that made it: what it is to others lies in ``path``.

    path: the Arrow stream. schema: its columns. rows: of each table. misfits: column -> position -> why the value that
    was there is a null in the stream: it is not of the type that the column has. as_json: columns whose texts are JSON.
    notes: what a user should know.
    """

    def __init__(self, tables: Sequence[Path], options: Options, texts: TextFiles) -> None:
        """``texts``: of the whole source, whose types are those of ``tables``.

        Raises ConfigError, DataError for a table that is damaged, OSError (the temporary folder is full).
        """
        self.path = str(Path(temporary_folder(self), "rows.arrow"))
        self.rows: list[int] = []
        self.misfits: dict[str, dict[int, str]] = {}
        self.notes: list[str] = []
        self._texts = texts
        is_text = [table in self._texts for table in tables]
        if any(is_text) and not all(is_text):
            raise ConfigError(f"{tables[0]} and the files beside it are CSV and Parquet; convert them one by one.")
        if any(is_text):
            names = {table: self._texts.names(table) for table in tables}
            self.schema = self._texts.schema(tables, _chosen(names, options), options, self.notes)
        else:
            schemas = {table: _read_schema(table) for table in tables}
            names = {table: schema.names for table, schema in schemas.items()}
            self.schema = _common_schema(schemas, _chosen(names, options))
        self.as_json = self._texts.as_json.intersection(self.schema.names)
        self.notes += next(filter(None, (options.left_out(there, table) for table, there in names.items())), [])
        with pa.OSFile(self.path, "wb") as sink, pa.ipc.new_stream(sink, self.schema) as writer:
            for table in tables:
                self.rows.append(0)
                for batch in self._batches(table, options):
                    writer.write_batch(batch)
                    self.rows[-1] += batch.num_rows

    def __getstate__(self) -> None:
        """No process but this one has it."""
        raise TypeError("the temporary file belongs to the process that made it")

    def _batches(self, table: Path, options: Options) -> Iterator[pa.RecordBatch]:
        """The rows of ``table``, as ``schema`` has them."""
        if table not in self._texts:
            yield from _parquet_batches(table, self.schema)
            return
        for batch, misfits in self._texts.batches(table, self.schema, options):
            for name, found in misfits.items():
                here = {sum(self.rows) + row: why for row, why in found.items()}
                self.misfits.setdefault(name, {}).update(here)
            yield batch


def _chosen(names: Mapping[Path, Sequence[str]], options: Options) -> list[str]:
    """The columns that are wanted of tables with ``names``. Raises ConfigError."""
    offered = {table: options.offered(there) for table, there in names.items()}
    first = next(iter(offered))
    for table, there in offered.items():
        if sorted(there) != sorted(offered[first]):
            raise ConfigError(
                f"{table} has the columns {', '.join(there[:50])}, and {first} has "
                f"{', '.join(offered[first][:50])}; convert tables with different columns one by one."
            )
    for name in (options.columns or {}).values():
        if name not in offered[first]:
            raise unknown(name, offered[first], first)
    return offered[first] if options.columns is None else list(dict.fromkeys(options.columns.values()))


def _read_schema(table: Path) -> pa.Schema:
    with reading(table):
        schema = pa.parquet.read_schema(table)
    check_once(schema.names, table)
    return schema


def read_stream(path: str | Path) -> list[pa.RecordBatch]:
    """The batches of an Arrow stream, mapped into memory: nothing of them is read yet. Raises DataError and OSError."""
    damaged = reading(Path(path), "is no Arrow stream, or damaged")
    with damaged, pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
        return [batch for batch in reader if batch.num_rows]


def parquet_names(table: Path) -> list[str]:
    """The columns of a Parquet file. Raises DataError."""
    names: list[str] = _read_schema(table).names
    return names


def _common_schema(schemas: Mapping[Path, pa.Schema], chosen: Sequence[str]) -> pa.Schema:
    """The chosen columns, of types that those of all tables can be turned into without loss."""
    fields = []
    for name in chosen:
        kinds = {table: plain_type(schema.field(name).type) for table, schema in schemas.items()}
        try:
            one = [pa.schema([(name, kind)]) for kind in kinds.values()]
            common = pa.unify_schemas(one, promote_options="permissive").field(0)
            if not all(_class_of(kind) == "int" or _is_kept(kind, common.type) for kind in kinds.values()):
                raise pa.ArrowTypeError(", ".join(sorted(set(map(str, kinds.values())))))
        except pa.ArrowException as error:
            raise ConfigError(
                f"the column {name!r} is not of one type in {len(schemas)} tables ({error}); convert them one by one."
            ) from error
        fields.append(common)
    return pa.schema(fields, next(iter(schemas.values())).metadata)


def _is_kept(kind: pa.DataType, common: pa.DataType) -> bool:
    """Whether values of the type ``kind`` are the same in ``common``, and so is all that is nested in them."""
    kind, common = plain_type(kind), plain_type(common)
    if kind == common or pa.types.is_null(kind):
        return True
    if is_list(kind) and is_list(common):
        return _is_kept(kind.value_type, common.value_type)
    if pa.types.is_map(kind) and pa.types.is_map(common):
        return _is_kept(kind.key_type, common.key_type) and _is_kept(kind.item_type, common.item_type)
    if pa.types.is_struct(kind) and pa.types.is_struct(common):
        fields, wanted = ({field.name: field.type for field in one} for one in (kind, common))
        return fields.keys() == wanted.keys() and all(_is_kept(fields[name], wanted[name]) for name in fields)
    return not kind.num_fields and _class_of(kind) == _class_of(common)


def _class_of(kind: pa.DataType) -> str:
    """A name for types that hold the same values, but for their range."""
    if pa.types.is_integer(kind):
        return "int"
    for name in ("floating", "decimal"):
        if getattr(pa.types, f"is_{name}")(kind):
            return name
    return str(kind).removeprefix("large_").partition("[")[0]


def _parquet_batches(table: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    with reading(table), pa.parquet.ParquetFile(table, pre_buffer=False) as file:
        groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
        row = sum(group.total_byte_size for group in groups) // max(file.metadata.num_rows, 1)
        size = min(max(_BATCH // max(row, 1), 1), 1 << 16)
        for batch in file.iter_batches(size, columns=schema.names, use_threads=False):
            arrays = []
            for field in schema:
                array = plain(batch.column(field.name))
                try:
                    arrays.append(array if array.type == field.type else array.cast(field.type))
                except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                    raise DataError(
                        f"{table}: the column {field.name!r} is {array.type} here and {field.type} in all tables "
                        f"together, which does not hold every value ({error}); convert the tables one by one."
                    ) from error
            yield pa.RecordBatch.from_arrays(arrays, schema=schema)
