"""Where samples come from: MDS shards, WebDataset shards, or any map-style dataset."""

from typing import Any, Final

from torch.utils.data import IterableDataset

from infobatch_stream.errors import ConfigError
from infobatch_stream.planning.shape import Pool
from infobatch_stream.sources.base import Source, SourceType
from infobatch_stream.sources.map_style import MAP_STYLE
from infobatch_stream.sources.mds.source import MDS
from infobatch_stream.sources.webdataset.dataset import IndexedWebDataset
from infobatch_stream.sources.webdataset.source import WEBDATASET
from infobatch_stream.sources.webdataset.streamed import StreamedWebDataset

__all__ = ["IndexedWebDataset", "Pool", "Source", "StreamedWebDataset", "open_source"]

_TYPES: Final[list[SourceType]] = [WEBDATASET, MDS, MAP_STYLE]
"""All kinds of datasets that can be trained on. The first that accepts a dataset opens it."""


def open_source(dataset: Any, *, batch_size: int | None = None, shuffle: bool = True) -> Source:
    """The source behind ``dataset``: a StreamingDataset, an IndexedWebDataset, or a map-style dataset.

    batch_size, shuffle: of the loader; a dataset that was made with others is warned of.

    Raises ConfigError for anything else, and for a dataset without samples.
    """
    name = type(dataset).__name__
    kind = next((kind for kind in _TYPES if kind.accepts(dataset)), None)
    if kind is not None:
        source = kind.open(dataset, batch_size, shuffle)
        if source.num_samples < 1:
            raise ConfigError(f"the dataset {name} is empty; there is nothing to train on.")
        return source
    if isinstance(dataset, IterableDataset):
        raise ConfigError(
            f"{name} is an IterableDataset, which cannot be read by index. For WebDataset shards use "
            "infobatch_stream.IndexedWebDataset(urls); for MDS shards a streaming.StreamingDataset; anything else "
            "needs __len__ and __getitem__, or a conversion to shards (infobatch-stream convert)."
        )
    raise ConfigError(
        f"{name} has no __len__ and __getitem__. Give a StreamingDataset, an IndexedWebDataset, or a map-style "
        "dataset, one with both."
    )
