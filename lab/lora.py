"""LoRA adapters on a base model: attach a fresh one, or apply one from a PEFT folder."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import PreTrainedModel

from lab.models import LoadedModel, load_config
from lab.settings import LoraSettings, ModelSettings, UserError

RECORD_FILE = "lab_adapter.json"
"""Beside the files of a PEFT folder: where the adapter comes from. Whoever writes an adapter writes one."""
IDENTITY_KEY = "base_model_identity"
"""Which weights the adapter was trained on: `lab.models.model_identity`."""


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


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without the warning that peft 0.21 asks transformers 5.23 a question under its old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


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


def apply_adapter(base: LoadedModel, folder: str) -> PeftModel:
    """The frozen adapter of a PEFT folder on `base`; UserError when it is none or of another base model."""
    place = Path(folder).expanduser().absolute()
    check_adapter_folder(place, base.checkpoint.identity)
    try:
        with quiet_peft():
            model = PeftModel.from_pretrained(base.model, place, is_trainable=False)
    except (RuntimeError, ValueError) as error:  # PEFT's answers to tensors of other shapes, to modules that are none
        raise _misfit(place, " ".join(str(error).split())[:300]) from None
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    with safe_open(place / "adapter_model.safetensors", framework="pt") as tensors:
        odd = sorted(wanted ^ set(tensors.keys()))
    if odd:  # PEFT drops unknown keys and leaves missing ones as they were, both without an error
        raise _misfit(place, f"{len(odd)} tensors are unknown or missing, {odd[0]} first")
    return model.eval()


def _misfit(place: Path, reason: str) -> UserError:
    return UserError(f"model.adapter must fit the base model, got {str(place)!r} ({reason})")


def check_adapter_folder(place: Path, identity: str) -> None:
    """UserError unless `place` is a PEFT folder for base model `identity` (one that does not say is let through)."""
    if not (place / "adapter_config.json").exists() or not (place / "adapter_model.safetensors").exists():
        raise UserError(
            f"model.adapter must be a PEFT folder (adapter_config.json, adapter_model.safetensors), got {str(place)!r}"
        )
    trained_on = recorded_identity(place)
    if trained_on not in (None, identity):
        raise UserError(
            f"model.adapter must belong to base model {identity}, got {str(place)!r} trained on {trained_on}"
        )


def recorded_identity(place: Path) -> str | None:
    """The base model an adapter folder says it belongs to; None when it does not say. UserError for a broken record."""
    record = place / RECORD_FILE
    try:
        found = json.loads(record.read_text(encoding="utf-8")).get(IDENTITY_KEY) if record.exists() else None
    except (ValueError, AttributeError):
        raise UserError(f"model.adapter must hold a {RECORD_FILE} that is JSON, got {str(record)!r}") from None
    return None if found is None else str(found)
