"""From a plan to batches: what worker processes do, and which shards are downloaded for them in advance."""
