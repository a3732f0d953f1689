"""A chain of shards, whatever they do: addresses, boundaries, processes, the way from one shard to the next."""
