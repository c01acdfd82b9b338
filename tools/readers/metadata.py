"""Images with a table beside them that names each and tells more of it, as Hugging Face's imagefolder takes them."""

import os
from collections.abc import Mapping, Set
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from infobatch_stream.errors import ConfigError, DataError

from .class_folders import images_below, some
from .columns import Options
from .spool import Spool
from .streams import read_stream
from .table import TableSet
from .temporary import temporary_folder
from .text_files import TextFiles

__all__ = ["MetadataSet"]

_NAME = "file_name"
_FILE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # as kinds of columns know it


class MetadataSet(TableSet):
    """The rows of a ``metadata.csv``, ``.jsonl`` or ``.parquet``, with the image that ``file_name`` means.

    That column becomes ``image``, and one as ``mask_file_name`` becomes ``mask``; paths are below the folder of the
    table. Images that no row names are left out, with a note. Raises ConfigError and DataError.
    """

    in_files = True

    def __init__(self, name: str, table: Path, options: Options, texts: TextFiles | None = None) -> None:
        """``name``: of the split, "" for none. ``texts``: see `Spool`."""
        spool = Spool([table], _own(options), texts)
        batches, notes = read_stream(spool.path), spool.notes
        if not batches:
            raise DataError(f"{table} has no rows; there is nothing to convert.")
        columns = _image_columns(table, batches[0].schema)
        stream = Path(temporary_folder(self), "rows.arrow")
        named = [_with_files(batch, columns) for batch in batches]
        with pa.OSFile(str(stream), "wb") as sink, pa.ipc.new_stream(sink, named[0].schema) as writer:
            for batch in named:
                writer.write_batch(batch)
        paths = [path for batch in batches for column in columns for path in batch.column(column).to_pylist()]
        there = set(images_below(table.parent))
        if not options.skip:
            _check_there(table, columns, paths, there)
        rows = sum(batch.num_rows for batch in batches)
        options = _with_json(options, spool.as_json)
        super().__init__(name, [str(stream)], [(table, rows)], options, misfits=spool.misfits)
        left = sorted(there.difference(os.path.normpath(path) for path in paths if path))
        if left:
            notes = [*notes, f"{table} has no row for {len(left):,} images beside it, which are left out: {some(left)}"]
        self.notes = [*self.notes, *notes]


def _own(options: Options) -> Options:
    """``options`` by the names that columns have in the table."""
    own = options.columns or {}
    encodings, fill = (
        {own.get(name, name): told for name, told in (given or {}).items()}
        for given in (options.encodings, options.fill)
    )
    return Options(encodings=encodings, skip=options.skip, fill=fill)


def _with_json(options: Options, as_json: Set[str]) -> Options:
    """``options`` with the encoding of the columns ``as_json`` of a table."""
    columns = options.columns or {name: name for name in as_json}
    found = {name: "json" for name, own in columns.items() if own in as_json}
    return replace(options, encodings={**found, **(options.encodings or {})})


def _image_columns(table: Path, schema: pa.Schema) -> Mapping[str, str]:
    """The columns of paths -> what is called so of their images. Raises ConfigError."""
    texts = [field.name for field in schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)]
    found = {name: name.removesuffix(_NAME).removesuffix("_") or "image" for name in texts if name.endswith(_NAME)}
    found = {name: image for name, image in found.items() if name in (_NAME, f"{image}_{_NAME}")}
    if not found:
        raise ConfigError(
            f"{table} lies beside images, and has no column {_NAME!r} of text with their paths, only "
            f"{', '.join(map(repr, schema.names[:50]))}. Add one (or one as 'mask_{_NAME}'), or name the table to "
            f"convert it without the images ({table})."
        )
    names = [found.get(name, name) for name in schema.names]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"{table} has two columns that are called {twice!r}, of which one holds paths; rename one.")
    return found


def _with_files(batch: pa.RecordBatch, columns: Mapping[str, str]) -> pa.RecordBatch:
    """``batch`` with files in the place of their paths."""
    arrays = []
    for name in batch.schema.names:
        array = batch.column(name)
        if name in columns:
            empty = pa.nulls(len(array), pa.binary())
            array = pa.StructArray.from_arrays([empty, array.cast(pa.string())], fields=list(_FILE))
        arrays.append(array)
    return pa.RecordBatch.from_arrays(arrays, [columns.get(name, name) for name in batch.schema.names])


def _check_there(table: Path, columns: Mapping[str, str], paths: list[str | None], there: set[str]) -> None:
    """Raise DataError for rows without a path, or whose image is not there."""
    missing = [
        path
        for path in paths
        if not path or (os.path.normpath(path) not in there and not (table.parent / path).is_file())
    ]
    if missing:
        what = repr(missing[0]) if missing[0] else "an empty path"
        raise DataError(
            f"{table}: {len(missing):,} of {len(paths):,} images that it names ({', '.join(columns)}) are not there, "
            f"the first {what}; put them there, remove the rows, or leave them out (--on-error skip)."
        )
