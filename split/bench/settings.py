"""Settings of the benchmarks of split inference."""

from __future__ import annotations

from dataclasses import dataclass

from lab.settings import LabSettings, register, require

PARTS = (
    *("added_tcp", "added_rpc", "link", "prefill", "batch"),
    *("plan", "boundary", "times", "speculation", "memory"),
)
"""What can be measured: functions of `split.bench.inference_rows`."""


@dataclass(kw_only=True)
class SplitBenchProjectSettings:
    """What `python -m split.bench` measures."""

    parts: list[str]
    """Which rows, of `PARTS`."""
    cut: int
    """Where the second of two shards begins."""
    placements: list[int]
    """Other places for it, where the planner's prediction meets the clock."""
    new_tokens: int
    """Tokens of each reading."""
    repeats: int
    """Interleaved readings that count."""
    added_tokens: int
    """Tokens of each reading of what a boundary adds: few, and many readings, since memory's own speed changes by more
    from one second to the next."""
    added_repeats: int
    rtt_seconds: list[float]
    """Round trips that the link adds between shard 1, shard 2 and the client."""
    prompt_tokens: int
    """Of the prefill."""
    prefill_chunk: int
    """Most tokens of a pass where the prefill goes in chunks."""
    perplexity_tokens: int
    """Tokens of text whose perplexity each encoding of the boundary changes."""
    speculation_rtt_seconds: float
    """Round trip between the shards, with speculation in front of them."""
    speculation_tokens: int
    """Tokens of that text."""
    acceptance: float
    """Probability that a guess is right."""
    draft_length: int
    """Guesses a round."""
    memory_model: dict[str, int]
    """The large random model of the memory row: what it has other than `model=random`, as in `model.architecture`."""
    context: int
    cache_limit_bytes: int
    start_seconds: float
    """How long shards may take to be there."""
    report: str | None
    """Where the report goes; rows of other parts that stand there stay. null: bench.json in the run folder."""

    def __post_init__(self) -> None:
        sizes = ("cut", "new_tokens", "repeats", "prompt_tokens", "prefill_chunk", "context", "speculation_tokens")
        for name in (*sizes, "draft_length", "added_tokens", "added_repeats"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        require(len(self.rtt_seconds) >= 2, "rtt_seconds must name at least two times", self.rtt_seconds)
        require(min(self.rtt_seconds) >= 0, "rtt_seconds must be at least 0", self.rtt_seconds)
        require(
            self.speculation_rtt_seconds >= 0,
            "speculation_rtt_seconds must be at least 0",
            self.speculation_rtt_seconds,
        )
        require(self.perplexity_tokens >= 2, "perplexity_tokens must be at least 2", self.perplexity_tokens)
        require(0 <= self.acceptance <= 1, "acceptance must be in [0, 1]", self.acceptance)
        unknown = sorted(set(self.parts) - set(PARTS))
        require(not unknown, f"parts must be of {', '.join(PARTS)}", unknown)


@dataclass(kw_only=True)
class SplitBenchSettings(LabSettings):
    """Everything the benchmark reads."""

    project: SplitBenchProjectSettings


register("split_bench", SplitBenchSettings)
