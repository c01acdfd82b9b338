"""What ``save_to_disk`` of Hugging Face's datasets wrote: Arrow streams, read without that library."""

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from infobatch_stream.convert.readers.class_folders import some
from infobatch_stream.convert.readers.input_format import Found, InputFormat
from infobatch_stream.convert.readers.options import Options
from infobatch_stream.convert.readers.table import TableSet, require_pyarrow
from infobatch_stream.errors import DataError
from infobatch_stream.formats.schema import SampleSet

__all__ = ["SAVED_DATASET"]

_SPLIT = re.compile(r"\w[\w.-]*")  # it becomes a folder
_MOST = 1 << 26  # bytes of a description


def _open(src: Path, options: Options) -> list[SampleSet]:
    """The Dataset in the folder ``src``, or the splits of the DatasetDict. Raises ConfigError and DataError."""
    require_pyarrow()
    if not (src / "dataset_dict.json").is_file():
        return [_read_one("", src, options)]
    splits = _read(src / "dataset_dict.json").get("splits")
    if not isinstance(splits, list) or not splits or not all(_is_name(split) for split in splits):
        raise DataError(f"{src / 'dataset_dict.json'} names the splits {splits!r:.200}; it is damaged: save it again.")
    return [_read_one(split, src / split, options) for split in splits]


def _read_one(split: str, folder: Path, options: Options) -> TableSet:
    from infobatch_stream.convert.readers.arrow_file import read_stream

    files = _read(folder / "state.json").get("_data_files")
    names = [str(file.get("filename")) if isinstance(file, dict) else "" for file in files or ()]
    if not names or not all(_is_name(name) for name in names):
        raise DataError(f"{folder / 'state.json'} names the files {files!r:.200}; it is damaged: save it again.")
    paths = [folder / name for name in names]
    origins = []
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path} is missing; save the dataset again.")
        origins.append((path, sum(batch.num_rows for batch in read_stream(path))))
    return TableSet(split, [str(path) for path in paths], origins, options, state=folder / "state.json")


def _is_name(name: object) -> bool:
    return isinstance(name, str) and _SPLIT.fullmatch(name) is not None


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MOST:
            raise ValueError(f"{path.stat().st_size:,} bytes")
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise TypeError(f"a {type(content).__name__}")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is no description of a dataset ({error}); save it again.") from error
    return content


def _find(src: Path, names: Sequence[str]) -> Found | None:
    saved = sorted({"dataset_dict.json", "state.json"}.intersection(names))
    return Found(f"a saved Hugging Face dataset ({some(saved)})", partial(_open, src)) if saved else None


SAVED_DATASET = InputFormat("what `save_to_disk` of Hugging Face's datasets wrote", _find, owns_folders=True)
