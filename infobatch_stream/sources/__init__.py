"""Where samples come from: MDS shards, WebDataset shards, or any map-style dataset."""

import sys
from typing import Any

from torch.utils.data import IterableDataset

from infobatch_stream.errors import ConfigError
from infobatch_stream.planning.shape import Pool
from infobatch_stream.sources.base import Source
from infobatch_stream.sources.map_style import MapStyleSource
from infobatch_stream.sources.mds.source import MdsSource
from infobatch_stream.sources.webdataset.dataset import IndexedWebDataset, WdsSource
from infobatch_stream.sources.webdataset.streamed import StreamedWebDataset

__all__ = ["IndexedWebDataset", "Pool", "Source", "StreamedWebDataset", "open_source"]


def open_source(dataset: Any, *, batch_size: int | None = None, shuffle: bool = True) -> Source:
    """The source behind ``dataset``: a StreamingDataset, an IndexedWebDataset, or a map-style dataset.

    batch_size, shuffle: of the loader; a dataset that was made with others is warned of.

    Raises ConfigError for anything else, and for a dataset without samples.
    """
    source = _source(dataset, batch_size, shuffle)
    if source.num_samples < 1:
        raise ConfigError(f"the dataset {type(dataset).__name__} is empty; there is nothing to train on.")
    return source


def _source(dataset: Any, batch_size: int | None, shuffle: bool) -> Source:
    if isinstance(dataset, IndexedWebDataset):
        return WdsSource(dataset)
    # Importing streaming takes seconds; where it is not imported, nothing is a StreamingDataset.
    streaming = sys.modules.get("streaming.base.dataset")
    if streaming is not None and isinstance(dataset, streaming.StreamingDataset):
        return MdsSource(dataset, batch_size, shuffle)
    name = type(dataset).__name__
    if isinstance(dataset, IterableDataset):
        raise ConfigError(
            f"{name} is an IterableDataset, which cannot be read by index. For WebDataset shards use "
            "infobatch_stream.IndexedWebDataset(urls); for MDS shards a streaming.StreamingDataset; anything else "
            "needs __len__ and __getitem__, or a conversion to shards (infobatch-stream convert)."
        )
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ConfigError(
            f"{name} has no __len__ and __getitem__. Give a StreamingDataset, an IndexedWebDataset, or a map-style "
            "dataset, one with both."
        )
    return MapStyleSource(dataset)
