"""What is wrong with shards, and where."""
