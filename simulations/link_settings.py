"""Settings of `simulations/link.py`: what happens to the bytes of each direction, and when the link fails."""

from dataclasses import dataclass

from lab.link import CutKind
from lab.settings import LabSettings, register, require, require_at_least


@dataclass(kw_only=True)
class OneWaySettings:
    """What happens to bytes in one direction."""

    delay_seconds: float
    jitter_seconds: float
    """Added to the delay, uniform in [0, this]."""
    bytes_per_second: float
    """0: no limit."""

    def __post_init__(self) -> None:
        require_at_least(0, self, "delay_seconds", "jitter_seconds", "bytes_per_second")


@dataclass(kw_only=True)
class CutSettings:
    """A failure to come."""

    at_seconds: float
    """After the start of the link."""
    kind: CutKind
    duration_seconds: float
    """0 with `reset`: the connections of that moment only."""

    def __post_init__(self) -> None:
        require_at_least(0, self, "at_seconds", "duration_seconds")


@dataclass(kw_only=True)
class LinkProjectSettings:
    """A link from `network.host`, `network.port` to a target."""

    target_host: str
    target_port: int
    up: OneWaySettings
    """From whoever connects to the target."""
    down: OneWaySettings
    """From the target back."""
    buffer_bytes: int
    """Bytes of one connection and direction that may be under way."""
    cuts: list[CutSettings]

    def __post_init__(self) -> None:
        require(1 <= self.target_port <= 65535, "target_port must be in [1, 65535]", self.target_port)
        require_at_least(1460, self, "buffer_bytes")


@register("link")
@dataclass(kw_only=True)
class LinkRunSettings(LabSettings):
    """Everything this command reads."""

    project: LinkProjectSettings
