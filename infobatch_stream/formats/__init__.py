"""What shards and their indexes are, parsed in one place for the loader, the converter, the verifier and the report."""
