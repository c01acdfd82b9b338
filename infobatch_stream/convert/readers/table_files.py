"""Files of tables, and the splits that their names tell."""

import re
from collections.abc import Mapping, Sequence, Set
from functools import partial
from pathlib import Path

from infobatch_stream.convert.readers.class_folders import is_image_file, metadata_of, some
from infobatch_stream.convert.readers.input_format import Found, InputFormat
from infobatch_stream.convert.readers.options import Options
from infobatch_stream.convert.readers.table import TableSet, is_table, require_pyarrow
from infobatch_stream.formats.schema import SampleSet

__all__ = ["TABLES"]

_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "dev", "test", "testing"})


def _read(tables: Sequence[Path], options: Options) -> list[SampleSet]:
    """The rows of Parquet or of CSV files, unpacked into a temporary folder. Raises ConfigError and DataError.

    Files that are named as those of the Hugging Face hub, ``train-00000-of-00002.parquet``, or as splits alone,
    ``train.csv`` and ``test.csv``, are a set per split. A column of CSV files has one type in all of them.
    """
    require_pyarrow()
    from infobatch_stream.convert.readers.arrow_file import ArrowFile
    from infobatch_stream.convert.readers.text_files import TextFiles

    sets: list[SampleSet] = []
    texts = TextFiles(tables)
    for split, files in _splits(tables).items():
        file = ArrowFile(files, options, texts)
        origins = list(zip(files, file.rows, strict=True))
        sets.append(TableSet(split, [file.path], origins, options, file))
    there = {*sets[0].columns, *(options.columns or {}).values()}
    sets[0].notes = [*sets[0].notes, *_folder_notes(tables, there)]
    return sets


def _folder_notes(tables: Sequence[Path], there: Set[str]) -> list[str]:
    """A note where folders are called as Hive calls them, ``label=0``, after a column that is not ``there``."""
    folders = {name for table in tables for name in table.parts[:-1] if re.fullmatch(r"[^=]+=.*", name)}
    found = sorted(name for name in folders if name.partition("=")[0] not in there)
    if not found:
        return []
    return [
        f"the folders {some(found)} are not taken as columns; if they are some, write the tables again with these "
        "columns in them, as pyarrow.dataset.dataset(SRC, partitioning='hive') reads them"
    ]


def _splits(tables: Sequence[Path]) -> Mapping[str, list[Path]]:
    splits: dict[str, list[Path]] = {}
    for table in tables:
        name = table.name.partition(".")[0]
        match = re.fullmatch(r"(\w[\w.-]*)-\d{5}-of-\d{5}(-\w+)?\.parquet", table.name)
        splits.setdefault(match[1] if match else name if name.lower() in _SPLITS else "", []).append(table)
    return {"": list(tables)} if len(splits) < 2 or "" in splits else splits


def _find(src: Path, names: Sequence[str]) -> Found | None:
    metadata = metadata_of(src)
    tables = [name for name in names if is_table(name) and (metadata is None or name != metadata.name)]
    images = list(filter(is_image_file, names))
    return Found(f"tables ({some(tables)})", partial(_open, src, tables, images)) if tables else None


def _open(src: Path, tables: list[str], images: list[str], options: Options) -> list[SampleSet]:
    """The tables in ``src``, with a note on the ``images`` beside them."""
    sets = _read([src / name for name in tables], options)
    if images:
        note = (
            f"{src}: {len(images):,} images beside the tables are left out ({some(images)}). A table that tells of "
            "images is called metadata.csv (.jsonl, .parquet), and has their names in a column file_name"
        )
        sets[0].notes = [*sets[0].notes, note]
    return sets


TABLES = InputFormat(
    "tables, SRC/*.parquet or SRC/*.csv[.gz]", _find, is_table,
    lambda names, options: _read(list(map(Path, names)), options),
)  # fmt: skip
