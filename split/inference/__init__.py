"""Inference across the cut: shards that serve sequences, and the model that they are together."""
