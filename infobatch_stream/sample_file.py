"""A file with a value for each sample: a NumPy array, or a column of a Parquet table."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.errors import ConfigError, MissingExtraError

__all__ = ["read_sample_file"]

_INDEX = "index"  # the column that says of which sample a row is, as tables are exported


def read_sample_file(
    name: str, given: str | os.PathLike[str], num_samples: int, *, missing: float | bool | None, column: str = ""
) -> NDArray[Any]:
    """The values of a file ``.npy`` as they are, or of ``table.parquet:column``.

    The rows of a table belong to the samples that its column ``index`` names; without one they are as they are.

    Args:
        name: Of the argument, for errors.
        given: The file. Without a column it is ``column``, or the only one.
        num_samples: N.
        missing: The value of a sample that has no row; None: that is an error. NaN is that of an empty row, too.
        column: See given.

    Returns:
        [N] where the table has a column ``index``, else what there is; any dtype.

    Raises:
        ConfigError: For what cannot be read, or cannot be of samples 0..N-1, each once.
    """
    path, _, named = str(Path(given).expanduser()).partition(".parquet:")
    file = Path(f"{path}.parquet" if named else path)
    try:
        if file.suffix == ".npy":
            values: NDArray[Any] = np.load(file, allow_pickle=False)
            return values
        if file.suffix == ".parquet":
            return _column(name, file, named or _default(file, column), num_samples, missing)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}={str(given)!r} cannot be read: {error}") from error
    raise ConfigError(f"{name}={str(given)!r}: give an array, a file .npy, or 'table.parquet:column'.")


def _names(file: Path) -> list[str]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError.of("pyarrow", "tools") from error
    names: list[str] = pyarrow.parquet.read_schema(file).names
    return names


def _default(file: Path, column: str) -> str:
    """``column`` if the table has it, else the only one that it has beside its index; "" if there are more."""
    names = _names(file)
    others = [other for other in names if other != _INDEX]
    return column if column in names else others[0] if len(others) == 1 else ""


def _column(name: str, file: Path, column: str, num_samples: int, missing: float | bool | None) -> NDArray[Any]:
    import pyarrow.parquet

    names = _names(file)
    if column not in names:
        raise ConfigError(f"{name}: {file} has the columns {', '.join(names)}; name one, as '{file}:{names[-1]}'.")
    table = pyarrow.parquet.read_table(file, columns=sorted({column} | ({_INDEX} & set(names))))
    found = table[column].combine_chunks()
    if found.null_count and not (isinstance(missing, float) and math.isnan(missing)):
        raise ConfigError(f"{name}: the column {column} of {file} has {found.null_count} empty rows; fill them first.")
    values: NDArray[Any] = found.to_numpy(zero_copy_only=False)
    if column == _INDEX or _INDEX not in names:
        return values
    index = table[_INDEX].to_numpy()
    _check_index(f"{name}: the column {_INDEX} of {file}", index, num_samples)
    if missing is None and index.size < num_samples:
        raise ConfigError(f"{name}: {file} has no row for {num_samples - index.size:,} of {num_samples:,} samples.")
    kind = np.float64 if isinstance(missing, float) and values.dtype.kind in "iu" else values.dtype
    whole = np.full(num_samples, missing, dtype=kind) if missing is not None else np.empty(num_samples, dtype=kind)
    whole[index] = values
    return whole


def _check_index(what: str, index: NDArray[Any], num_samples: int) -> None:
    if index.dtype.kind not in "iu":
        raise ConfigError(f"{what} is {index.dtype}; it names samples, by whole numbers.")
    outside = (index < 0) | (index >= num_samples)
    if outside.any():
        raise ConfigError(f"{what} has {index[outside][0]}; the dataset has the samples 0 to {num_samples - 1:,}.")
    order, times = np.unique(index, return_counts=True)
    if (times > 1).any():
        raise ConfigError(f"{what} has sample {order[times > 1][0]} more than once.")
