"""Samples of MDS shards, through the user's StreamingDataset."""
