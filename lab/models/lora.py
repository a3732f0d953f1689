"""Fresh LoRA adapters for a base model, as the lab's settings describe them."""

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
    """An adapter on `model`, for the caller to fill; UserError if the model lacks a target, or all targets are too
    small for the adapter's rank."""
    ranks = highest_ranks(model)
    for target in targets:
        if target not in ranks:
            known = ", ".join(ranks)
            raise UserError(f"model.lora_targets must be linear modules of the model ({known}), got {target!r}")
    most = max((ranks[target] for target in targets), default=lora.rank)
    if lora.rank > most:
        raise UserError(f"project.lora.rank must be at most {most}, the rank of the model's targets, got {lora.rank}")
    with quiet_peft():
        return get_peft_model(model, lora_config(targets, lora))


def fresh_adapter(settings: ModelSettings, lora: LoraSettings, seed: int) -> dict[str, torch.Tensor]:
    """The adapter that training starts from, in float32: A uniform in +-1/sqrt(inputs), as PEFT's own, B zero.

    Needs the model's config only: the server of a federation holds no weights.
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


def highest_ranks(model: torch.nn.Module) -> dict[str, int]:
    """The highest rank of each linear module except the head, by its last name, sorted."""
    most: dict[str, int] = {}
    for path, module in model.named_modules():
        name = path.rsplit(".", 1)[-1]
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            most[name] = max(most.get(name, 0), min(module.in_features, module.out_features))
    return dict(sorted(most.items()))
