"""The chain of shards that inference and training share: addresses, boundaries, processes, neighbours."""
