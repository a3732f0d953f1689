"""The models behind the server (whole, over shards, at a verifier, with adapters), and how their texts go on."""
