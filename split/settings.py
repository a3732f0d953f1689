"""Settings of a chain of shards, and of inference over one."""

from dataclasses import dataclass
from enum import Enum

from lab.engine.settings import CacheSettings
from lab.settings import LabSettings, register, require, require_above, require_at_least
from lab.text.settings import TextSettings
from split.chain.address import Address
from split.chain.boundary import Boundary


class TransportKind(Enum):
    """Transport of hidden states. `tcp`: our frames, every system; `rpc`: torch.distributed.rpc, trusted links only;
    `inproc`: all shards in the process of the client or trainer."""

    tcp = "tcp"
    rpc = "rpc"
    inproc = "inproc"


@dataclass(kw_only=True)
class ChainSettings:
    """Shards, and how their client finds them. In training, the client is the trainer.

    Both roles read one config; a field that only one of them uses begins with its name.
    """

    transport: TransportKind
    layers: str | None
    """Shard: its layers, `first:last`, counted from 0; `last` is not included."""
    next: str | None
    """Shard: address of the next one, `host:port`, as seen from this machine; null: the client names it."""
    rank: int
    """Shard over rpc: its place in the group, from 1; the client is 0."""
    world_size: int
    """Over rpc: processes of the group, client included; the client opens it at `network.host` and `port`."""
    follow_stdin: bool
    """Shard: end when standard input ends, so that it does not outlive the process that started it."""
    max_connections: int
    """Shard: concurrent connections; each client takes at most two."""
    shards: list[str]
    """Client: addresses of the shards, `host:port` each, first to last."""
    spares: list[str]
    """Client: shards that may replace a lost one with the same layers; in training they need its checkpoint part."""
    local_shards: int
    """Client: number of shards to start on this machine and to end afterwards; 0: none."""
    cuts: list[int]
    """Client: first layer of each local shard but the first; []: equal parts."""
    recovery_seconds: float
    """Client: how long to try to bring back a lost shard; 0: its loss ends the run."""
    start_seconds: float
    """Client: time limit for the shards to be reachable at first."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "max_connections")
        require_at_least(0, self, "local_shards", "rank", "recovery_seconds")
        require_above(0, self, "start_seconds")
        require(self.world_size == 0 or self.world_size >= 2, "world_size must be 0 or at least 2", self.world_size)
        ascending = all(a < b for a, b in zip([0, *self.cuts], self.cuts))
        require(ascending, "cuts must ascend from above 0", self.cuts)
        if self.layers is not None:
            parse_layers(self.layers)
        addresses = [*self.shards, *self.spares]
        require(len(set(addresses)) == len(addresses), "shards and spares must be different from each other", addresses)
        for name in ("shards", "spares"):
            for address in getattr(self, name):
                _check_address(f"{name} must hold host:port", address)
        if self.next is not None:
            _check_address("next must be host:port", self.next)


@dataclass(kw_only=True)
class SplitProjectSettings(TextSettings, CacheSettings, ChainSettings):
    """Inference over a chain. Prompt, sampling and `prefill_chunk` are the client's; the cache is each shard's."""

    boundary: Boundary
    """Number format of hidden states on the wire; the same at every shard and client."""
    line_seconds: float
    """Client: how long to wait in line for room at the shards; 0: not at all."""
    max_waiting: int
    """Shard: requests that may wait in line for room; further ones are refused at once. 0: no line."""
    idle_seconds: float
    """Shard: a request unused for this long can lose its room to a waiting one; its client rebuilds it when needed."""
    awake_seconds: float
    """Shard: after a pass it polls for the next one this long before it sleeps; 0: it sleeps at once."""

    def __post_init__(self) -> None:
        TextSettings.__post_init__(self)
        CacheSettings.__post_init__(self)
        ChainSettings.__post_init__(self)
        require_at_least(0, self, "line_seconds", "max_waiting", "idle_seconds", "awake_seconds")


def parse_layers(text: str) -> range:
    """Layers from `first:last`. ValueError for anything else, and for an empty range."""
    first, colon, last = text.partition(":")
    good = bool(colon) and first.isdecimal() and last.isdecimal() and int(first) < int(last)
    require(good, "layers must be first:last with first < last", text)
    return range(int(first), int(last))


def _check_address(rule: str, text: str) -> None:
    try:
        Address.parse(text)
    except ValueError:
        require(False, rule, text)


@register("split_inf")
@dataclass(kw_only=True)
class SplitSettings(LabSettings):
    """Settings of a shard and of a client."""

    project: SplitProjectSettings

    draws_seed = True
    compiles_layers = True
    takes_adapter = True

    def __post_init__(self) -> None:
        super().__post_init__()
        is_elsewhere = bool(self.project.shards) and self.device.compile is True
        require(not is_elsewhere, "device.compile must be false or auto where project.shards has its own", True)
