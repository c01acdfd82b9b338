"""What can be converted, read by position."""

from .images import IdxPair, ImageTree, read_idx, read_source

__all__ = ["IdxPair", "ImageTree", "read_idx", "read_source"]
