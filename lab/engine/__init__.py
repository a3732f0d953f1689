"""Engines: token ids in, the target's next tokens out; the cache, the sampling and the arithmetic below them."""
