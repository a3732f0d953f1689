"""A PEFT adapter on a slice of layers, W + scale B A (arXiv 2106.09685): merged into the slice's own weights, or beside
them where they are in 4 bits, which a sum would leave.

Only the tensors of these layers are read.

Shapes: I inputs and O outputs of a module, R rank.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from transformers.modeling_utils import PreTrainedModel

from lab.settings import UserError

_NAME = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight$")
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_PLAIN = {"use_dora": False, "bias": "none", "rank_pattern": {}, "alpha_pattern": {}, "fan_in_fan_out": False}
"""What an adapter must not ask for to be taken apart here; PEFT on a whole model knows more."""


def add_adapter(model: PreTrainedModel, folder: Path, layers: range) -> int:
    """Give a slice of layers `layers` its part of an adapter; return how many modules it changes.

    Raises:
        UserError: a folder without a LoRA adapter, or one of a kind that is not known here, or of another model.
    """
    rank, scale = _rank_and_scale(folder)
    pairs = dict(_pairs(model, folder, layers, rank))
    if getattr(model, "is_loaded_in_4bit", False):
        _apply(model, pairs, rank, scale)
        return len(pairs)
    for name, (a_RI, b_OR) in pairs.items():
        module = model.get_submodule(name)
        weight_OI = cast(torch.Tensor, module.weight)
        delta_OI = (b_OR.float() @ a_RI.float() * scale).to(weight_OI)
        module.weight = torch.nn.Parameter(weight_OI + delta_OI, requires_grad=False)  # its own memory now
    return len(pairs)


def _pairs(
    model: PreTrainedModel, folder: Path, layers: range, rank: int
) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor]]]:
    """The modules of the slice that the adapter changes, with their A and B."""
    modules = dict(model.named_modules())
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as tensors:
        for whole in sorted({_module(folder, name) for name in tensors.keys()}):  # noqa: SIM118 (no mapping)
            name = _name_in_slice(whole, layers)
            if name is None:
                continue
            module = modules.get(name)
            if not isinstance(module, torch.nn.Linear):
                raise UserError(f"model.adapter must fit the model, got {whole} which it does not have")
            a_RI, b_OR = (tensors.get_tensor(f"base_model.model.{whole}.lora_{part}.weight") for part in "AB")
            if a_RI.shape != (rank, module.in_features) or b_OR.shape != (module.out_features, rank):
                raise UserError(f"model.adapter must fit the model, got {whole} of {tuple(a_RI.shape)}")
            yield name, (a_RI, b_OR)


def _apply(
    model: PreTrainedModel, pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], rank: int, scale: float
) -> None:
    """Put PEFT's own modules in place, so that a slice computes what PEFT computes on the whole model."""
    if not pairs:
        return
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=rank, target_modules=sorted(pairs)), model)
    for name, (a_RI, b_OR) in pairs.items():
        module: Any = model.get_submodule(name)
        module.scaling["default"] = scale
        for part, stored in ((module.lora_A, a_RI), (module.lora_B, b_OR)):
            part["default"].weight.data.copy_(stored)
    model.requires_grad_(False).eval()


def _rank_and_scale(folder: Path) -> tuple[int, float]:
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"model.adapter must be a PEFT folder, got {str(folder)!r}") from None
    if config.get("peft_type") != "LORA" or not (folder / "adapter_model.safetensors").exists():
        raise UserError(f"model.adapter must be a LoRA adapter in safetensors, got {str(folder)!r}")
    for name, plain in _PLAIN.items():
        if (config.get(name) or plain) != plain:
            raise UserError(f"model.adapter must have {name}={plain} for a slice of layers, got {config[name]}")
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _module(folder: Path, name: str) -> str:
    found = _NAME.match(name)
    if found is None:
        raise UserError(f"model.adapter must hold LoRA matrices only for a slice of layers, got {name} in {folder}")
    return found["module"]


def _name_in_slice(whole: str, layers: range) -> str | None:
    """The module's name in the slice; None when its layer is elsewhere."""
    found = _LAYER.search(whole)
    if found is None:
        raise UserError(f"model.adapter must wrap modules in layers for a slice of them, got {whole}")
    index = int(found[1])
    return f"{whole[: found.start()]}.layers.{index - layers.start}.{whole[found.end() :]}" if index in layers else None
