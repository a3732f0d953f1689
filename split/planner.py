"""Which machine takes which layers: pure arithmetic over an architecture's numbers and the nodes'. Loads no torch.

A token passes all nodes in turn, so its time is the sum of what each node computes and of what each hop takes; every
node has to hold its layers, their keys and values, and room to work. Nodes are joined as a star: from one to another it
is the delay of both, through the narrower of their two links.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

FRAME_BYTES = 40
"""A frame's header and head, about."""
ANSWER_BYTES = 48
NF4_BYTES = 0.5 + 4 / 64
"""Of one weight: four bits, and a float32 scale for each block of 64 (arXiv 2305.14314; no double quantisation)."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model in numbers."""

    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    value_bytes: int
    """Of one number in the precision it computes in."""
    weight_bytes: float
    """Of one weight in a layer's matrices: `value_bytes`, or fewer when they are quantised."""
    layer_weights: int | None = None
    """Of the largest layer, all of its matrices; None: gated MLP and attention of the sizes above, nothing else."""
    unpacked_weights: int = 0
    """How many of these take `value_bytes` each whatever `weight_bytes` is, since nf4 does not pack them."""

    @property
    def layer_bytes(self) -> int:
        """Attention, MLP and norms of one layer."""
        attention = self.hidden_size * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        weights = attention + mlp if self.layer_weights is None else self.layer_weights
        unpacked = self.unpacked_weights + 2 * self.hidden_size
        return math.ceil((weights - self.unpacked_weights) * self.weight_bytes + unpacked * self.value_bytes)

    @property
    def table_bytes(self) -> int:
        """The embedding, and as many bytes again for the head (a tied one is copied to the last shard)."""
        return self.vocabulary * self.hidden_size * self.value_bytes

    @property
    def weights_bytes(self) -> int:
        """Everything, embedding and head both counted."""
        return self.layers * self.layer_bytes + 2 * self.table_bytes + self.hidden_size * self.value_bytes


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine."""

    name: str
    memory_bytes: int
    """What the model may take there."""
    weights_bytes_per_second: float
    """How fast it reads weights; a token reads all of a node's once."""
    layer_seconds: float
    """Measured time of one layer for one token; 0: from the line above."""
    head_seconds: float
    """Measured time of the head for one token; 0: likewise."""
    delay_seconds: float
    """One way, from it to the middle of the star."""
    link_bytes_per_second: float


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the nodes are to do."""

    context: int
    sessions: int
    prefill_chunk: int
    boundary_row_bytes: int
    """Of one position between two nodes."""
    overhead_bytes: int
    """Of each process, before any weight: libraries, a device's own context."""
    hop_seconds: float
    """Of each frame besides its link: serialising, waking up."""


@dataclass(frozen=True)
class Stay:
    """One node in a plan."""

    node: Node
    layers: range
    weights_bytes: int
    kv_bytes: int
    workspace_bytes: int
    compute_seconds: float
    hop_seconds: float
    """From it to the next node, or back to the client."""

    @property
    def needed_bytes(self) -> int:
        """All of it."""
        return self.weights_bytes + self.kv_bytes + self.workspace_bytes


@dataclass(frozen=True)
class Plan:
    """Cuts, and what they cost."""

    stays: Sequence[Stay]
    first_hop_seconds: float
    """From the client to the first node."""
    left_out: Sequence[tuple[Node, str]]
    """Nodes that take no layers, and why."""

    @property
    def token_seconds(self) -> float:
        """Of one text, one token after the other."""
        return self.first_hop_seconds + sum(stay.compute_seconds + stay.hop_seconds for stay in self.stays)


class FitsNowhere(ValueError):
    """No cut fits; the text says what is missing."""


def make_plan(architecture: Architecture, nodes: Sequence[Node], work: Work) -> Plan:
    """The cuts with the shortest token time over all subsets and orders of the nodes. Raises `FitsNowhere`."""
    best = _best(architecture, nodes, work)
    if best is None:
        raise FitsNowhere(_missing(architecture, nodes, work))
    used = {stay.node.name for stay in best.stays}
    left_out = [(node, _why(architecture, nodes, work, node, best)) for node in nodes if node.name not in used]
    return Plan(best.stays, best.first_hop_seconds, left_out)


def make_plan_with_cuts(architecture: Architecture, nodes: Sequence[Node], cuts: Sequence[int], work: Work) -> Plan:
    """What given cuts cost, whether they fit or not: node i takes layers cuts[i] to cuts[i + 1] - 1."""
    return _plan(architecture, nodes, [b - a for a, b in itertools.pairwise(cuts)], work)


def _best(architecture: Architecture, nodes: Sequence[Node], work: Work) -> Plan | None:
    plans = [
        _plan(architecture, order, counts, work)
        for size in range(1, min(len(nodes), architecture.layers) + 1)
        for order in itertools.permutations(nodes, size)
        if (counts := _fill(architecture, order, work)) is not None
    ]
    return min(plans, key=lambda plan: (plan.token_seconds, len(plan.stays)), default=None)


def _fill(architecture: Architecture, order: Sequence[Node], work: Work) -> list[int] | None:
    """Layers of each node: one at least, then as many as fit, fastest node first; None when they do not all fit."""
    room = [_room(architecture, node, index, len(order), work) for index, node in enumerate(order)]
    if min(room) < 1 or sum(room) < architecture.layers:
        return None
    counts = [1] * len(order)
    left = architecture.layers - len(order)
    for index in sorted(range(len(order)), key=lambda index: _layer_seconds(architecture, order[index])):
        more = min(left, room[index] - 1)
        counts[index] += more
        left -= more
    return counts


def _room(architecture: Architecture, node: Node, index: int, count: int, work: Work) -> int:
    """How many layers fit."""
    fixed = _fixed_bytes(architecture, index == 0, index == count - 1, work)
    return int((node.memory_bytes - fixed) // (architecture.layer_bytes + kv_bytes_of_layer(architecture, work)))


def kv_bytes_of_layer(architecture: Architecture, work: Work) -> int:
    """Keys and values of the whole context of all sessions."""
    return 2 * architecture.kv_heads * architecture.head_dim * architecture.value_bytes * work.context * work.sessions


def _fixed_bytes(architecture: Architecture, first: bool, last: bool, work: Work) -> int:
    return _ends_bytes(architecture, first, last) + _workspace_bytes(architecture, last, work)


def _ends_bytes(architecture: Architecture, first: bool, last: bool) -> int:
    norm = architecture.hidden_size * architecture.value_bytes
    return architecture.table_bytes * first + (architecture.table_bytes + norm) * last


def _workspace_bytes(architecture: Architecture, last: bool, work: Work) -> int:
    """A chunk of hidden states, its MLP's and its attention's scores, the head's logits, and the process itself."""
    widest = 4 * architecture.hidden_size + 3 * architecture.intermediate_size + architecture.heads * work.context
    logits = 2 * work.sessions * architecture.vocabulary * 4 if last else 0
    return work.overhead_bytes + work.prefill_chunk * widest * architecture.value_bytes + logits


def _layer_seconds(architecture: Architecture, node: Node) -> float:
    return node.layer_seconds or architecture.layer_bytes / node.weights_bytes_per_second


def _head_seconds(architecture: Architecture, node: Node) -> float:
    return node.head_seconds or architecture.table_bytes / node.weights_bytes_per_second


def _plan(architecture: Architecture, order: Sequence[Node], counts: Sequence[int], work: Work) -> Plan:
    stays, first = [], 0
    row_bytes = work.boundary_row_bytes + FRAME_BYTES
    for index, (node, count) in enumerate(zip(order, counts, strict=True)):
        last = index == len(order) - 1
        hop = _hop(node, None if last else order[index + 1], ANSWER_BYTES if last else row_bytes, work)
        stays.append(
            Stay(
                node,
                range(first, first := first + count),
                count * architecture.layer_bytes + _ends_bytes(architecture, index == 0, last),
                count * kv_bytes_of_layer(architecture, work),
                _workspace_bytes(architecture, last, work),
                count * _layer_seconds(architecture, node) + (_head_seconds(architecture, node) if last else 0.0),
                hop,
            )
        )
    return Plan(stays, _hop(order[0], None, FRAME_BYTES, work), [])


def _hop(one: Node, other: Node | None, size_bytes: int, work: Work) -> float:
    """Seconds of a frame from one node to another, or between a node and the client in the star's middle."""
    delay = one.delay_seconds + (other.delay_seconds if other else 0.0)
    narrowest = min(one.link_bytes_per_second, other.link_bytes_per_second if other else math.inf)
    return delay + size_bytes / narrowest + work.hop_seconds


def _why(architecture: Architecture, nodes: Sequence[Node], work: Work, left: Node, best: Plan) -> str:
    """What the best plan with this node would cost more."""
    if _room(architecture, left, 1, 3, work) < 1:
        need = (
            architecture.layer_bytes
            + kv_bytes_of_layer(architecture, work)
            + _workspace_bytes(architecture, False, work)
        )
        return f"one layer needs {need / 1e9:.2f} GB there, it has {left.memory_bytes / 1e9:.2f} GB"
    names = {stay.node.name for stay in best.stays} | {left.name}
    with_it = [
        plan
        for order in itertools.permutations([node for node in nodes if node.name in names])
        if (counts := _fill(architecture, order, work)) is not None
        and (plan := _plan(architecture, order, counts, work))
    ]
    if not with_it:
        return "embedding and head leave no room for a layer when it takes part"
    more = min(plan.token_seconds for plan in with_it) - best.token_seconds
    return f"with it a token would take {1000 * more:.1f} ms more"


def _missing(architecture: Architecture, nodes: Sequence[Node], work: Work) -> str:
    kv = architecture.layers * kv_bytes_of_layer(architecture, work)
    need = architecture.weights_bytes + kv
    have = sum(max(0, node.memory_bytes - _workspace_bytes(architecture, False, work)) for node in nodes)
    text = (
        f"the model needs {need / 1e9:.2f} GB ({architecture.weights_bytes / 1e9:.2f} GB of weights, {kv / 1e9:.2f} GB "
        f"of keys and values for {work.sessions} x {work.context} tokens), the nodes have {have / 1e9:.2f} GB besides "
        f"their workspace"
    )
    if need > have:
        return f"{text}: {(need - have) / 1e9:.2f} GB are missing"
    return f"{text}, but no cut leaves whole layers on each of them: each layer takes " + (
        f"{(architecture.layer_bytes + kv / architecture.layers) / 1e9:.2f} GB, embedding and head "
        f"{architecture.table_bytes / 1e9:.2f} GB each"
    )
