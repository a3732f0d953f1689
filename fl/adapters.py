"""An adapter in a model and packed for the wire: LoRA tensors only, one flat array and a small index.

An adapter (a *state*) is a `dict[str, torch.Tensor]` whose names are PEFT's own (`...q_proj.lora_A.weight`, without the
adapter's name), in the canonical order: sorted by name. Knows nothing about messages, rounds, weights or files.
"""

import bz2
import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from msgspec import Meta
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import nn

from fl.settings import WireDtype
from lab.models.adapter import PREFIX, quiet_peft

FROZEN = "frozen"
"""Name of a model's second adapter."""
MAX_TENSORS = 1 << 16
MAX_INDEX_BYTES = 8 << 20
"""Largest index, decompressed: SmolLM2's 420 tensors take 30 kB, the 37,000 of a mixture of experts 3 MB."""

Adapter = Mapping[str, torch.Tensor]
FlatArray = npt.NDArray[Any]
Shape = tuple[Annotated[int, Meta(ge=1, lt=2**31)], ...]


class AdapterIndex(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The tensors of a packed adapter: names (sorted, distinct), their shapes, and the number format on the wire."""

    names: Annotated[tuple[str, ...], Meta(min_length=1, max_length=MAX_TENSORS)]
    shapes: tuple[Shape, ...]
    dtype: WireDtype

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("adapter must have at least 1 tensor, got 0")
        if list(self.names) != sorted(set(self.names)) or len(self.shapes) != len(self.names):
            raise ValueError(f"index names must be distinct, sorted and have one shape each, got {self.names[:3]}...")

    @classmethod
    def of(cls, state: Adapter, dtype: WireDtype) -> Self:
        """Index of an adapter's tensors."""
        names = tuple(sorted(state))
        return cls(names, tuple(tuple(state[name].shape) for name in names), dtype)

    @property
    def size(self) -> int:
        """Number of values in all tensors."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def tensor_bytes(self) -> int:
        """Sum of the tensors' bytes on the wire."""
        return self.size * self.dtype.itemsize

    def encode(self) -> bytes:
        """The index as sent: compressed JSON, 0.7 kB for SmolLM2 (zlib: 1.2 kB)."""
        return bz2.compress(msgspec.json.encode(self))

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """The index that `encode` wrote. ValueError for any other bytes, and for implausibly large ones."""
        try:
            inflater = bz2.BZ2Decompressor()
            text = inflater.decompress(data, MAX_INDEX_BYTES)
            if not inflater.eof or inflater.unused_data:
                raise ValueError("it does not end where it should")
            return msgspec.json.decode(text, type=cls)
        except (OSError, msgspec.DecodeError, ValueError) as error:
            raise ValueError(f"index must be an encoded adapter index, got {len(data)} bytes: {error}") from error

    def difference(self, other: Self) -> str | None:
        """A phrase that names the first tensor of `other` that differs from this index; None if they are equal."""
        if self == other:
            return None
        mine, theirs = dict(zip(self.names, self.shapes)), dict(zip(other.names, other.shapes))
        if missing := sorted(mine.keys() - theirs.keys()):
            return f"{len(missing)} of {len(mine)} tensors are missing, the first is {missing[0]}"
        if unknown := sorted(theirs.keys() - mine.keys()):
            return f"{len(unknown)} tensors are unknown, the first is {unknown[0]}"
        for name in self.names:
            if mine[name] != theirs[name]:
                return f"{name} must have shape {list(mine[name])}, got {list(theirs[name])}"
        return f"values must be {self.dtype.name}, got {other.dtype.name}"


@dataclass(frozen=True)
class PackedAdapter:
    """An adapter as sent: all values in one flat array [index.size] in the wire's number format, and their index."""

    index: AdapterIndex
    array: FlatArray

    @classmethod
    def pack(cls, state: Adapter, index: AdapterIndex) -> Self:
        """`state` in the wire's type (rounded to nearest even for bfloat16).

        ValueError naming the tensor when names or shapes are not the index's.
        """
        if (difference := index.difference(AdapterIndex.of(state, index.dtype))) is not None:
            raise ValueError(f"adapter does not fit its index: {difference}")
        flat = torch.cat([state[name].detach().reshape(-1).to("cpu", index.dtype.torch) for name in index.names])
        return cls(index, _to_numpy(flat))

    @classmethod
    def from_float32(cls, values: npt.NDArray[np.float32], index: AdapterIndex) -> Self:
        """Float32 values [index.size], rounded to nearest even for bfloat16; no copy for float32."""
        return cls(index, _to_numpy(torch.from_numpy(values).to(index.dtype.torch)))

    def to_float32(self) -> npt.NDArray[np.float32]:
        """The values as float32 [index.size]; exact, and no copy when the wire is float32 already."""
        if self.index.dtype is WireDtype.float32:
            return self.array
        return (self.array.astype(np.uint32) << 16).view(np.float32)

    def unpack(self) -> dict[str, torch.Tensor]:
        """The tensors in the wire's type, views of one copy of the array. ValueError when its type or size differ."""
        index, array = self.index, self.array
        if array.dtype != index.dtype.numpy or array.shape != (index.size,):
            expected = f"{index.dtype.numpy} ({index.size},)"
            raise ValueError(f"packed adapter must be {expected}, got {array.dtype} {array.shape}")
        flat = torch.from_numpy(array.copy())
        parts = flat.view(index.dtype.torch).split([math.prod(shape) for shape in index.shapes])
        return {name: part.view(shape) for name, shape, part in zip(index.names, index.shapes, parts)}


def read_from(model: nn.Module) -> dict[str, torch.Tensor]:
    """The LoRA tensors of a PEFT model's active adapter in canonical order, detached copies on the CPU.

    ValueError when the adapter trains anything else (modules_to_save, biases): those would have to travel too.
    """
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in lora_parameters(model).items()}


def load_into(model: nn.Module, state: Adapter) -> None:
    """Copy an adapter into a PEFT model's active adapter, in place; all of it or nothing.

    Strict, because `peft.set_peft_model_state_dict` silently drops unknown names: ValueError naming the first tensor
    that is unknown, missing or of another shape. Values are converted to the model's own type and device.
    """
    parameters = lora_parameters(model)
    expected = AdapterIndex.of(parameters, WireDtype.float32)
    if (difference := expected.difference(AdapterIndex.of(state, WireDtype.float32))) is not None:
        raise ValueError(f"adapter does not fit the model: {difference}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def lora_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's own LoRA parameters (no copies) under PEFT's names, sorted by name."""
    adapter_name = model.active_adapter
    assert isinstance(adapter_name, str), "one adapter is trained in a federated model"
    lora = _all_lora(model)
    if other := [name for name, value in model.named_parameters() if value.requires_grad and name not in lora]:
        raise ValueError(f"adapter must consist of LoRA tensors only, but {other[0]} is trained too")
    return _named(model, lora, adapter_name)


def hold_frozen(model: PeftModel, state: Adapter, scale: float) -> None:
    """Give a PEFT model a second adapter, which adds scale * B A and is never trained, in place of the one it had.

    Ranks may differ between modules. An empty `state` leaves the model with its first adapter alone.
    """
    trained = model.active_adapter
    if FROZEN in model.peft_config:
        model.delete_adapter(FROZEN)
        model.base_model.set_adapter(trained)
    if not state:
        return
    ranks = {
        name.removeprefix(PREFIX).partition(".lora_A.")[0]: x.shape[0]
        for name, x in state.items()
        if ".lora_A." in name
    }
    with quiet_peft(), torch.random.fork_rng(devices=[]):
        model.add_adapter(FROZEN, with_ranks(model.peft_config[trained], ranks, scale))
    model.base_model.set_adapter([trained, FROZEN])  # the model's own method takes one name
    with torch.no_grad():
        for name, parameter in _named(model, _all_lora(model), FROZEN).items():
            parameter.copy_(state[name])
    _freeze(model, [FROZEN])


def resize(model: PeftModel, rank: int, alpha: float) -> None:
    """Give a PEFT model's one adapter another rank and alpha, for the caller to fill, unless it has them."""
    name = model.active_adapter
    config = model.peft_config[name]
    if (config.r, config.lora_alpha) == (rank, alpha):
        return
    frozen = [other for other in model.peft_config if other != name]
    config = copy.deepcopy(config)
    config.r, config.lora_alpha = rank, alpha
    model.delete_adapter(name)
    with quiet_peft(), torch.random.fork_rng(devices=[]):
        model.add_adapter(name, config)
    model.set_adapter(name)
    model.base_model.set_adapter([name, *frozen])
    _freeze(model, frozen)


def with_ranks(lora: LoraConfig, ranks: Mapping[str, int], scale: float) -> LoraConfig:
    """A config like `lora`, without dropout, for modules (by full name) of these ranks, all with the same scale."""
    config = copy.deepcopy(lora)
    config.lora_dropout = 0.0
    config.target_modules = sorted(ranks)
    config.r = max(ranks.values())
    config.lora_alpha = scale * config.r
    config.rank_pattern = {module: rank for module, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = {module: scale * rank for module, rank in config.rank_pattern.items()}
    return config


def _freeze(model: PeftModel, adapters: Sequence[str]) -> None:
    for adapter in adapters:
        for parameter in _named(model, _all_lora(model), adapter).values():
            parameter.requires_grad_(False)


def _all_lora(model: nn.Module) -> dict[str, torch.Tensor]:
    # Parameters only: a whole state dict would serialise every 4-bit layer's quantisation state for nothing.
    return {name: value for name, value in model.named_parameters() if "lora_" in name}


def _named(model: nn.Module, lora: dict[str, torch.Tensor], adapter_name: str) -> dict[str, torch.Tensor]:
    named = get_peft_model_state_dict(model, state_dict=lora, adapter_name=adapter_name, save_embedding_layers=False)
    return {name: named[name] for name in sorted(named)}


def _to_numpy(flat: torch.Tensor) -> FlatArray:
    array: FlatArray = (flat.view(torch.uint16) if flat.dtype is torch.bfloat16 else flat).numpy()
    return array
