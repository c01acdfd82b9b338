"""Checks of shards: what is wrong, and where."""
