"""Settings of `python -m speculative.bench`."""

from dataclasses import dataclass
from enum import Enum

from lab.settings import require, require_at_least


class BenchEngine(Enum):
    """Engines of the benchmark."""

    synthetic = "synthetic"
    """Engines whose passes take the times of `project.synthetic`."""
    real = "real"
    """`model`, and the source of `project.draft`."""


@dataclass(kw_only=True)
class BenchText:
    """One prompt."""

    name: str
    prompt: str
    repeats: bool
    """Whether the answer repeats parts of the prompt."""


@dataclass(kw_only=True)
class BenchSettings:
    """Sizes of the benchmark. Values of one engine's parts do not change the other's."""

    engine: BenchEngine
    parts: list[str]
    """Names of the tables to measure, in order, from `PARTS` of the engine; none: all."""
    rtt_seconds: list[float]
    """Round-trip times that the link adds, half each way."""
    draft_lengths: list[int]
    """Draft lengths of the synchronous loop."""
    fixed_lengths: list[int]
    """Draft lengths that the automatic one is compared with."""
    new_tokens: int
    """Length of a text with draft tokens."""
    alone_tokens: int
    """Length of a text of the target alone, whose speed does not change along it."""
    repeats: int
    """Interleaved runs of each case that count."""
    text_repeats: int
    """Interleaved runs of each case of part texts."""
    low_acceptances: list[float]
    """Acceptances at which a short wait is better than none (part near)."""
    far_rtt_seconds: list[float]
    """Round-trip times of drafters that are never right (part useless)."""
    busy_rtt_seconds: float
    """Round-trip time of the picture of busy times."""
    frame_rounds: int
    """Round trips of the frame comparison."""
    neighbour_tokens: int
    """Length of the text of each client (part neighbours)."""
    crowd: int
    """Drafters on one verifier (part crowd)."""
    crowd_tokens: int
    """Length of the text of each of them."""
    texts: list[BenchText]
    """Prompts of engine real."""
    text_names: list[str]
    """Names of the prompts to use; none: all."""
    text_tokens: int
    """Length of each answer to them, unless the target ends it sooner."""
    layers: list[int]
    """Numbers of the target's first layers that draft (part sources)."""
    history_tokens: int
    """Tokens of the first turn's prompt (part second_turn)."""

    @property
    def chosen_texts(self) -> list[BenchText]:
        """The prompts of `text_names`."""
        return [text for text in self.texts if not self.text_names or text.name in self.text_names]

    def __post_init__(self) -> None:
        require(bool(self.rtt_seconds), "rtt_seconds must name at least one time", self.rtt_seconds)
        delays = [*self.rtt_seconds, *self.far_rtt_seconds]
        require(min(delays) >= 0, "rtt_seconds and far_rtt_seconds must be at least 0", delays)
        require(bool(self.draft_lengths), "draft_lengths must name at least one length", self.draft_lengths)
        lengths = [*self.draft_lengths, *self.fixed_lengths]
        require(min(lengths) >= 1, "draft_lengths and fixed_lengths must be at least 1", lengths)
        require(bool(self.texts), "texts must name at least one prompt", self.texts)
        unknown = sorted(set(self.text_names) - {text.name for text in self.texts})
        require(not unknown, "text_names must be names of texts", unknown)
        require_at_least(1, self, "new_tokens", "alone_tokens", "repeats", "text_repeats", "frame_rounds")
        require_at_least(1, self, "neighbour_tokens", "crowd_tokens", "history_tokens")
        require_at_least(2, self, "crowd")
