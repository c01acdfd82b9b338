"""Arrow streams, mapped into memory."""

from pathlib import Path

import pyarrow as pa

from infobatch_stream.errors import DataError

__all__ = ["read_stream"]


def read_stream(path: str | Path) -> list[pa.RecordBatch]:
    """The batches of the stream in a file, of which nothing is in memory yet. Raises DataError and OSError."""
    try:
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
            return [batch for batch in reader if batch.num_rows]
    except (pa.ArrowException, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(f"{path} is no Arrow stream, or damaged ({error}); write it again.") from error
