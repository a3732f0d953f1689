"""Settings of the benchmarks of split inference and of split training."""

from dataclasses import dataclass

from lab.settings import LabSettings, register, require, require_at_least


@dataclass(kw_only=True)
class TwoShardsSettings:
    """A benchmark of a model that is cut into two shards."""

    parts: list[str]
    """Names of the rows to measure, from `PARTS` of the benchmark."""
    cut: int
    """First layer of the second shard. That one has the head, too, so it needs fewer layers."""
    repeats: int
    """Interleaved readings that count."""
    start_seconds: float
    """Time limit for shards to be reachable."""
    report: str | None
    """File of the report; rows of other parts that it holds stay. null: bench.json in the run folder."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "cut", "repeats")


@dataclass(kw_only=True)
class SplitBenchProjectSettings(TwoShardsSettings):
    """Sizes of `python -m split.bench`."""

    placements: list[int]
    """Other values of `cut`, at which the planner's prediction is compared with the clock."""
    new_tokens: int
    """Tokens of each reading."""
    added_tokens: int
    """Tokens of each reading of a boundary's cost: few, with many readings, since the speed of memory changes by more
    from one second to the next."""
    added_repeats: int
    rtt_seconds: list[float]
    """Round-trip times of the link between shard 1, shard 2 and the client."""
    prompt_tokens: int
    """Length of the prompt of part prefill."""
    prefill_chunk: int
    """Most tokens of a pass where that prompt goes in chunks."""
    perplexity_tokens: int
    """Length of the text whose perplexity is measured in each encoding of the boundary."""
    speculation_rtt_seconds: float
    """Round-trip time between the shards of part speculation."""
    speculation_tokens: int
    """Length of its text."""
    acceptance: float
    """Probability that a draft token is right."""
    draft_length: int
    """Draft tokens of a round."""
    memory_model: dict[str, int]
    """The large random model of the memory row: its differences from `model=random`, as in `model.architecture`."""
    context: int
    cache_limit_bytes: int

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, self, "new_tokens", "prompt_tokens", "prefill_chunk", "context", "speculation_tokens")
        require_at_least(1, self, "draft_length", "added_tokens", "added_repeats")
        require_at_least(2, self, "perplexity_tokens")
        require_at_least(0, self, "speculation_rtt_seconds")
        require(len(self.rtt_seconds) >= 2, "rtt_seconds must name at least two times", self.rtt_seconds)
        require(min(self.rtt_seconds) >= 0, "rtt_seconds must be at least 0", self.rtt_seconds)
        require(0 <= self.acceptance <= 1, "acceptance must be in [0, 1]", self.acceptance)


@dataclass(kw_only=True)
class SplitTrainBenchProjectSettings(TwoShardsSettings):
    """Sizes of `python -m split.bench.training`."""

    micro_batches: list[int]
    """Numbers of micro-batches in a step of part pipeline."""
    throughput_micro_batches: int
    examples_per_micro_batch: int
    sequence_length: int
    """Tokens of an example."""
    steps: int
    """Steps that count, at each number of micro-batches of part pipeline."""
    adapter_steps: int
    memory_overrides: list[str]
    """The model of part memory, large against the needs of a process without one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, self, "steps", "adapter_steps", "examples_per_micro_batch", "throughput_micro_batches")
        require_at_least(8, self, "sequence_length")
        require(all(m >= 1 for m in self.micro_batches), "micro_batches must be at least 1 each", self.micro_batches)


@register("split_bench")
@dataclass(kw_only=True)
class SplitBenchSettings(LabSettings):
    """Settings of `python -m split.bench`."""

    project: SplitBenchProjectSettings

    compiles_layers = True


@register("split_train_bench")
@dataclass(kw_only=True)
class SplitTrainBenchSettings(LabSettings):
    """Settings of `python -m split.bench.training`."""

    project: SplitTrainBenchProjectSettings
