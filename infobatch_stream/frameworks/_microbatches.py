"""The parts of a batch between two steps of the optimizer, each with its picks, as Composer's Trainer asks for them."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from torch import Tensor

from infobatch_stream import ConfigError, InfoBatchLoader, Picks

__all__ = ["Part", "count", "rows_of", "split"]

Part = tuple[Any, Picks, bool, float]
"""Data, picks, whether it is the first of its batch, and its share of the loss of that."""


def split(
    batch: tuple[Any, Picks], size: int | float, loader: InfoBatchLoader, rows: Callable[[Any, slice], Any]
) -> list[Part]:
    """Parts of at most ``size`` rows, equally many on all ranks, as FSDP needs it.

    Args:
        batch: As the loader gives it.
        size: Rows of a part.
        loader: Of the batch.
        rows: (data, slice) -> the data of these rows.

    Raises:
        ConfigError: For a size that is a share of a sample.
    """
    if not isinstance(size, int):
        raise ConfigError(f"device_train_microbatch_size={size}: the loader's samples cannot be cut into parts.")
    (data, picks), stats = batch, loader.stats
    largest = len(picks)
    if loader.constant_steps:  # a rank may have a sample less than another
        largest = max(largest, -int(-stats["kept"] // (stats["steps"] * loader.processes)))
    parts = min(-(-largest // size), len(picks))
    ends = [len(picks) * part // parts for part in range(parts + 1)]
    found = []
    for start, end in pairwise(ends):
        part = slice(start, end)
        share = 1.0 if loader.constant_steps else (end - start) / len(picks)
        found.append((rows(data, part) if parts > 1 else data, picks[part], start == 0, share))
    return found


def count(batch: Any, of: Callable[[Picks], int]) -> int:
    """What Composer counts of a batch; of parts 1 in all, since it weighs their losses by that, which are weighted."""
    if not isinstance(batch, tuple) or len(batch) < 2 or not isinstance(batch[1], Picks):
        return 1  # the data of a microbatch
    return of(batch[1]) if len(batch) == 2 else int(batch[2])


def rows_of(data: Any, rows: slice) -> Any:
    """These rows of a batch: a tensor, a dict, a tuple or a list of columns, or a list of numbers or strings.

    Raises ConfigError for what cannot be split.
    """
    if isinstance(data, Mapping):
        return {key: part if isinstance(part, int | float | str) else rows_of(part, rows) for key, part in data.items()}
    if isinstance(data, tuple | list) and data and not isinstance(data[0], int | float | str):
        return [part[rows] if isinstance(part, list | tuple) else rows_of(part, rows) for part in data]
    if isinstance(data, Tensor | tuple | list):
        return data[rows]
    raise ConfigError(
        f"the data of a batch holds a {type(data).__name__}, which cannot be split into microbatches. Give "
        "InfoBatchCallback(rows=), a function of the data and a slice; or leave device_train_microbatch_size out."
    )
