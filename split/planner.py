"""Assignment of layers to machines, by arithmetic over the sizes of the model and of the machines. Loads no torch.

A token passes all nodes in order, so its time is the sum of all compute times and of all hops. Each node must hold its
layers, their keys and values, and a workspace. The nodes form a star: a hop between two of them takes the delay of
both, at the speed of the slower of their two links.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from lab.settings import ArchitectureSettings, Quantization

FRAME_BYTES = 40
"""Size of a frame's header and head, about."""
ANSWER_BYTES = 48


def bytes_of_weight(quantization: Quantization, value_bytes: int) -> float:
    """Size of a weight in a matrix of a model whose values take `value_bytes`.

    nf4: four bits, and a float32 scale for each block of 64 (arXiv 2305.14314; no double quantisation); int4: four, and
    a scale and a zero in bfloat16 for each 32; int8: twice that (`lab.models.packed`).
    """
    sizes = {Quantization.nf4: 0.5 + 4 / 64, Quantization.int8: 1 + 8 / 32, Quantization.int4: 0.5 + 4 / 32}
    return sizes.get(quantization, value_bytes)


@dataclass(kw_only=True)
class Architecture(ArchitectureSettings):
    """Sizes of a model, in the precision that it computes in."""

    value_bytes: int
    """Size of one value."""
    weight_bytes: float
    """Size of one weight in a layer's matrices: `value_bytes`, or less when they are quantised."""
    head_weight_bytes: float
    """Size of one weight in the head: `value_bytes`, or that of int8 in an int8 or int4 model."""
    layer_weights: int | None = None
    """Weights in all matrices of the largest layer; None: those of attention and a gated MLP of the sizes above."""
    unpacked_weights: int = 0
    """Number of these weights that take `value_bytes` each in any case, since they are in no linear layer."""

    @property
    def layer_bytes(self) -> int:
        """Size of one layer: attention, MLP and norms."""
        attention = self.hidden_size * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        weights = attention + mlp if self.layer_weights is None else self.layer_weights
        unpacked = self.unpacked_weights + 2 * self.hidden_size
        return math.ceil((weights - self.unpacked_weights) * self.weight_bytes + unpacked * self.value_bytes)

    @property
    def table_bytes(self) -> int:
        """Size of the embedding."""
        return self.vocabulary * self.hidden_size * self.value_bytes

    @property
    def head_bytes(self) -> int:
        """Size of the head (a tied one is copied to the last shard)."""
        return math.ceil(self.vocabulary * self.hidden_size * self.head_weight_bytes)

    @property
    def weights_bytes(self) -> int:
        """Size of the whole model, embedding and head both counted."""
        ends = self.table_bytes + self.head_bytes + self.hidden_size * self.value_bytes
        return self.layers * self.layer_bytes + ends


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine."""

    name: str
    memory_bytes: int
    """Memory that the model may take."""
    weights_bytes_per_second: float
    """Speed of reading weights; each token reads all weights of a node once."""
    layer_seconds: float
    """Measured time of one layer for one token; 0: estimated from `weights_bytes_per_second`."""
    head_seconds: float
    """Measured time of the head for one token; 0: estimated likewise."""
    delay_seconds: float
    """One-way delay to the middle of the star."""
    link_bytes_per_second: float


@dataclass(frozen=True, kw_only=True)
class Work:
    """Load that the nodes must carry."""

    context: int
    sessions: int
    prefill_chunk: int
    boundary_row_bytes: int
    """Size of one position's hidden states between two nodes."""
    overhead_bytes: int
    """Memory of each process before any weight: libraries, a device's own context."""
    hop_seconds: float
    """Time of each frame in addition to its link: serialising, waking up."""


@dataclass(frozen=True)
class Placement:
    """Layers on one node, and their cost."""

    node: Node
    layers: range
    weights_bytes: int
    kv_bytes: int
    workspace_bytes: int
    compute_seconds: float
    hop_seconds: float
    """Time to the next node, or back to the client."""


@dataclass(frozen=True)
class Plan:
    """All layers on nodes, and the time of a token through them."""

    placements: Sequence[Placement]
    first_hop_seconds: float
    """Time from the client to the first node."""
    left_out: Sequence[tuple[Node, str]]
    """Nodes that take no layers, with the reason."""

    @property
    def token_seconds(self) -> float:
        """Time of each token of a single text."""
        return self.first_hop_seconds + sum(placed.compute_seconds + placed.hop_seconds for placed in self.placements)


class FitsNowhere(ValueError):
    """No cut fits; the message says how much memory is missing."""


def make_plan(architecture: Architecture, nodes: Sequence[Node], work: Work) -> Plan:
    """The cuts with the shortest token time over all subsets and orders of the nodes. Raises `FitsNowhere`."""
    plans = [
        _plan(architecture, order, counts, work)
        for size in range(1, min(len(nodes), architecture.layers) + 1)
        for order in itertools.permutations(nodes, size)
        if (counts := _fill(architecture, order, work)) is not None
    ]
    best = min(plans, key=lambda plan: (plan.token_seconds, len(plan.placements)), default=None)
    if best is None:
        raise FitsNowhere(_missing(architecture, nodes, work))
    used = {placed.node.name for placed in best.placements}
    left_out = [(node, _why(architecture, nodes, work, node, best)) for node in nodes if node.name not in used]
    return Plan(best.placements, best.first_hop_seconds, left_out)


def make_plan_with_cuts(architecture: Architecture, nodes: Sequence[Node], cuts: Sequence[int], work: Work) -> Plan:
    """The plan with given cuts, whether they fit or not: node i takes layers cuts[i] to cuts[i + 1] - 1."""
    return _plan(architecture, nodes, [b - a for a, b in itertools.pairwise(cuts)], work)


def _fill(architecture: Architecture, order: Sequence[Node], work: Work) -> list[int] | None:
    """Number of layers of each node: one, then as many as fit, fastest node first; None when not all of them fit."""
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
    """Number of layers that fit."""
    last = index == count - 1
    fixed = _ends_bytes(architecture, index == 0, last) + _workspace_bytes(architecture, last, work)
    return int((node.memory_bytes - fixed) // (architecture.layer_bytes + kv_bytes_of_layer(architecture, work)))


def kv_bytes_of_layer(architecture: Architecture, work: Work) -> int:
    """Size of a layer's keys and values for the whole context of all sessions."""
    return 2 * architecture.kv_heads * architecture.head_dim * architecture.value_bytes * work.context * work.sessions


def _ends_bytes(architecture: Architecture, first: bool, last: bool) -> int:
    norm = architecture.hidden_size * architecture.value_bytes
    return architecture.table_bytes * first + (architecture.head_bytes + norm) * last


def _workspace_bytes(architecture: Architecture, last: bool, work: Work) -> int:
    """Size of a chunk's hidden states, MLP values and attention scores, of the head's logits, and of the process."""
    widest = 4 * architecture.hidden_size + 3 * architecture.intermediate_size + architecture.heads * work.context
    logits = 2 * work.sessions * architecture.vocabulary * 4 if last else 0
    return work.overhead_bytes + work.prefill_chunk * widest * architecture.value_bytes + logits


def _layer_seconds(architecture: Architecture, node: Node) -> float:
    return node.layer_seconds or architecture.layer_bytes / node.weights_bytes_per_second


def _plan(architecture: Architecture, order: Sequence[Node], counts: Sequence[int], work: Work) -> Plan:
    placements, first = [], 0
    row_bytes = work.boundary_row_bytes + FRAME_BYTES
    for index, (node, count) in enumerate(zip(order, counts, strict=True)):
        last = index == len(order) - 1
        hop = _hop(node, None if last else order[index + 1], ANSWER_BYTES if last else row_bytes, work)
        head = node.head_seconds or architecture.head_bytes / node.weights_bytes_per_second
        placements.append(
            Placement(
                node,
                range(first, first := first + count),
                count * architecture.layer_bytes + _ends_bytes(architecture, index == 0, last),
                count * kv_bytes_of_layer(architecture, work),
                _workspace_bytes(architecture, last, work),
                count * _layer_seconds(architecture, node) + (head if last else 0.0),
                hop,
            )
        )
    return Plan(placements, _hop(order[0], None, FRAME_BYTES, work), [])


def _hop(one: Node, other: Node | None, size_bytes: int, work: Work) -> float:
    """Seconds of a frame from one node to another, or between a node and the client in the star's middle."""
    delay = one.delay_seconds + (other.delay_seconds if other else 0.0)
    narrowest = min(one.link_bytes_per_second, other.link_bytes_per_second if other else math.inf)
    return delay + size_bytes / narrowest + work.hop_seconds


def _why(architecture: Architecture, nodes: Sequence[Node], work: Work, left: Node, best: Plan) -> str:
    """Reason to leave a node out: its lack of memory, or the time that the best plan with it would add."""
    if _room(architecture, left, 1, 3, work) < 1:
        workspace = _workspace_bytes(architecture, False, work)
        need = architecture.layer_bytes + kv_bytes_of_layer(architecture, work) + workspace
        return f"one layer needs {need / 1e9:.2f} GB there, it has {left.memory_bytes / 1e9:.2f} GB"
    names = {placed.node.name for placed in best.placements} | {left.name}
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
        f"{(architecture.layer_bytes + kv / architecture.layers) / 1e9:.2f} GB, the embedding "
        f"{architecture.table_bytes / 1e9:.2f} GB and the head {architecture.head_bytes / 1e9:.2f} GB"
    )
