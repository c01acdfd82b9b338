"""Datasets of many kinds become MDS or WebDataset shards, as do the samples of a program."""

from infobatch_stream.convert.pipeline import Conversion, ShardSummary, convert, write_shards

__all__ = ["Conversion", "ShardSummary", "convert", "write_shards"]
