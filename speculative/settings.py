"""Settings of the speculative pillar: the request, the draft source, the verifier's limits."""

from dataclasses import dataclass
from enum import Enum

from lab.engine.kinds import EngineKind
from lab.engine.settings import CacheSettings
from lab.settings import Dtype, LabSettings, Quantization, register, require, require_above, require_at_least
from lab.text.settings import TextSettings
from speculative.bench.settings import BenchSettings

MAX_DRAFT_LENGTH = 64
"""Most draft tokens in one DRAFT, part of the protocol; a verifier's own limit is `project.max_draft_length`."""

SYNTHETIC_CONTEXT = 2**17
"""Context of a synthetic engine, in tokens, if `project.context` is 0: there is no model that has one."""

AUTO = "auto"
MAX_WINDOW = 1024
"""Most draft tokens of a request that are in transit or waiting; a verifier's own limit is `project.draft.window`."""

Mode = Enum("Mode", {"async": "async", "sync": "sync", "target_only": "target_only"})  # `async` is a keyword of Python
"""`async`: the drafter keeps drafting, and the target decodes by itself when no draft token has arrived. `sync`: draft,
send, wait for the verdict. `target_only`: the target streams its text without drafts."""


class Rule(Enum):
    """When a draft token is accepted. `exact`: if it is the target's choice, so that the text is the target's own.

    `cross_entropy` also accepts one whose cross-entropy under the target is at most a threshold: LOSSY.
    """

    exact = "exact"
    cross_entropy = "cross_entropy"


class DraftSource(Enum):
    """Source of draft tokens."""

    model = "model"
    """Another, smaller model with the same tokenizer: `project.draft.model`."""
    ngram = "ngram"
    """Prompt lookup: the tokens that followed the last time the same ones occurred in the text; no model."""
    layers = "layers"
    """The first layers of the target's own checkpoint, with its head."""
    noisy = "noisy"
    """The target with noise on its head: partial acceptance from one checkpoint, for tests."""
    random = "random"
    """Ids from a hash, for tests."""
    synthetic = "synthetic"
    """A `SyntheticEngine` that agrees with a synthetic target with a given probability, for measurements."""
    recorded = "recorded"
    """The target's own text of an earlier run (`project.draft.file`), right with probability
    `project.synthetic.agreement`: a drafter of known acceptance for a real target, for measurements."""
    none = "none"
    """No draft tokens: each round asks for one token."""


@dataclass(kw_only=True)
class DraftSettings:
    """The draft source, and the number of draft tokens."""

    source: DraftSource
    model: str | None
    """Draft model (source=model): a name in conf/model or in the `model` folder of `--config-dir`, a folder, a GGUF
    file, or a hub repository."""
    dtype: Dtype | None
    """Precision of that model; null: that of its YAML."""
    quantization: Quantization | None
    """How its weights are stored (`model.quantization`); null: as its YAML says."""
    length: str  # a union of int and str is too much for OmegaConf 2.3: merging fails
    """Most draft tokens of a pass (k); fewer near the end of the text. auto: as many as pay off, possibly none (mode
    async); five (mode sync)."""
    window: int
    """Drafter: most draft tokens beyond the verified text (its credit). Verifier: the most that it grants."""
    layers: int
    """Number of the target's layers that draft (source=layers)."""
    noise: float
    """Standard deviation of the noise, in units of the head's own (source=noisy)."""
    file: str | None
    """The result.json of the run whose text is replayed (source=recorded)."""
    longest_ngram: int
    """Longest n-gram that is looked up; shorter ones are next (source=ngram)."""
    shortest_ngram: int
    """Shortest n-gram that is looked up (source=ngram)."""

    def __post_init__(self) -> None:
        is_known = self.length == AUTO or (self.length.isdecimal() and 1 <= int(self.length) <= MAX_DRAFT_LENGTH)
        given = int(self.length) if self.length.isdecimal() else self.length
        require(is_known, f"length must be {AUTO} or in [1, {MAX_DRAFT_LENGTH}]", given)
        least = self.fixed_length or 1
        require(least <= self.window <= MAX_WINDOW, f"window must be in [{least}, {MAX_WINDOW}]", self.window)
        require(self.source is not DraftSource.model or bool(self.model), "model must be set for source=model", None)
        is_known = self.source is not DraftSource.recorded or bool(self.file)
        require(is_known, "file must be set for source=recorded", None)
        require_at_least(1, self, "layers", "shortest_ngram")
        require_at_least(0, self, "noise")
        rule = f"longest_ngram must be at least shortest_ngram={self.shortest_ngram}"
        require(self.longest_ngram >= self.shortest_ngram, rule, self.longest_ngram)

    @property
    def fixed_length(self) -> int:
        """The configured length; 0: auto."""
        return 0 if self.length == AUTO else int(self.length)


@dataclass(kw_only=True)
class SyntheticSettings:
    """Engines without a model, whose passes take a configured time (engine=synthetic, source=synthetic)."""

    vocabulary_size: int
    """Verifier: number of ids of a synthetic target; 0: those of the tokenizer of `model`."""
    step_seconds: float
    """Time of the target's pass over one row."""
    row_seconds: float
    """Time of each further row."""
    draft_step_seconds: float
    """Time of the drafter's pass."""
    agreement: float
    """Probability that a draft token is the target's choice, independently at each prefix."""

    def __post_init__(self) -> None:
        is_known = self.vocabulary_size == 0 or self.vocabulary_size >= 2
        require(is_known, "vocabulary_size must be 0 or at least 2", self.vocabulary_size)
        require_at_least(0, self, "step_seconds", "row_seconds", "draft_step_seconds")
        require(0 <= self.agreement <= 1, "agreement must be in [0, 1]", self.agreement)


@dataclass(kw_only=True)
class ClientSettings:
    """Limits of one connection to a verifier."""

    texts: int
    """Concurrent requests."""
    cache_bytes: int
    """Keys and values that its requests need at their full length (prompt and max_new_tokens)."""
    frames_per_second: float
    """Frames it may send per second; a client that sends more is read more slowly."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "texts", "frames_per_second")
        require(self.cache_bytes >= 2**20, "cache_bytes must be at least 1 MiB", self.cache_bytes)


@dataclass(kw_only=True)
class SplitTargetSettings:
    """A target that is split over running shards (engine=split): `python -m split.serve`."""

    shards: list[str]
    """Their addresses, `host:port` each, first to last."""
    spares: list[str]
    """Shards that may replace a lost one with the same layers."""
    boundary: str
    """Number format of hidden states between them: the shards' own `project.boundary`."""
    start_seconds: float
    """Time limit for them to start."""
    recovery_seconds: float
    """Time limit for replacing a lost one."""

    def __post_init__(self) -> None:
        require_above(0, self, "start_seconds")
        require_at_least(0, self, "recovery_seconds")


@dataclass(kw_only=True)
class TargetSettings(CacheSettings):
    """The target of a verifier, or of the HTTP server: its engine, and what it gives to a request."""

    draft: DraftSettings
    resume_seconds: float
    """Drafter: how long to try to reach a lost verifier again. Verifier: how long a request is kept after its
    connection was lost; nothing is computed for it meanwhile. 0: a lost connection ends its requests."""
    lookup: bool
    """Verifier: use its own prompt lookup, and tokens that a schema forces, when no draft token has arrived (mode
    async)."""
    engine: EngineKind
    """Verifier: the engine of the target."""
    synthetic: SyntheticSettings
    split: SplitTargetSettings
    """Verifier."""
    max_waiting: int
    """Verifier: requests that may wait in line for room; further ones are refused at once."""
    max_draft_length: int
    """Verifier: most draft tokens of a request checked in one pass."""
    prefix_tokens: int
    """Verifier: most tokens of prompts kept after their requests have ended, so that the next turn of a chat does not
    compute its history again; they give way to any request that needs room. 0: none is kept."""
    exact_shapes: bool
    """Verifier: every pass has the same shape, so that every dtype gives the text that the target alone gives in this
    mode; refuses to start on a device that cannot guarantee this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(0, self, "max_waiting", "resume_seconds", "prefix_tokens")
        longest = self.max_draft_length
        require(1 <= longest <= MAX_DRAFT_LENGTH, f"max_draft_length must be in [1, {MAX_DRAFT_LENGTH}]", longest)
        if self.engine is EngineKind.split:
            require(bool(self.split.shards), "split.shards must name at least one shard for engine=split", [])
        is_held = self.engine is EngineKind.local or not self.exact_shapes
        require(is_held, f"exact_shapes must be false for engine={self.engine.name}", self.exact_shapes)


@dataclass(kw_only=True)
class SpeculativeProjectSettings(TextSettings, TargetSettings):
    """Settings of both roles; each value says whose it is if only one role uses it.

    Settings of a text are the drafter's; the verifier reads `max_new_tokens` for requests of the first protocol.
    """

    mode: Mode
    """Drafter."""
    rule: Rule
    """Drafter."""
    cross_entropy_threshold: float
    """Drafter: largest cross-entropy, in nats, of an accepted draft token under rule=cross_entropy."""
    report: bool
    """Drafter: ask for the cross-entropy of each draft token and each token's margin (12 to 60 bytes per round)."""
    check: bool
    """Drafter: afterwards let the target decode the text alone and count the tokens that differ (flips)."""
    resume: str | None
    """Drafter: the text.json in the run folder of an earlier drafter, whose request continues if all other settings are
    the same. null: a new request."""
    client: ClientSettings
    """Verifier."""
    idle_seconds: float
    """Verifier: time limit of a connection without a request, and of a request of mode sync without a DRAFT."""
    max_connections: int
    """Verifier: concurrent connections."""
    bench: BenchSettings

    def __post_init__(self) -> None:
        TextSettings.__post_init__(self)
        TargetSettings.__post_init__(self)
        require_at_least(1, self, "max_connections")
        require_at_least(0, self, "cross_entropy_threshold")
        require_above(0, self, "idle_seconds")
        keeps_schema = self.rule is Rule.exact or self.schema is None
        require(keeps_schema, "rule must be exact with project.schema", self.rule.name)
        is_held = self.engine is not EngineKind.speculative
        require(is_held, "engine must be local, split or synthetic for a verifier", self.engine.name)


@dataclass(kw_only=True)
class TargetRoleSettings(LabSettings):
    """All settings of a command that holds a target, or joins a verifier."""

    project: TargetSettings

    draws_seed = True
    compiles_layers = True
    takes_adapter = True

    def __post_init__(self) -> None:
        super().__post_init__()
        engine, compiles = self.project.engine, self.device.compile
        has_layers = engine is EngineKind.local or compiles is not True
        require(has_layers, f"device.compile must be false or auto for project.engine={engine.name}", compiles)
        are_exact = self.project.exact_shapes and self.device.compile is True
        require(not are_exact, "device.compile must be false or auto with project.exact_shapes", self.device.compile)


@register("spec_decoding")
@dataclass(kw_only=True)
class SpeculativeSettings(TargetRoleSettings):
    """All settings of the verifier and the drafter."""

    project: SpeculativeProjectSettings

    def __post_init__(self) -> None:
        super().__post_init__()
        rule = "seed must be the one that the text was begun with for project.resume"
        require(self.seed >= 0 or self.project.resume is None, rule, self.seed)
