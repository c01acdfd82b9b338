"""The scores that a run begins with, as users give them: another store, an array, or a file with a column."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from infobatch_stream.errors import StoreError
from infobatch_stream.sample_file import read_sample_file
from infobatch_stream.store.header import Seeded
from infobatch_stream.store.score_store import ScoreStore
from infobatch_stream.store.seed import digest_of, from_store, seed_values

__all__ = ["GivenScores", "InitialScores"]

GivenScores = ArrayLike | str | os.PathLike[str] | ScoreStore


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
        if isinstance(given, str | os.PathLike) and Path(given).expanduser().is_dir():
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
            size = dataset.num_samples
            scores = read_sample_file("the scores to begin with", given, size, missing=math.nan, column="score")
            source = Path(given).name
        else:
            scores, source = given, "an array"
        values, known = seed_values(scores, dataset.num_samples)
        return cls(values, Seeded(known, source))

    @property
    def digest(self) -> str:
        """A short text that is another for other scores."""
        return digest_of(self.values)
