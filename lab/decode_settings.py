"""Settings of `python -m lab.decode`."""

from __future__ import annotations

from dataclasses import dataclass

from lab.engine.settings import CacheSettings
from lab.settings import LabSettings, register, require, require_at_least


@dataclass(kw_only=True)
class DecodeProjectSettings(CacheSettings):
    """A measurement of a whole model, at the end of texts of `context` tokens."""

    max_new_tokens: int
    """Tokens at the end of each text that are generated and timed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(2, self, "max_new_tokens")
        rule = f"context must be greater than max_new_tokens={self.max_new_tokens}"
        require(self.context > self.max_new_tokens, rule, self.context)


@dataclass(kw_only=True)
class DecodeSettings(LabSettings):
    """Everything `python -m lab.decode` reads."""

    project: DecodeProjectSettings


register("decode", DecodeSettings)
