"""Settings of `simulations/link.py`: delay and speed of each direction, and when the link fails."""

from __future__ import annotations

from dataclasses import dataclass

from lab.link import CutKind
from lab.settings import LabSettings, register, require, require_at_least


@dataclass(kw_only=True)
class OneWaySettings:
    """Delay and speed of one direction."""

    delay_seconds: float
    jitter_seconds: float
    """Random extra delay, uniform in [0, this]."""
    bytes_per_second: float
    """0: no limit."""

    def __post_init__(self) -> None:
        require_at_least(0, self, "delay_seconds", "jitter_seconds", "bytes_per_second")


@dataclass(kw_only=True)
class CutSettings:
    """A planned failure."""

    at_seconds: float
    """Seconds after the start of the link."""
    kind: CutKind
    duration_seconds: float
    """0 with `reset`: only the connections of that moment are cut."""

    def __post_init__(self) -> None:
        require_at_least(0, self, "at_seconds", "duration_seconds")


@dataclass(kw_only=True)
class LinkProjectSettings:
    """A link from `network.host`, `network.port` to a target."""

    target_host: str
    target_port: int
    up: OneWaySettings
    """From the peer that connects, to the target."""
    down: OneWaySettings
    """From the target, to that peer."""
    buffer_bytes: int
    """Most bytes in transit for one connection and direction."""
    cuts: list[CutSettings]

    def __post_init__(self) -> None:
        require(1 <= self.target_port <= 65535, "target_port must be in [1, 65535]", self.target_port)
        require_at_least(1460, self, "buffer_bytes")


@dataclass(kw_only=True)
class LinkRunSettings(LabSettings):
    """All settings of this command."""

    project: LinkProjectSettings


register("link", LinkRunSettings)
