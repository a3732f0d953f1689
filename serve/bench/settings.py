"""Settings of `python -m serve.bench`."""

from dataclasses import dataclass
from typing import Any

from lab.settings import LabSettings, register, require, require_above, require_at_least


@dataclass(kw_only=True)
class Form:
    """A kind of JSON document."""

    name: str
    schema: dict[str, Any]
    """Its JSON schema."""
    prompt: str
    """What is asked for; {} stands for a subject."""
    subjects: list[str]


@dataclass(kw_only=True)
class ServeBenchProjectSettings:
    """Sizes of the benchmark."""

    parts: list[str]
    """Names of the rows to measure, from `PARTS`."""
    context: int
    start_seconds: float
    """Time limit of the start of a process."""
    request_seconds: float
    """Time limit of one request."""
    overhead_tokens: int
    """New tokens of a text of part overhead."""
    overhead_repeats: int
    """Interleaved readings of part overhead that count."""
    history_tokens: int
    """Tokens of the first turn's prompt (part second_turn)."""
    history_repeats: int
    """Chats of part second_turn."""
    rtt_seconds: float
    """Round-trip time between server and verifier (part schema)."""
    document_tokens: int
    """Most tokens of a document of part schema."""
    documents: int
    """Documents of part schema: each form in turn, with one of its subjects."""
    forms: list[Form]
    streams: list[int]
    """Concurrent requests of part load."""
    load_prompt_tokens: int
    load_new_tokens: int
    load_turns: int
    """Requests that each stream makes, one after the other."""
    load_repeats: int
    """Interleaved readings of part load."""
    peers: list[str]
    """Servers that part load compares with, from `PEERS`."""
    guidellm: str | None
    """Executable of guidellm, which then makes the requests of part load; null: our own generator."""
    report: str | None
    """File of the report; rows of other parts that it holds stay. null: bench.json in the run folder."""

    def __post_init__(self) -> None:
        require_at_least(2, self, "overhead_tokens", "load_new_tokens")
        require_at_least(1, self, "overhead_repeats", "history_tokens", "history_repeats", "document_tokens")
        require_at_least(1, self, "documents", "load_prompt_tokens", "load_turns", "load_repeats")
        require_above(0, self, "start_seconds", "request_seconds")
        require_at_least(0, self, "rtt_seconds")
        require(bool(self.streams) and min(self.streams) >= 1, "streams must be numbers of at least 1", self.streams)
        known = sum(len(form.subjects) for form in self.forms)
        require(self.documents <= known, f"documents must be at most {known}, one for each subject", self.documents)


@register("serve_bench")
@dataclass(kw_only=True)
class ServeBenchSettings(LabSettings):
    """Everything `python -m serve.bench` reads."""

    project: ServeBenchProjectSettings
