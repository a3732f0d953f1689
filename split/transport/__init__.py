"""How activations travel from shard to shard."""
