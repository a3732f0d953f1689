"""What `python -m speculative.bench` measures."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from lab.settings import require


class BenchEngine(Enum):
    """What is measured with."""

    synthetic = "synthetic"
    """Engines whose passes take the times of `project.synthetic`."""
    real = "real"
    """`model`, and the drafts of `project.draft`."""


@dataclass(kw_only=True)
class BenchText:
    """One prompt."""

    name: str
    prompt: str
    repeats: bool
    """Whether the answer repeats what stands in the prompt."""


@dataclass(kw_only=True)
class BenchSettings:
    """Sizes of the benchmark. Values of one engine's parts do not change the other's."""

    engine: BenchEngine
    parts: list[str]
    """Names of the tables to measure, in order, from `PARTS` of the engine; none: all."""
    rtt_seconds: list[float]
    """Round-trip times that the link adds, half each way."""
    draft_lengths: list[int]
    """Of the synchronous loop."""
    fixed_lengths: list[int]
    """That the automatic one is compared with."""
    new_tokens: int
    """Of a text with guesses."""
    alone_tokens: int
    """Of a text of the target alone, whose speed does not change along it."""
    repeats: int
    """Interleaved runs of each case that count."""
    text_repeats: int
    """The same of part texts."""
    low_acceptances: list[float]
    """Where a short wait beats going at once (part near)."""
    far_rtt_seconds: list[float]
    """Round trips of drafters that are of no use (part useless)."""
    busy_rtt_seconds: float
    """Of the picture of who was busy when."""
    frame_rounds: int
    """Round trips of the frame comparison."""
    neighbour_tokens: int
    """Of each of four clients, one of which is hostile or stalled (part neighbours)."""
    crowd: int
    """Drafters on one verifier (part crowd)."""
    crowd_tokens: int
    """Of each of them."""
    texts: list[BenchText]
    """Engine real."""
    text_names: list[str]
    """Which of them; none: all."""
    text_tokens: int
    """Of each answer to them, unless the target ends it sooner."""
    layers: list[int]
    """Of the target's own, as drafters (part sources)."""

    @property
    def chosen_texts(self) -> list[BenchText]:
        """Those of `text_names`."""
        return [text for text in self.texts if not self.text_names or text.name in self.text_names]

    def __post_init__(self) -> None:
        require(bool(self.rtt_seconds), "rtt_seconds must name at least one time", self.rtt_seconds)
        require(min([*self.rtt_seconds, *self.far_rtt_seconds]) >= 0, "delays must be at least 0", self.rtt_seconds)
        require(bool(self.draft_lengths), "draft_lengths must name at least one length", self.draft_lengths)
        lengths = [*self.draft_lengths, *self.fixed_lengths]
        require(min(lengths) >= 1, "draft_lengths and fixed_lengths must be at least 1", lengths)
        require(bool(self.texts), "texts must name at least one prompt", self.texts)
        unknown = sorted(set(self.text_names) - {text.name for text in self.texts})
        require(not unknown, "text_names must be names of texts", unknown)
        for name in (
            "new_tokens",
            "alone_tokens",
            "repeats",
            "text_repeats",
            "frame_rounds",
            "neighbour_tokens",
            "crowd_tokens",
        ):
            require(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        require(self.crowd >= 2, "crowd must be at least 2", self.crowd)
