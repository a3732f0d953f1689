"""Parts of an adapter: its two factors, the first rows of its rank, and which of both a site trains.

The product of a module is scale * B A, with A [R, I] and B [O, R]: R rank, I inputs, O outputs of the linear layer.
Knows nothing about messages, replies or models.
"""

from collections.abc import Mapping

import torch

from fl.adapters import Adapter, AdapterIndex, Shape
from fl.settings import Aggregation, Share

A, B = ".lora_A.", ".lora_B."
BOTH = (A, B)


def trained_halves(aggregation: Aggregation, server_round: int) -> tuple[str, ...]:
    """The factors that every site trains and sends in a round (from 1).

    ffa (arXiv 2403.12313) trains B alone. rolora (arXiv 2409.02346) alternates, B first: a new adapter's B is zero, and
    then the gradient of A is zero, too.
    """
    if aggregation is Aggregation.ffa:
        return (B,)
    if aggregation is Aggregation.rolora:
        return (B,) if server_round % 2 else (A,)
    return BOTH


def sent_halves(aggregation: Aggregation, share: Share, server_round: int) -> tuple[str, ...]:
    """The factors of those that a site sends; it keeps the others to itself (FedSA-LoRA, arXiv 2410.01463)."""
    return (A,) if share is Share.A else trained_halves(aggregation, server_round)


def of_halves(state: Adapter, halves: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The tensors of these factors."""
    return {name: tensor for name, tensor in state.items() if any(half in name for half in halves)}


def index_of_halves(index: AdapterIndex, halves: tuple[str, ...]) -> AdapterIndex:
    """The index of `of_halves`; the same one for both."""
    if halves == BOTH:
        return index
    kept = [(name, shape) for name, shape in zip(index.names, index.shapes) if any(half in name for half in halves)]
    return AdapterIndex(tuple(name for name, _ in kept), tuple(shape for _, shape in kept), index.dtype)


def index_of_rank(index: AdapterIndex, rank: int) -> AdapterIndex:
    """The index of the same modules' adapter of another rank."""

    def resized(name: str, shape: Shape) -> Shape:
        return (rank, shape[1]) if A in name else (shape[0], rank)

    shapes = tuple(resized(name, shape) for name, shape in zip(index.names, index.shapes))
    return AdapterIndex(index.names, shapes, index.dtype)


def module_of(name: str) -> str:
    """The module that a tensor of an adapter belongs to."""
    return name.partition(".lora_")[0]


def modules_of(state: Adapter) -> list[str]:
    """The modules of an adapter, in its own order."""
    return list(dict.fromkeys(module_of(name) for name in state))


def factors_of(state: Adapter, module: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(B [O, R], A [R, I]) of a module."""
    return state[f"{module}{B}weight"], state[f"{module}{A}weight"]


def ranks_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The rank of each module, from its tensors' shapes."""
    return {module_of(name): shape[0] for name, shape in shapes.items() if A in name}


def cut(state: Adapter, rank: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The first `rank` of each module's rank, and the rest; a module without a rest is not in the second part."""
    first, rest = {}, {}
    for name, tensor in state.items():
        dim = 1 if B in name else 0
        if any(half in name for half in BOTH) and tensor.shape[dim] > rank:
            first[name], rest[name] = tensor.split([rank, tensor.shape[dim] - rank], dim)
        else:
            first[name] = tensor
    return first, rest


def scaled(state: Adapter, factor: float) -> dict[str, torch.Tensor]:
    """The same adapter for another scale: B times `factor`; the same tensors when it is 1."""
    return {name: tensor * factor if B in name and factor != 1 else tensor for name, tensor in state.items()}
