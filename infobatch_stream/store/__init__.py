"""The score store: every sample's loss, on disk, memory-mapped, shared by the ranks of a node."""

from infobatch_stream.store.score_store import ScoreStore

__all__ = ["ScoreStore"]
