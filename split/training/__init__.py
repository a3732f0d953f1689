"""Training across the cut: shards that learn, and the trainer that drives them."""
