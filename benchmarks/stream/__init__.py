"""Speed of the loader, from shards to batches."""
