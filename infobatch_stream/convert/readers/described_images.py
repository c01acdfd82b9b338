"""Images with a table beside them: how they are found and opened, without importing pyarrow before it is needed."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from infobatch_stream.convert.readers.class_folders import is_split, metadata_of, some, subfolders
from infobatch_stream.convert.readers.input_format import Found, InputFormat
from infobatch_stream.convert.readers.options import Options
from infobatch_stream.convert.readers.table import require_pyarrow
from infobatch_stream.errors import ConfigError
from infobatch_stream.formats.schema import SampleSet

__all__ = ["DESCRIBED_IMAGES", "read_splits"]


def _find(src: Path, names: Sequence[str]) -> Found | None:
    table = metadata_of(src)
    return Found(f"images with a table ({table.name})", partial(_read, {"": table})) if table else None


def read_splits(src: Path, options: Options) -> list[SampleSet]:
    """The splits in ``src`` that have images with a table of their own; nothing where there are none."""
    tables = {name: metadata_of(src / name) for name in subfolders(src) if is_split(name)}
    found = {name: table for name, table in tables.items() if table is not None}
    missing = [name for name in subfolders(src) if name not in found]
    if found and missing:
        raise ConfigError(
            f"{src} holds images with a metadata table in {some(list(found))}, and none in {some(missing)}; convert "
            f"each that has one on its own, e.g. infobatch-stream convert {src / next(iter(found))} DST --format ..."
        )
    return _read(found, options)


def _read(tables: Mapping[str, Path], options: Options) -> list[SampleSet]:
    """The rows of ``tables`` with the images beside them: a set for each split."""
    require_pyarrow()
    from infobatch_stream.convert.readers.image_metadata import MetadataSet
    from infobatch_stream.convert.readers.text_files import TextFiles

    texts = TextFiles(list(tables.values()))
    return [MetadataSet(name, table, options, texts) for name, table in tables.items()]


DESCRIBED_IMAGES = InputFormat(
    "images with a metadata.csv, .jsonl or .parquet that has their file_name", _find, owns_folders=True
)
