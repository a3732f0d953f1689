"""Settings of the benchmarks of split inference."""

from __future__ import annotations

from dataclasses import dataclass

from lab.settings import LabSettings, register_project, require


@dataclass(kw_only=True)
class SplitBenchProjectSettings:
    """What `python -m split.bench` measures."""

    parts: list[str]
    """Which rows: added, link, prefill, batch, plan."""
    cut: int
    """Where the second of two shards begins."""
    new_tokens: int
    """Tokens of each reading."""
    repeats: int
    """Interleaved readings that count."""
    rtt_seconds: list[float]
    """Round trips that the link adds between shard 1, shard 2 and the client."""
    prompt_tokens: int
    """Of the prefill."""
    prefill_chunk: int
    """Most tokens of a pass where the prefill goes in chunks."""
    context: int
    cache_limit_bytes: int
    start_seconds: float
    """How long shards may take to be there."""
    report: str | None
    """Where the report goes; null: bench.json in the run folder."""

    def __post_init__(self) -> None:
        for name in ("cut", "new_tokens", "repeats", "prompt_tokens", "prefill_chunk", "context"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        require(len(self.rtt_seconds) >= 2, "rtt_seconds must name at least two times", self.rtt_seconds)
        require(min(self.rtt_seconds) >= 0, "rtt_seconds must be at least 0", self.rtt_seconds)
        unknown = sorted(set(self.parts) - {"added", "link", "prefill", "batch", "plan"})
        require(not unknown, "parts must be of added, link, prefill, batch, plan", unknown)


@dataclass(kw_only=True)
class SplitBenchSettings(LabSettings):
    """Everything the benchmark reads."""

    project: SplitBenchProjectSettings


register_project("split_bench", SplitBenchProjectSettings)
