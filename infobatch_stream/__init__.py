"""InfoBatch for datasets too large for one file."""
