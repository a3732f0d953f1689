"""Fresh LoRA adapters for a base model, as the lab's settings describe them."""

from __future__ import annotations

import math

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import PreTrainedModel

from lab.models.adapter import quiet_peft
from lab.models.sources import load_config
from lab.settings import LoraSettings, ModelSettings, UserError


def lora_config(targets: list[str], lora: LoraSettings) -> LoraConfig:
    """PEFT's config for our settings."""
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=sorted(targets),
        task_type="CAUSAL_LM",
    )


def add_lora(model: PreTrainedModel, targets: list[str], lora: LoraSettings) -> PeftModel:
    """An adapter on `model`, to be filled by the caller; UserError when the model lacks a target."""
    present = linear_names(model)
    for target in targets:
        if target not in present:
            known = ", ".join(present)
            raise UserError(f"model.lora_targets must be linear modules of the model ({known}), got {target!r}")
    with quiet_peft():
        return get_peft_model(model, lora_config(targets, lora))


def fresh_adapter(settings: ModelSettings, lora: LoraSettings, seed: int) -> dict[str, torch.Tensor]:
    """The adapter that training starts from, in float32: A uniform in +-1/sqrt(inputs), as PEFT's own, B zero.

    Needs the model's config only: whoever starts a federation holds no weights.
    """
    config = load_config(settings)  # may convert the model first, which needs real tensors
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    shapes = get_peft_model_state_dict(add_lora(skeleton, settings.lora_targets, lora), save_embedding_layers=False)
    generator = torch.Generator().manual_seed(seed)
    return {name: _initial(name, tuple(shapes[name].shape), generator) for name in sorted(shapes)}


def _initial(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if ".lora_B." in name:
        return torch.zeros(shape)
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def linear_names(model: torch.nn.Module) -> list[str]:
    """Last names of all linear modules except the head, sorted."""
    names = {path.rsplit(".", 1)[-1] for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return sorted(names - {"lm_head"})
