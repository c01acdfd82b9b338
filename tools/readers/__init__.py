"""What can be converted, read by position."""

from .cifar import CifarSplit
from .idx import IdxPair, read_idx
from .images import ImageTree, read_images
from .mds import MdsSet
from .source import read_source
from .table import TableSet
from .tars import TarSet

__all__ = [
    "CifarSplit", "IdxPair", "ImageTree", "MdsSet", "TableSet", "TarSet", "read_idx", "read_images", "read_source",
]  # fmt: skip
