"""The address of a shard."""

from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Address:
    """The address at which a shard listens."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse `host:port`; an IPv6 host is in brackets. ValueError for anything else."""
        host, colon, port = text.rpartition(":")
        if not (colon and host and port.isdecimal() and 0 < int(port) <= 65535):
            raise ValueError(f"must be host:port, got {text!r}")
        return cls(host.removeprefix("[").removesuffix("]"), int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
