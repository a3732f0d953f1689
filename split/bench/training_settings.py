"""Settings of the benchmarks of split training."""

from __future__ import annotations

from dataclasses import dataclass

from lab.settings import LabSettings, register, require

PARTS = {"pipeline", "throughput", "boundary", "memory", "adapter"}


@dataclass(kw_only=True)
class SplitTrainBenchProjectSettings:
    """What `python -m split.bench.training` measures."""

    parts: list[str]
    """Which rows: pipeline, throughput, boundary, memory, adapter."""
    cut: int
    """Where the second of two shards begins; the head is the second one's, so it has fewer layers."""
    micro_batches: list[int]
    """Numbers of them in a step: of pipeline."""
    throughput_micro_batches: int
    examples_per_micro_batch: int
    sequence_length: int
    """Tokens of an example."""
    steps: int
    """That count, at each number of micro-batches of pipeline."""
    repeats: int
    """Interleaved readings of throughput, a step each."""
    adapter_steps: int
    memory_overrides: list[str]
    """The model of the part memory: large against what a process needs besides."""
    start_seconds: float
    """How long shards may take to be there."""
    report: str | None
    """Where the report goes; null: bench.json in the run folder."""

    def __post_init__(self) -> None:
        for name in (
            "cut",
            "steps",
            "repeats",
            "adapter_steps",
            "examples_per_micro_batch",
            "throughput_micro_batches",
        ):
            require(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        require(self.sequence_length >= 8, "sequence_length must be at least 8", self.sequence_length)
        require(all(m >= 1 for m in self.micro_batches), "micro_batches must be at least 1 each", self.micro_batches)
        unknown = sorted(set(self.parts) - PARTS)
        require(not unknown, f"parts must be of {', '.join(sorted(PARTS))}", unknown)


@dataclass(kw_only=True)
class SplitTrainBenchSettings(LabSettings):
    """Everything the benchmark reads."""

    project: SplitTrainBenchProjectSettings


register("split_train_bench", SplitTrainBenchSettings)
