"""Training a split model: the shards, and the trainer that drives them."""
