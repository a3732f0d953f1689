"""Settings of the HTTP server."""

from dataclasses import dataclass

from lab.engine.kinds import EngineKind
from lab.settings import register, require, require_above, require_at_least
from lab.text.settings import FILL
from speculative.settings import DraftSource, TargetRoleSettings, TargetSettings


@dataclass(kw_only=True)
class VerifierSettings:
    """The verifier behind the server (engine=speculative): `python -m speculative.verifier`."""

    host: str
    port: int


@dataclass(kw_only=True)
class ServeProjectSettings(TargetSettings):
    """The server, and the target behind it."""

    verifier: VerifierSettings
    model_id: str | None
    """Name of the model for clients; null: that of `model`."""
    max_new_tokens: int
    """Most new tokens of a request that names no number; -1: as many as the context has room for."""
    temperature: float
    """Of a request that names none."""
    max_choices: int
    """Most choices (`n`, times the number of prompts) of one request."""
    max_body_bytes: int
    """Largest body of a request."""
    max_connections: int
    """Concurrent connections; further ones get 503."""
    request_seconds: float
    """A request must arrive whole within so long; else its connection is closed."""
    connection_idle_seconds: float
    """A connection without a request is closed after so long. Clients must give theirs up before: most do so within
    5 to 60 s, and a request that is sent while the server closes the connection is lost."""
    keep_alive_seconds: float
    """A stream that has nothing to say sends a comment as often as this, so that no proxy closes it."""
    grace_seconds: float
    """After SIGTERM or Ctrl+C, requests that run may go on for so long; new ones are refused at once."""
    journal: str
    """Folder of the streams' journals, from which a broken stream is continued, also after the server was killed."""
    journal_bytes: int
    """Most bytes of all journals; older ones go first."""
    keep_seconds: float
    """How long a stream can be continued after it last had a client; 0: not at all, and no journal is kept."""
    cors_origins: list[str]
    """Web pages that may use this server from a browser, such as http://localhost:3000; empty: none but our own."""
    metrics_prefix: str
    """Beginning of the names at /metrics; `vllm:` suits boards that were made for vLLM."""
    adapters: str | None
    """Folder of adapters: each PEFT folder in it is a model of its own, by its folder's name; a results folder of
    `fl` is followed to its newest round. null: none (engine=local)."""
    follow_seconds: float
    """How often that folder is looked at."""
    max_adapters: int
    """Most adapters at a time, those that were replaced and still have texts among them."""
    load_adapters: bool
    """Whether /v1/load_lora_adapter and /v1/unload_lora_adapter are served, for folders below `adapters`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = f"max_new_tokens must be at least 1, or {FILL} to fill the context"
        require(self.max_new_tokens >= 1 or self.max_new_tokens == FILL, counts, self.max_new_tokens)
        require(0 <= self.temperature <= 2, "temperature must be in [0, 2]", self.temperature)
        require_at_least(1, self, "max_choices", "max_connections", "max_adapters")
        require_at_least(1024, self, "max_body_bytes", "journal_bytes")
        require_above(0, self, "request_seconds", "connection_idle_seconds", "keep_alive_seconds", "follow_seconds")
        require_at_least(0, self, "grace_seconds", "keep_seconds")
        if self.engine is EngineKind.speculative:
            kept = (DraftSource.ngram, DraftSource.none)
            others = "python -m speculative.drafter has the others"
            rule = f"draft.source must be ngram or none for engine=speculative ({others})"
            require(self.draft.source in kept, rule, self.draft.source.name)
            require(
                not self.exact_shapes, "exact_shapes must be false for engine=speculative: it is the verifier's", True
            )
        is_local = self.engine is EngineKind.local
        rule = "adapters must be null unless engine=local (others serve one adapter: model.adapter at all roles)"
        require(is_local or self.adapters is None, rule, self.adapters)
        rule = "load_adapters must be false without a folder of adapters"
        require(not self.load_adapters or self.adapters is not None, rule, self.load_adapters)


@register("serve")
@dataclass(kw_only=True)
class ServeSettings(TargetRoleSettings):
    """All settings of `python -m serve`."""

    project: ServeProjectSettings
