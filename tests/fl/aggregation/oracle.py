"""Small adapters, replies to them, and the dense float64 mean that every rule is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fl.adapters import Adapter, AdapterIndex, PackedAdapter
from fl.aggregation.parts import A, B, cut, factors_of, modules_of, of_halves, trained_halves
from fl.aggregation.rules import Aggregator, make_aggregator
from fl.settings import Aggregation, WireDtype

SHAPES = {"base_model.model.l.0.q_proj": (40, 64), "base_model.model.l.0.v_proj": (64, 48)}
"""(O, I) of each module."""
SCALE = 1.7

Dense = dict[str, torch.Tensor]


def adapter_of(rank: int, seed: int, *, is_new: bool = False) -> dict[str, torch.Tensor]:
    """A random adapter, or a new one, whose B is zero."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for module, (outputs, inputs) in SHAPES.items():
        state[f"{module}{A}weight"] = torch.randn(rank, inputs, generator=generator) / inputs**0.5
        state[f"{module}{B}weight"] = torch.randn(outputs, rank, generator=generator) * (not is_new)
    return {name: state[name] for name in sorted(state)}


def aggregator_of(
    rule: Aggregation,
    rank: int,
    *,
    site_ranks: Sequence[int] = (),
    residual_rank: int = 0,
    initial: Adapter | None = None,
) -> Aggregator:
    """The rule over adapters of these shapes."""
    return make_aggregator(
        rule,
        AdapterIndex.of(initial or adapter_of(rank, 0, is_new=True), WireDtype.float32),
        rank=rank,
        scale=SCALE,
        site_ranks=site_ranks,
        residual_rank=residual_rank,
        fresh=lambda server_round: adapter_of(rank, server_round, is_new=True),
    )


@dataclass(frozen=True)
class Reply:
    """An adapter that a site has trained from what it was sent."""

    site: int
    weight: int
    sent: Adapter
    trained: Adapter
    rank: int

    def dense(self) -> Dense:
        """The product of the site's whole model, in float64."""
        first, rest = cut(self.sent, self.rank)
        mine, frozen = dense(first | self.trained), dense(rest)
        return {module: mine[module] + frozen.get(module, 0) for module in mine}


def replies_to(sent: Adapter, rule: Aggregation, server_round: int, ranks: Sequence[int]) -> list[Reply]:
    """Random changes, of very different sizes, of the rows that each site trains."""
    replies = []
    for site, rank in enumerate(ranks):
        generator = torch.Generator().manual_seed(100 * server_round + site)
        start = of_halves(cut(sent, rank)[0], trained_halves(rule, server_round))
        trained = {name: x + torch.randn(x.shape, generator=generator) * 3.0**-site for name, x in start.items()}
        replies.append(Reply(site, 3 + 7 * site, sent, trained, rank))
    return replies


def folded(aggregator: Aggregator, server_round: int, sent: PackedAdapter, replies: Sequence[Reply]) -> PackedAdapter:
    """The next adapter."""
    total = aggregator.begin(server_round, sent)
    for reply in replies:
        packed = PackedAdapter.pack(reply.trained, AdapterIndex.of(reply.trained, WireDtype.float32))
        assert packed.index == total.expected(reply.site)
        total.fold(packed, reply.site, reply.weight)
    return total.result()


def dense(state: Adapter) -> Dense:
    """scale * B A of every module, in float64."""
    return {
        module: SCALE * (factors_of(state, module)[0].double() @ factors_of(state, module)[1].double())
        for module in modules_of(state)
    }


def mean_product(replies: Sequence[Reply]) -> Dense:
    """The weighted mean of the sites' products: the oracle."""
    total = sum(reply.weight for reply in replies)
    products = [reply.dense() for reply in replies]
    return {
        module: sum((reply.weight / total) * product[module] for reply, product in zip(replies, products))  # type: ignore[misc]
        for module in products[0]
    }


def distance(one: Dense, other: Dense) -> float:
    """Norm of the difference."""
    return float(np.sqrt(sum(float((one[module] - other[module]).square().sum()) for module in one)))


def norm(one: Dense) -> float:
    """Frobenius norm over all modules."""
    return distance(one, {module: torch.zeros_like(product) for module, product in one.items()})
