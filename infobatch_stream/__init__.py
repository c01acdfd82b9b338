"""InfoBatch (ICLR 2024) for datasets too large for one file: MDS and WebDataset shards, and map-style data."""

from infobatch_stream.augmentation import augmentation_rng
from infobatch_stream.errors import (
    ConfigError,
    DataError,
    InfoBatchError,
    LostRanksError,
    MissingExtraError,
    OutOfStepError,
    StoreError,
)
from infobatch_stream.loader import InfoBatchLoader
from infobatch_stream.picks import Picks
from infobatch_stream.policies.budget import BudgetPruning
from infobatch_stream.policies.kakurenbo import KakurenboPruning
from infobatch_stream.policies.order import OrderPruning
from infobatch_stream.policies.pruning import FullData, QuantilePruning, SoftPruning
from infobatch_stream.policies.seta import SetaPruning
from infobatch_stream.sources import IndexedWebDataset, StreamedWebDataset
from infobatch_stream.store.score_store import ScoreStore

__all__ = [
    "InfoBatchLoader",
    "IndexedWebDataset",
    "StreamedWebDataset",
    "ScoreStore",
    "Picks",
    "augmentation_rng",
    "SoftPruning",
    "QuantilePruning",
    "BudgetPruning",
    "FullData",
    "SetaPruning",
    "OrderPruning",
    "KakurenboPruning",
    "InfoBatchError",
    "ConfigError",
    "DataError",
    "StoreError",
    "OutOfStepError",
    "LostRanksError",
    "MissingExtraError",
]
