"""From a plan to batches: what worker processes do, and what is brought for them ahead of time."""
