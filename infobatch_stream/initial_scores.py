"""The scores that a run begins with, as users give them: another store, an array, or a file with a column."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from infobatch_stream.errors import ConfigError, MissingExtraError, StoreError
from infobatch_stream.store.header import Seeded
from infobatch_stream.store.score_store import ScoreStore
from infobatch_stream.store.seed import digest_of, from_store, seed_values

__all__ = ["GivenScores", "InitialScores"]

GivenScores = ArrayLike | str | os.PathLike[str] | ScoreStore

_INDEX = "index"


class Dataset(Protocol):
    """What is asked of the dataset: a source or a score store has it."""

    @property
    def num_samples(self) -> int:
        """N."""

    @property
    def fingerprint(self) -> str:
        """As of `Source`."""


@dataclass(frozen=True, eq=False)
class InitialScores:
    """Scores before the first epoch. values: float32[N], NaN = not known."""

    values: NDArray[np.float32]
    seeded: Seeded

    @classmethod
    def of(cls, given: GivenScores, dataset: "Dataset") -> Self:
        """What a user gives.

        Args:
            given: A store of the dataset or its path; float[N]; a file ``.npy``; or ``table.parquet:column``, whose
                rows belong to the samples that its column ``index`` names, if there is one, else to all in order.
            dataset: Of whose samples they shall be.

        Returns:
            The scores, and where they are from.

        Raises:
            ConfigError: For what is not one finite number, or NaN, for each sample.
            StoreError: For a store of another dataset, or one that cannot be read.
        """
        if isinstance(given, str | os.PathLike) and Path(given).is_dir():
            given = ScoreStore.open(given, mode="r")
        if isinstance(given, ScoreStore):
            if (given.num_samples, given.fingerprint) != (dataset.num_samples, dataset.fingerprint):
                raise StoreError(
                    f"{given.path} holds the scores of another dataset: {given.num_samples:,} samples "
                    f"({given.fingerprint}), while this one has {dataset.num_samples:,} ({dataset.fingerprint})."
                )
            scores: Any
            scores, source = from_store(given)
        elif isinstance(given, str | os.PathLike):
            scores, source = _read(os.fspath(given), dataset.num_samples), Path(given).name
        else:
            scores, source = given, "an array"
        values, known = seed_values(scores, dataset.num_samples)
        return cls(values, Seeded(known, source))

    @property
    def digest(self) -> str:
        """A short text that is another for other scores."""
        return digest_of(self.values)


def _read(given: str, num_samples: int) -> NDArray[Any]:
    path, _, column = given.partition(".parquet:")
    file = Path(f"{path}.parquet" if column else path)
    try:
        if file.suffix == ".npy":
            values: NDArray[Any] = np.load(file, allow_pickle=False)
            return values
        if file.suffix == ".parquet":
            return _column(file, column, num_samples)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"{given} cannot be read: {error}") from error
    raise ConfigError(f"{given}: scores are read from a score store, a file .npy, or 'table.parquet:column'.")


def _column(file: Path, column: str, num_samples: int) -> NDArray[Any]:
    """float64[N] by the column ``index``, NaN where there is no row; without it, the column as it is.

    column: "" for ``score``, or the only one.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError.of("pyarrow", "tools") from error
    names = pyarrow.parquet.read_schema(file).names
    others = [name for name in names if name != _INDEX]
    if not column and ("score" in names or len(others) == 1):  # as a store is exported
        column = "score" if "score" in names else others[0]
    if column not in names:
        raise ConfigError(f"{file} has the columns {', '.join(names)}; name one of them, as '{file}:{names[-1]}'.")
    table = pyarrow.parquet.read_table(file, columns=sorted({column} | ({_INDEX} & set(names))))
    found: NDArray[Any] = table[column].to_numpy()
    if _INDEX not in names:
        return found
    index = table[_INDEX].to_numpy()
    if index.dtype.kind not in "iu":
        raise ConfigError(f"the column {_INDEX} of {file} is {index.dtype}; it names samples, by whole numbers.")
    outside = (index < 0) | (index >= num_samples)
    if outside.any():
        raise ConfigError(
            f"the column {_INDEX} of {file} has {index[outside][0]}; the dataset has the samples 0 to "
            f"{num_samples - 1:,}."
        )
    order, times = np.unique(index, return_counts=True)
    if (times > 1).any():
        raise ConfigError(f"the column {_INDEX} of {file} has sample {order[times > 1][0]} more than once.")
    if found.dtype.kind not in "fiu":
        raise ConfigError(f"the column {column} of {file} is {found.dtype}; scores are numbers.")
    scores = np.full(num_samples, np.nan)
    scores[index] = found
    return scores
