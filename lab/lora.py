"""LoRA adapters on a base model: attach a fresh one, or apply one from a PEFT folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers.modeling_utils import PreTrainedModel

from lab.models import LoadedModel
from lab.settings import LoraSettings, UserError

IDENTITY_KEY = "base_model_identity"
"""Key of lab_adapter.json beside a PEFT folder: which weights the adapter was trained on."""


def lora_config(targets: list[str], lora: LoraSettings) -> LoraConfig:
    """PEFT's config for our settings."""
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=sorted(targets),
        task_type="CAUSAL_LM",
    )


def add_lora(model: PreTrainedModel, targets: list[str], lora: LoraSettings, seed: int) -> PeftModel:
    """A fresh adapter on `model`: A from `seed`, B zero; UserError when the model lacks a target."""
    present = linear_names(model)
    for target in targets:
        if target not in present:
            raise UserError(
                f"model.lora_targets must be linear modules of the model ({', '.join(present)}), got {target!r}"
            )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, lora_config(targets, lora))


def linear_names(model: torch.nn.Module) -> list[str]:
    """Last names of all linear modules except the head, sorted."""
    names = {path.rsplit(".", 1)[-1] for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return sorted(names - {"lm_head"})


def apply_adapter(base: LoadedModel, folder: str) -> PeftModel:
    """The frozen adapter of a PEFT folder on `base`; UserError when it is none or of another base model."""
    place = Path(folder).expanduser().absolute()
    check_adapter_folder(place, base.checkpoint.identity)
    try:
        return PeftModel.from_pretrained(base.model, place, is_trainable=False).eval()
    except RuntimeError as error:  # PEFT's answer to tensors of other shapes
        raise UserError(
            f"model.adapter must fit the base model, got {str(place)!r} ({str(error).splitlines()[0]})"
        ) from None


def check_adapter_folder(place: Path, identity: str) -> None:
    """UserError unless `place` is a PEFT folder for base model `identity` (one that does not say is let through)."""
    if not (place / "adapter_config.json").exists() or not (place / "adapter_model.safetensors").exists():
        raise UserError(
            f"model.adapter must be a PEFT folder (adapter_config.json, adapter_model.safetensors), got {str(place)!r}"
        )
    record = place / "lab_adapter.json"
    trained_on = json.loads(record.read_text()).get(IDENTITY_KEY) if record.exists() else None
    if trained_on not in (None, identity):
        raise UserError(
            f"model.adapter must belong to base model {identity}, got {str(place)!r} trained on {trained_on}"
        )
