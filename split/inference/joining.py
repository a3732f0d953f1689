"""The engine that a model split over shard processes is; `lab.engine.base.open_engine` finds it here."""

from __future__ import annotations

from collections.abc import Sequence

from lab.engine.context import model_context
from lab.models.fingerprints import weights_fingerprints
from lab.models.shape import ModelShape
from lab.models.sources import load_config
from lab.network import client_side_tls, make_endpoint
from lab.settings import ModelSettings, NetworkSettings, UserError
from lab.wire import Endpoint, WireError
from split.chain.address import Address
from split.chain.boundary import Boundary
from split.inference.messages import PROTOCOL, table
from split.inference.sharded_model import ShardedModel
from split.transport.base import ShardLost
from split.transport.tcp import ChainMismatch, TcpChain


def join_shards(
    model: ModelSettings,
    network: NetworkSettings,
    *,
    shards: Sequence[str],
    spares: Sequence[str],
    boundary: str,
    context: int,
    prefill_chunk: int,
    start_seconds: float,
    recovery_seconds: float,
    line_seconds: float = 0.0,
) -> ShardedModel:
    """An engine over shards that serve already.

    Args:
        model: What they must hold; its config is read here, its weights are not.
        network: Key, TLS and deadlines.
        shards: Where they listen, `host:port` each, first to last.
        spares: Shards that may take the place of one with the same layers.
        boundary: How hidden states travel between them: a name of `Boundary`.
        context: Most tokens of a text; 0: what the model was made for. Never more than the shards take.
        prefill_chunk: Most tokens of a text in one pass.
        start_seconds: How long they may take to be there.
        recovery_seconds: How long to try to bring back one that was lost.
        line_seconds: How long to wait in line for room; who has a line of its own asks again instead.

    Raises:
        UserError: shards that are not there, or are not this model from its first layer to its last.
    """
    known = Boundary.__members__.get(boundary)
    if known is None:
        names = ", ".join(Boundary.__members__)
        raise UserError(f"boundary must be one of {names}, got {boundary!r}")
    try:
        chain = TcpChain(
            [Address.parse(text) for text in shards],
            [Address.parse(text) for text in spares],
            make_side(model, network, known, "client"),
            tls=client_side_tls(network),
            answer_seconds=network.request_timeout_seconds,
            start_seconds=start_seconds,
        )
    except ChainMismatch as error:
        raise UserError(f"project.shards: {error}") from None
    except (ShardLost, WireError) as error:
        raise UserError(f"project.shards must be reachable and hold this model: {error}") from None
    return ShardedModel(
        chain,
        vocabulary_size=ModelShape.of(load_config(model)).vocabulary,
        context=min(chain.context, model_context(load_config(model), context)),
        prefill_chunk=prefill_chunk,
        recovery_seconds=recovery_seconds,
        line_seconds=line_seconds,
    )


def make_side(model: ModelSettings, network: NetworkSettings, boundary: Boundary, role: str) -> Endpoint:
    """Our side of the wire: `client` talks to shards, `shard` to both. UserError for what makes no sense."""
    return make_endpoint(
        network,
        role=role,
        peer_roles=frozenset({"shard"} if role == "client" else {"client", "shard"}),
        table=table(network.max_frame_bytes),
        protocol=PROTOCOL,
        fingerprints=fingerprints(model, boundary),
    )


def fingerprints(model: ModelSettings, boundary: Boundary) -> dict[str, str]:
    """What all roles must have alike: the weights, and how hidden states travel."""
    return weights_fingerprints(model) | {"boundary": boundary.name}
