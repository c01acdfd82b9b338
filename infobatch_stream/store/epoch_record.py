"""An epoch that is over: what its plan was, and what the scores were that it left."""

from dataclasses import dataclass, field, fields
from typing import Final, Self, cast

import numpy as np
from numpy.typing import NDArray

from infobatch_stream.score_stats import Summary

__all__ = ["BINS", "EDGES", "SHARES", "Epoch"]

SHARES: Final = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
"""Shares of the samples, of whose scores `Epoch.quantiles` are."""

BINS: Final = 256
_LOWEST: Final = (127 - 20) << 3  # 2^-20 by the upper 12 bits of a float32: sign, exponent, three bits of the fraction
_NEGATIVE: Final = 1 << 15
_INFINITE: Final = 0x7F80

EDGES: Final[NDArray[np.float32]] = (np.arange(_LOWEST, _LOWEST + BINS + 1, dtype=np.uint32) << np.uint32(20)).view(
    np.float32
)
"""float32[257]: the edges of the bins of `Epoch.histogram`, 8 to a doubling, from 2^-20 to 2^12.

What lies beyond them is counted in the first and the last bin.
"""


@dataclass(frozen=True)
class Epoch:
    """An epoch that is over.

    entries: samples that it drew from; kept: of these; trained: in the steps that were made. threshold: of its plan,
    NaN without one. seconds: it took. mean, quantiles (float32[11], at SHARES, to 1 %), histogram (int64[256], between
    EDGES): of the scores that it left.
    """

    number: int
    entries: int
    kept: int
    trained: int
    threshold: float
    seconds: float
    mean: float = float("nan")
    quantiles: NDArray[np.float32] = field(default_factory=lambda: np.full(len(SHARES), np.nan, np.float32))
    histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def describing(self, scores: NDArray[np.float32]) -> Self:
        """This epoch, with mean, quantiles and histogram of ``scores``, float32[N], which it left."""
        summary = Summary(scores)
        counts, _ = summary.tally()
        changes = {"mean": summary.mean, "quantiles": _quantiles(counts), "histogram": _histogram(counts)}
        return type(self)(**({one.name: getattr(self, one.name) for one in fields(self)} | changes))


def _ascending(counts: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Scores from the lowest up, each in the middle of an upper half of bits, and how often they occur."""
    order = np.concatenate([np.arange(_NEGATIVE + _INFINITE - 1, _NEGATIVE - 1, -1), np.arange(_INFINITE)])
    values = (order.astype(np.uint32) << np.uint32(16) | np.uint32(0x8000)).view(np.float32)
    return values, counts[order]


def _quantiles(counts: NDArray[np.int64]) -> NDArray[np.float32]:
    values, counts = _ascending(counts)
    ends = np.cumsum(counts)
    if not ends[-1]:
        return np.full(len(SHARES), np.nan, np.float32)
    ranks = np.minimum(np.floor(np.array(SHARES) * ends[-1]), ends[-1] - 1)
    return cast(NDArray[np.float32], values[ends.searchsorted(ranks, "right")])


def _histogram(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    eighths = counts[:_INFINITE].reshape(-1, 16).sum(1)  # by their upper 12 bits
    bins = eighths[_LOWEST : _LOWEST + BINS].copy()
    bins[0] += eighths[:_LOWEST].sum() + counts[_NEGATIVE : _NEGATIVE + _INFINITE].sum()
    bins[-1] += eighths[_LOWEST + BINS :].sum()
    return cast(NDArray[np.int64], bins)
