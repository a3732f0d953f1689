"""Settings of `python -m lab.decode`."""

from __future__ import annotations

from dataclasses import dataclass

from lab.settings import LabSettings, register, require, require_at_least


@dataclass(kw_only=True)
class DecodeProjectSettings:
    """What a whole model is asked for."""

    context: int
    """Tokens of each text at its end: its window is full then."""
    sessions: int
    """Texts at once: the batch size."""
    max_new_tokens: int
    """The last so many tokens of each text are generated and timed."""
    prefill_chunk: int
    """Most tokens of a prompt in one pass."""
    cache_bucket: int
    """The KV cache grows in multiples of this many positions."""
    cache_limit_bytes: int
    """Most that keys and values of all texts may take."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "sessions", "prefill_chunk", "cache_bucket")
        require_at_least(2, self, "max_new_tokens")
        rule = f"context must be greater than max_new_tokens={self.max_new_tokens}"
        require(self.context > self.max_new_tokens, rule, self.context)
        require(self.cache_limit_bytes >= 2**16, "cache_limit_bytes must be at least 64 KiB", self.cache_limit_bytes)


@dataclass(kw_only=True)
class DecodeSettings(LabSettings):
    """Everything `python -m lab.decode` reads."""

    project: DecodeProjectSettings


register("decode", DecodeSettings)
