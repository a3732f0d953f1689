"""Settings of `simulations/link.py`: delay and speed of each direction, and when the link fails."""

from dataclasses import dataclass

from lab.link import Cut, OneWay
from lab.settings import LabSettings, register, require, require_at_least


@dataclass(kw_only=True)
class LinkProjectSettings:
    """A link from `network.host`, `network.port` to a target."""

    target_host: str
    target_port: int
    up: OneWay
    """From the peer that connects, to the target."""
    down: OneWay
    """From the target, to that peer."""
    buffer_bytes: int
    """Most bytes in transit for one connection and direction."""
    cuts: list[Cut]

    def __post_init__(self) -> None:
        require(1 <= self.target_port <= 65535, "target_port must be in [1, 65535]", self.target_port)
        require_at_least(1460, self, "buffer_bytes")


@register("link")
@dataclass(kw_only=True)
class LinkRunSettings(LabSettings):
    """All settings of this command."""

    project: LinkProjectSettings
