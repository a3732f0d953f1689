"""Settings of split inference: which layers where, what travels, what a shard gives, how it is found again."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from lab.settings import LabSettings, register, require
from lab.text.settings import TextSettings
from split.chain.address import Address
from split.chain.boundary import Boundary


class TransportKind(Enum):
    """What carries hidden states. `tcp`: our frames, every system; `rpc`: torch.distributed.rpc, trusted links only;
    `inproc`: all shards in the client's process."""

    tcp = "tcp"
    rpc = "rpc"
    inproc = "inproc"


@dataclass(kw_only=True)
class SplitProjectSettings(TextSettings):
    """Both roles read one config; each value says whose it is where only one of them uses it.

    What is asked of a text is the client's.
    """

    transport: TransportKind
    boundary: Boundary
    """How hidden states travel; the same at every shard and client."""
    layers: str | None
    """Shard: its layers, `first:last`, counted from 0, without the last."""
    next: str | None
    """Shard: where the next one listens, `host:port`, as seen from here; null: the client says it."""
    rank: int
    """Shard over rpc: its place in the group, 1 for the first one; the client is 0."""
    world_size: int
    """Over rpc: processes of the group, client included; `network.host` and `port` are where the client opens it."""
    follow_stdin: bool
    """Shard: end when standard input ends, so that it does not outlive the process that started it."""
    shards: list[str]
    """Client: where the shards listen, `host:port` each, first to last."""
    spares: list[str]
    """Client: shards that may take the place of one with the same layers."""
    local_shards: int
    """Client: start so many shards here and end them afterwards; 0: none."""
    cuts: list[int]
    """Client: where the shards that it starts begin, without the first's 0; []: even."""
    prefill_chunk: int
    """Client: most tokens of a prompt in one pass; chunks overlap on the shards."""
    recovery_seconds: float
    """Client: how long to try to bring back a lost shard; 0: its loss ends the text."""
    start_seconds: float
    """Client: how long the shards may take to be there at first."""
    line_seconds: float
    """Client: how long to wait in line for room at the shards; 0: not at all."""
    sessions: int
    """Shard: texts at once."""
    max_connections: int
    """Shard: connections at once; each client takes two at most."""
    max_waiting: int
    """Shard: texts that may wait in line for room; more are refused at once. 0: nobody waits."""
    context: int
    """Most tokens of one text, prompt included; 0: what the model was made for."""
    cache_bucket: int
    """Shard: the KV cache grows in multiples of this many positions."""
    cache_limit_bytes: int
    """Shard: most that keys and values of all texts may take."""
    idle_seconds: float
    """Shard: a text unused for so long gives its place to one that needs it; its client rebuilds it when it goes on."""
    awake_seconds: float
    """Shard: for so long after a pass it looks for the next one without sleeping; 0: it sleeps at once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prefill_chunk", "sessions", "max_connections", "cache_bucket"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        seconds = ("recovery_seconds", "line_seconds", "idle_seconds", "awake_seconds")
        for name in ("local_shards", "context", "rank", "max_waiting", *seconds):
            require(getattr(self, name) >= 0, f"{name} must be at least 0", getattr(self, name))
        require(self.world_size == 0 or self.world_size >= 2, "world_size must be 0 or at least 2", self.world_size)
        require(self.start_seconds > 0, "start_seconds must be greater than 0", self.start_seconds)
        require(self.cache_limit_bytes >= 2**16, "cache_limit_bytes must be at least 64 KiB", self.cache_limit_bytes)
        ascending = all(a < b for a, b in zip([0, *self.cuts], self.cuts))
        require(ascending, "cuts must ascend from above 0", self.cuts)
        if self.layers is not None:
            parse_layers(self.layers)
        addresses = [*self.shards, *self.spares]
        require(len(set(addresses)) == len(addresses), "shards and spares must be different from each other", addresses)
        for name in ("shards", "spares"):
            for text in getattr(self, name):
                check_address(f"{name} must hold host:port", text)
        if self.next is not None:
            check_address("next must be host:port", self.next)


def parse_layers(text: str) -> range:
    """Layers from `first:last`. ValueError for anything else, and for none."""
    first, colon, last = text.partition(":")
    good = bool(colon) and first.isdecimal() and last.isdecimal() and int(first) < int(last)
    require(good, "layers must be first:last with first < last", text)
    return range(int(first), int(last))


def check_address(rule: str, text: str) -> None:
    """ValueError with `rule` unless the text is host:port."""
    try:
        Address.parse(text)
    except ValueError:
        require(False, rule, text)


@dataclass(kw_only=True)
class SplitSettings(LabSettings):
    """Everything a shard and a client read."""

    project: SplitProjectSettings

    @classmethod
    def draws_seed(cls) -> bool:
        """See `LabSettings.draws_seed`."""
        return True


register("split_inf", SplitSettings)
