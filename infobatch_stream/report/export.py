"""The scores as a table, for pandas, polars, DuckDB: a row for each sample."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

from infobatch_stream._files import whole_file
from infobatch_stream.errors import ConfigError
from infobatch_stream.report.dataset import ShardReader, open_shards_of
from infobatch_stream.report.galleries import Highest
from infobatch_stream.report.previews import previews
from infobatch_stream.report.snapshot import Snapshot

__all__ = ["export", "staying_hard"]

_BLOCK: Final = 1 << 18  # rows that are made at once
_NEVER: Final = -1


def export(
    store: Path,
    out: Path,
    *,
    format: Literal["parquet", "csv"],
    dataset: str | None = None,
    cache: Path | None = None,
    hardest: int | None = None,
    on_progress: Callable[[int, int], None] = lambda total, more: None,
) -> int:
    """Write what a score store holds as a table, which appears at ``out`` when it is whole.

    Columns: index, score (empty: never seen), trained (times), last (epoch, empty: never), mean_loss (of all epochs,
    where losses were kept); with ``dataset`` also shard, row and key.

    Args:
        store: The folder of the score store.
        out: The file.
        format: Of the file.
        dataset: The shards of the store's samples, as for `open_shards`.
        cache: Folder for shards that are elsewhere, as for `open_shards`.
        hardest: Only so many samples, the hardest by `staying_hard` first; with ``dataset`` also their labels and
            names, as a report shows them.
        on_progress: Called after each block of rows, with the number of all and of those in the block.

    Returns:
        The number of rows.

    Raises:
        StoreError: For a store that is missing, or of another dataset.
        ConfigError: For a number or a dataset that cannot be.
        DataError: For shards that are damaged or out of reach.
    """
    with whole_file(out) as new, new.open("wb") as file:
        snapshot = Snapshot.take(store)
        shards = open_shards_of(snapshot.store, dataset, cache)
        hardness = staying_hard(snapshot)
        order = range(snapshot.scores.size) if hardest is None else _highest(hardness, hardest)
        writer: Any = None
        for start in range(0, max(len(order), 1), _BLOCK):
            chosen = np.asarray(order[start : start + _BLOCK], np.int64)
            table = _table(snapshot, shards, hardness, chosen)
            if shards is not None and hardest is not None:
                table = _with_names(table, shards, chosen)
            if writer is None:
                writer = _writer(format, file, table.schema)
            writer.write_table(table)
            on_progress(len(order), table.num_rows)
        writer.close()
    return len(order)


def staying_hard(snapshot: Snapshot) -> NDArray[np.float64]:
    """float64[N]: the mean of the losses of all epochs in which a sample was trained on, where they were kept.

    Else its score, the last of them. NaN for a sample that was never seen. A wrong label is learned late, if at all, so
    it is the mean that tells it from a sample that was only unlucky in the last epoch.
    """
    if snapshot.losses is None:
        return snapshot.scores.astype(np.float64)
    return np.concatenate([part.mean for part in snapshot.losses.moments()])


def _highest(values: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    if count < 1:
        raise ConfigError(f"the hardest {count} samples: give a number of at least 1.")
    found = Highest(count)
    found.add(0, values)
    return found.index


def _table(
    snapshot: Snapshot, shards: ShardReader | None, hardness: NDArray[np.float64], index: NDArray[np.int64]
) -> pa.Table:
    columns: dict[str, Any] = {"index": index, "score": _nullable(snapshot.scores[index])}
    if snapshot.training is not None:
        last = snapshot.training.last[index]
        columns["trained"] = snapshot.training.times[index]
        columns["last"] = pa.array(last, mask=last == _NEVER)
    if snapshot.losses is not None:
        columns["mean_loss"] = _nullable(hardness[index])
    if shards is not None:
        ends = np.array(shards.ends)
        shard = np.searchsorted(ends, index, "right")
        columns["shard"] = pa.DictionaryArray.from_arrays(pa.array(shard.astype(np.int32)), pa.array(shards.names))
        columns["row"] = index - np.concatenate([[0], ends])[shard]
        keys = shards.keys(index)
        if keys is not None:
            columns["key"] = keys
    return pa.table(columns)


def _with_names(table: pa.Table, shards: ShardReader, index: NDArray[np.int64]) -> pa.Table:
    """``table`` with label and name, empty where there is none or the sample cannot be read."""
    seen = previews(shards, index, pictures=False)
    for column in ("label", "name"):
        texts = [getattr(seen[number], column) or None for number in index.tolist()]
        table = table.append_column(column, pa.array(texts, pa.string()))
    return table


def _nullable(values: NDArray[np.floating[Any]]) -> pa.Array:
    return pa.array(values, mask=np.isnan(values))


def _writer(format: str, file: Any, schema: pa.Schema) -> Any:
    if format == "parquet":
        return pyarrow.parquet.ParquetWriter(file, schema, compression="zstd")
    return pyarrow.csv.CSVWriter(file, schema)
