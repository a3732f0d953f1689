"""A PEFT adapter on a slice of layers: merged into the slice's own weights, W + scale B A (arXiv 2106.09685).

Only the tensors of these layers are read.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.modeling_utils import PreTrainedModel

from lab.settings import UserError

_NAME = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight$")
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_PLAIN = {"use_dora": False, "bias": "none", "rank_pattern": {}, "alpha_pattern": {}, "fan_in_fan_out": False}
"""What an adapter must not ask for to be merged here; PEFT's own merge knows more."""


def merge_adapter(model: PreTrainedModel, folder: Path, layers: range) -> int:
    """Merge the part of an adapter that belongs to layers `layers` into a slice of them; return how many modules.

    Raises:
        UserError: a folder without a LoRA adapter, or one of a kind that is not merged here, or of another model.
    """
    rank, scale = _rank_and_scale(folder)
    modules = dict(model.named_modules())
    merged = 0
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as tensors:
        for whole in sorted({_module(folder, name) for name in tensors.keys()}):  # noqa: SIM118 (no mapping)
            module = modules.get(name) if (name := _name_in_slice(whole, layers)) is not None else None
            if name is None:
                continue
            if not isinstance(module, torch.nn.Linear):
                raise UserError(f"model.adapter must fit the model, got {whole} which it does not have")
            a_RI, b_OR = (tensors.get_tensor(f"base_model.model.{whole}.lora_{part}.weight") for part in "AB")
            if a_RI.shape != (rank, module.in_features) or b_OR.shape != (module.out_features, rank):
                raise UserError(f"model.adapter must fit the model, got {whole} of {tuple(a_RI.shape)}")
            delta_OI = (b_OR.float() @ a_RI.float() * scale).to(module.weight)
            module.weight = torch.nn.Parameter(module.weight + delta_OI, requires_grad=False)  # its own memory now
            merged += 1
    return merged


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
