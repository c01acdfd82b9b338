"""Scores that a store begins with: of an earlier run, or of another model."""

from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from infobatch_stream.errors import ConfigError, StoreError
from infobatch_stream.score_stats import Summary
from infobatch_stream.store.header import SOURCE_LIMIT, Header, Seeded
from infobatch_stream.store.run_lock import RunLock
from infobatch_stream.store.staging import StagedStore

__all__ = ["digest_of", "from_store", "make_seeded", "seed_values"]

_BLOCK: Final = 1 << 20


def seed_values(scores: ArrayLike, num_samples: int | None = None) -> tuple[NDArray[np.float32], int]:
    """``scores``, float[N], as float32[N], NaN = not known; and how many are known.

    Raises ConfigError for what is not one number for each sample, infinite, or NaN for all.
    """
    given = np.asarray(scores)
    size = "N" if num_samples is None else f"{num_samples:,}"
    if given.dtype.kind not in "fiu" or given.ndim != 1 or given.size != (num_samples or given.size):
        raise ConfigError(
            f"the scores to begin with are {given.dtype}{list(given.shape)}; give one number for each of the samples, "
            f"float[{size}], NaN for one that is not known."
        )
    with np.errstate(over="ignore"):
        values = given.astype(np.float32)
    summary = Summary(values)
    if summary.infinite:
        first = int(np.flatnonzero(np.isinf(values))[0])
        raise ConfigError(
            f"of the scores to begin with {summary.infinite:,} are infinite in float32, as {given[first]} of sample "
            f"{first:,}. Give NaN for what is not known."
        )
    if not summary.count:
        raise ConfigError("of the scores to begin with none is known: all are NaN, so there is nothing to prune by.")
    return values, summary.count


def make_seeded(path: Path, scores: Any, fingerprint: str | None, source: str | None, replace: bool) -> Path:
    """Make the store of `ScoreStore.seed` at ``path``, and return that."""
    if (known := getattr(scores, "fingerprint", None)) is not None:  # a store
        if fingerprint not in (None, known):
            raise StoreError(
                f"{scores.path} holds the scores of another dataset ({known}) than the one that they are wanted for "
                f"({fingerprint})."
            )
        scores, described = from_store(scores)
        fingerprint, source = known, source or described
    values, count = seed_values(scores)
    source = source or "an array"
    if len(source) > SOURCE_LIMIT:
        raise ConfigError(
            f"source has {len(source):,} characters; say in at most {SOURCE_LIMIT:,} where scores are from."
        )
    RunLock.check_unused(path)
    header = Header(values.size, fingerprint or "", 0, "ready", Seeded(count, source))
    StagedStore(path, header, scores=values, replace=replace).place()
    return path


def from_store(store: Any) -> tuple[NDArray[np.float32], str]:
    """A copy of the scores of a `ScoreStore`, float32[N], and in words what they are."""
    scores = store.scores
    return np.where(np.isfinite(scores), scores, np.float32(np.nan)), f"{store.path.name} after {store.epoch} epochs"


def digest_of(scores: NDArray[np.float32]) -> str:
    """A short text that tells these scores, float32[N], from others; "" where none is known. All NaN are the same."""
    digest, known = blake2b(digest_size=16), False
    for start in range(0, scores.size, _BLOCK):
        part = np.where(np.isfinite(scores[start : start + _BLOCK]), scores[start : start + _BLOCK], np.float32(np.nan))
        known = known or not np.isnan(part).all()
        digest.update(part.tobytes())
    return digest.hexdigest() if known else ""
