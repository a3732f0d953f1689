"""Settings of the chat in a terminal: where the server is, and what each request asks for."""

from __future__ import annotations

from dataclasses import dataclass

from lab.settings import LabSettings, register, require, require_at_least


@dataclass(kw_only=True)
class ChatProjectSettings:
    """The server, and the fields of a request. null: left to the server."""

    base_url: str
    """Where its API begins, with the /v1."""
    model_id: str | None
    """Name of the model; null: the first one that the server lists."""
    system: str
    """System message; empty: none."""
    temperature: float | None
    top_p: float | None
    max_tokens: int | None
    """Most tokens of an answer."""
    speculative: bool
    """Whether a server of this lab may speculate; others are not asked."""
    reconnect_seconds: float
    """How long to try to go on with an answer whose connection broke."""

    def __post_init__(self) -> None:
        rule = "base_url must begin with http:// or https://"
        require(self.base_url.startswith(("http://", "https://")), rule, self.base_url)
        if self.temperature is not None:
            require(0 <= self.temperature <= 2, "temperature must be in [0, 2]", self.temperature)
        if self.top_p is not None:
            require(0 <= self.top_p <= 1, "top_p must be in [0, 1]", self.top_p)
        if self.max_tokens is not None:
            require_at_least(1, self, "max_tokens")
        require_at_least(0, self, "reconnect_seconds")


@register("chat")
@dataclass(kw_only=True)
class ChatSettings(LabSettings):
    """All settings of `python -m serve.chat`. `prompt`: the first message."""

    project: ChatProjectSettings

    draws_seed = True
