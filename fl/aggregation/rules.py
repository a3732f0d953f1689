"""The server's rule from the adapters of a round's replies to the next adapter of all sites.

Every rule gives the same bytes for the same replies in any order. They differ in how near they come to the weighted
mean of what the sites' models became, which is a mean of products B A and not of factors:

    average         means of A and of B; their product is not the mean product (FedAvg on LoRA)
    ffa, rolora     exact: one factor is the same at all sites, so the mean of the other one is the mean product
    stack           exact: the products side by side are one product of the sum of their ranks (FLoRA, arXiv 2409.05976)
    svd             the nearest product of the run's rank (FlexLoRA, arXiv 2402.11505), plus what `residual_rank` holds

Nothing is merged into the base model: in 4 bits that would round the update away. What exceeds the rank that is trained
is kept in further rows of the adapter, which sites hold as a second, frozen adapter. An adapter is therefore always
whole: its first `rank` rows are trained, and all of its rows together are what has been learned.

Memory: the exact means need the same for any number of sites. stack and svd keep the factors of every reply until the
end of the round: the exact sum of K products of rank R has rank K R, and no smaller state holds it.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cache, partial
from typing import NamedTuple

import torch
from msgspec.structs import replace
from typing_extensions import override

from fl.adapters import Adapter, AdapterIndex, PackedAdapter
from fl.aggregation.exact import ExactMean
from fl.aggregation.factors import Factors, Tensor
from fl.aggregation.optimizer import ServerOptimizer
from fl.aggregation.parts import (
    A,
    B,
    factors_of,
    index_of_halves,
    index_of_rank,
    modules_of,
    sent_halves,
)
from fl.settings import Aggregation, Share, WireDtype
from lab.faults import Fault

ROW_NORM = math.sqrt(1 / 3)
"""Norm of a row of A after svd: that of a new adapter's rows, so that learning rates keep their meaning."""


class RoundSum(ABC):
    """The adapters of one round, folded into the next one."""

    @abstractmethod
    def expected(self, site: int | None) -> AdapterIndex:
        """The index that a site's reply must have. ValueError when the site must say which one it is."""

    @abstractmethod
    def fold(self, reply: PackedAdapter, site: int | None, weight: int) -> None:
        """Add a reply that has the expected index. ValueError, and nothing added, for values that cannot be added."""

    @abstractmethod
    def result(self) -> PackedAdapter:
        """The next adapter."""

    def ledger(self) -> dict[str, float]:
        """Norms of what was kept and lost; empty where nothing can be lost."""
        return {}


@dataclass(eq=False)
class Aggregator:
    """The rule of a run. `index` describes the adapter that sites receive next."""

    index: AdapterIndex
    rule: Aggregation = Aggregation.average
    optimizer: ServerOptimizer | None = None
    """The server's step towards the mean; None: the mean itself."""
    share: Share = Share.both

    def start(self, initial: Adapter) -> PackedAdapter:
        """The first adapter, as it is sent. ValueError when it does not fit the index."""
        return PackedAdapter.pack(initial, self.index)

    def begin(self, server_round: int, sent: PackedAdapter | None) -> RoundSum:
        """An empty sum for the replies to `sent`, which `average` alone does not need."""
        return MeanSum(self, sent, sent_halves(self.rule, self.share, server_round))

    @property
    def has_state(self) -> bool:
        """Whether a checkpoint must hold more than the adapter."""
        return self.optimizer is not None

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold besides the adapter."""
        return self.optimizer.state() if self.optimizer else {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint's `state`; then `start` takes its adapter, as it was sent."""
        if self.optimizer:
            self.optimizer.load_state(state)


class MeanSum(RoundSum):
    """The exact means of the factors that were trained; the other ones stay as they were sent."""

    def __init__(self, aggregator: Aggregator, sent: PackedAdapter | None, halves: tuple[str, ...]) -> None:
        self._aggregator = aggregator
        self._sent = sent
        self._index = index_of_halves(aggregator.index, halves)
        self._mean = ExactMean(self._index.size)

    @override
    def expected(self, site: int | None) -> AdapterIndex:
        return self._index

    @override
    def fold(self, reply: PackedAdapter, site: int | None, weight: int) -> None:
        self._mean.fold(reply.to_float32(), weight)

    @override
    def result(self) -> PackedAdapter:
        whole, optimizer, mean = self._aggregator.index, self._aggregator.optimizer, self._mean.mean()
        if optimizer is None and self._index == whole:
            return PackedAdapter.from_float32(mean, whole)
        assert self._sent is not None, "what was not trained is what was sent, and an optimizer steps from it"
        sent = self._sent.unpack()
        means = PackedAdapter(replace(self._index, dtype=WireDtype.float32), mean).unpack()
        following = optimizer.step(sent, means) if optimizer else means
        return PackedAdapter.pack(sent | {name: tensor.float() for name, tensor in following.items()}, whole)


@dataclass(eq=False)
class ProductAggregator(Aggregator):
    """stack and svd: sums of products, for sites of the same rank or of different ones."""

    _: KW_ONLY
    rank: int
    """The run's rank: the rows of its adapter that are trained."""
    scale: float
    """alpha / rank of the run, in which every B travels."""
    site_ranks: Sequence[int]
    """Rank of each site by its number; empty: the run's rank for all."""
    residual_rank: int
    """Most rows of a module that are kept beyond the run's rank."""
    fresh: Callable[[int], Adapter]
    """A new adapter of the run's rank for the round after this one; for 0 the one that the run starts from."""
    _lost: float = field(default=0.0, init=False)
    _goes_on: bool = field(default=False, init=False)

    @override
    def start(self, initial: Adapter) -> PackedAdapter:
        self.index = AdapterIndex.of(initial, self.index.dtype)
        packed = super().start(initial)
        if self._goes_on or not self.site_ranks or all(not initial[name].any() for name in initial if B in name):
            return packed
        # A site of a lower rank trains the first rows: those must be the best ones of an adapter that has learned.
        total = ProductSum(self, 0, packed)
        total.fold(packed, None, 1)
        return total.result()

    @override
    def begin(self, server_round: int, sent: PackedAdapter | None) -> RoundSum:
        assert sent is not None, "a sum of products needs the rows that sites did not train"
        self._goes_on = True
        return ProductSum(self, server_round, sent)

    @property
    @override
    def has_state(self) -> bool:
        return True

    @override
    def state(self) -> dict[str, Tensor]:
        goes_on = torch.tensor(self._goes_on)  # not before round 1: a run that goes on from there begins like any
        return {"lost_norm": torch.tensor(self._lost, dtype=torch.float64), "goes_on": goes_on}

    @override
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._lost, self._goes_on = float(state["lost_norm"]), bool(state["goes_on"])

    def rank_of(self, site: int | None) -> int:
        """The rank that a site trains."""
        if not self.site_ranks:
            return self.rank
        if site is None or site >= len(self.site_ranks):
            raise ValueError(f"partition-id must be in [0, {len(self.site_ranks)}) for project.site_ranks, got {site}")
        return self.site_ranks[site]

    def finish(self, adapter: Adapter, lost: float) -> PackedAdapter:
        """Pack the next adapter; `lost` is the norm of what it no longer holds."""
        self.index = AdapterIndex.of(adapter, self.index.dtype)
        self._lost += lost
        return PackedAdapter.pack(adapter, self.index)

    @property
    def lost(self) -> float:
        """Sum of the norms that all rounds have lost: a bound of the distance to a run that loses nothing."""
        return self._lost


@dataclass(frozen=True)
class _Reply:
    state: dict[str, Tensor]
    rank: int
    weight: int
    order: tuple[int, bytes]
    """Its place in the sum, whenever it arrived: by site, then by content."""


class ProductSum(RoundSum):
    """sum(w / W * (B A of the rows that a site trained + B A of the rows that it did not)), by module."""

    def __init__(self, aggregator: ProductAggregator, server_round: int, sent: PackedAdapter) -> None:
        self._aggregator = aggregator
        self._round = server_round
        self._sent = sent
        self._replies: list[_Reply] = []
        self._ledger: dict[str, float] = {}

    @override
    def expected(self, site: int | None) -> AdapterIndex:
        return index_of_rank(self._sent.index, self._aggregator.rank_of(site))

    @override
    def fold(self, reply: PackedAdapter, site: int | None, weight: int) -> None:
        state = reply.unpack()
        if odd := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
            raise ValueError(f"{odd[0]} must be finite")
        order = (-1 if site is None else site, hashlib.blake2b(reply.array.tobytes()).digest())
        rank = next(tensor.shape[0] for name, tensor in state.items() if A in name)
        self._replies.append(_Reply(state, rank, weight, order))

    @override
    def result(self) -> PackedAdapter:
        aggregator = self._aggregator
        sent = self._sent.unpack()
        fresh = cache(lambda: aggregator.fresh(self._round))  # made where it is needed
        adapter: dict[str, Tensor] = {}
        squares: list[tuple[float, float, float]] = []
        self._replies.sort(key=lambda reply: reply.order)
        for module in modules_of(sent):
            total = self._total(module, factors_of(sent, module))
            keep = _stacked if aggregator.rule is Aggregation.stack else _nearest
            kept = keep(total, partial(lambda name: factors_of(fresh(), name), module), aggregator)
            adapter |= {f"{module}{A}weight": kept.A_RI.float(), f"{module}{B}weight": kept.B_OR.float()}
            squares.append((kept.update_square, kept.residual_square, kept.lost_square))
        update, residual, lost = (aggregator.scale * math.sqrt(math.fsum(part)) for part in zip(*squares))
        packed = aggregator.finish({name: adapter[name] for name in sorted(adapter)}, lost)
        self._ledger = {"update_norm": update, "residual_norm": residual, "lost_norm": lost}
        self._ledger["lost_norm_total"] = aggregator.lost
        return packed

    @override
    def ledger(self) -> dict[str, float]:
        return self._ledger

    def _total(self, module: str, sent: tuple[Tensor, Tensor]) -> Factors:
        """The exact sum, as factors; the rows that were sent come first, the replies in their order after them."""
        total_weight = sum(reply.weight for reply in self._replies)
        weight_of_rank: Counter[int] = Counter()
        for reply in self._replies:
            weight_of_rank[reply.rank] += reply.weight
        B_sent, A_sent = sent
        untrained = [
            sum(weight for rank, weight in weight_of_rank.items() if rank <= row) / total_weight
            for row in range(A_sent.shape[0])
        ]
        parts: list[tuple[Tensor | float, Tensor, Tensor]] = [
            (torch.tensor(untrained, dtype=torch.float64), B_sent, A_sent),
            *((reply.weight / total_weight, *factors_of(reply.state, module)) for reply in self._replies),
        ]
        return Factors.weighted_sum(parts)


class Kept(NamedTuple):
    """A module of the next adapter; squared norms of the sum, of its rows that are frozen, and of what is lost."""

    B_OR: Tensor
    A_RI: Tensor
    update_square: float
    residual_square: float
    lost_square: float


Fresh = Callable[[], tuple[Tensor, Tensor]]
"""B and A of a module of a new adapter."""


def _stacked(total: Factors, fresh: Fresh, aggregator: ProductAggregator) -> Kept:
    """The whole sum in frozen rows, behind a new adapter."""
    total = total.no_larger_than_dense()
    if total.rank > aggregator.residual_rank:
        raise Fault(
            f"project.residual_rank must be at least {total.rank} to stack the adapters of all sites, got "
            f"{aggregator.residual_rank}"
        )
    B_OR, A_RI = fresh()
    # |B A|^2 = trace(B' B A A'), which needs no product of full size.
    square = float(((total.B_OR.T @ total.B_OR) * (total.A_RI @ total.A_RI.T)).sum())
    B_new, A_new = torch.cat([B_OR.double(), total.B_OR], 1), torch.cat([A_RI.double(), total.A_RI])
    return Kept(B_new, A_new, square, square, 0.0)


def _nearest(total: Factors, fresh: Fresh, aggregator: ProductAggregator) -> Kept:
    """The largest singular values in the rows that are trained, the next ones in frozen rows."""
    found, rank = total.decomposed(), aggregator.rank
    count = min(found.numerical_rank, rank + aggregator.residual_rank)
    U_OK, S_K, Vh_KI = found.best(count)
    B_OK, A_KI = U_OK * (S_K / ROW_NORM), Vh_KI * ROW_NORM
    if count < rank:  # rows without weight are those of a new adapter, so that they can learn: zero times zero cannot
        B_new, A_new = fresh()
        B_OK = torch.cat([B_OK, torch.zeros_like(B_new[:, count:], dtype=torch.float64)], 1)
        A_KI = torch.cat([A_KI, A_new[count:].double()])
    squares = found.S_R.square()
    return Kept(B_OK, A_KI, float(squares.sum()), float(squares[rank:count].sum()), float(squares[count:].sum()))


def make_aggregator(
    rule: Aggregation,
    index: AdapterIndex,
    *,
    rank: int,
    scale: float,
    site_ranks: Sequence[int],
    residual_rank: int,
    fresh: Callable[[int], Adapter],
    optimizer: ServerOptimizer | None = None,
    share: Share = Share.both,
) -> Aggregator:
    """The rule of a run whose first adapter has this index."""
    if not rule.takes_ranks:
        return Aggregator(index, rule, optimizer, share)
    return ProductAggregator(
        index, rule, rank=rank, scale=scale, site_ranks=site_ranks, residual_rank=residual_rank, fresh=fresh
    )
