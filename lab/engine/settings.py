"""Settings of the KV cache, which every process with a target shares."""

from dataclasses import dataclass

from lab.settings import require, require_at_least


@dataclass(kw_only=True)
class CacheSettings:
    """Sizes of a KV cache and of the passes that fill it."""

    sessions: int
    """Concurrent texts: the batch size."""
    context: int
    """Most tokens of one text, prompt included; 0: the model's own limit."""
    prefill_chunk: int
    """Most tokens of a prompt in one pass; the chunks of a split model overlap on its shards."""
    cache_bucket: int
    """The KV cache grows in multiples of this many positions."""
    cache_limit_bytes: int
    """Most bytes of the keys and values of all texts."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "sessions", "prefill_chunk", "cache_bucket")
        require_at_least(0, self, "context")
        require(self.cache_limit_bytes >= 2**16, "cache_limit_bytes must be at least 64 KiB", self.cache_limit_bytes)
