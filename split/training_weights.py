"""The weights that split training starts from: a slice of a model made ready to learn."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lab.models import fetch, load_config, load_layers, model_identity
from lab.quantized import Stored
from lab.settings import LoraSettings, ModelSettings, Quantization, UserError
from split.training_messages import Recipe, Train
from split.training_shard import TrainingShard


def load_training_shard(settings: ModelSettings, device: torch.device, layers: range, recipe: Recipe) -> TrainingShard:
    """The shard of these layers as it is before the first step; only its own tensors are read.

    Raises:
        UserError: what `load_layers` and `initial_adapter` refuse, everything trained where that cannot be.
    """
    config: Any = load_config(settings).get_text_config(decoder=True)
    is_first, is_last = layers.start == 0, layers.stop == int(config.num_hidden_layers)
    model = load_layers(settings, device, layers.start, layers.stop, embedding=is_first, head=is_last)
    if recipe.train is Train.lora:
        from lab.lora import add_lora  # loads PEFT

        add_lora(model, recipe.lora_targets, lora_of(recipe))
    else:
        check_can_train_everything(settings)
        model.requires_grad_(True)
    tied = bool(config.tie_word_embeddings)
    shard = TrainingShard(model, layers, is_first=is_first, is_last=is_last, is_tied=tied, recipe=recipe)
    if recipe.train is Train.lora:
        adapter = initial_adapter(settings, recipe)
        with torch.no_grad():
            for name, weight in shard.weights.items():
                weight.copy_(adapter[name])
    return shard


def check_can_train_everything(settings: ModelSettings) -> None:
    """UserError for weights that have no gradient, and for an adapter that nobody would train."""
    if settings.quantization is not Quantization.none:
        raise UserError(
            "project.train must be lora where the weights are quantised: they have no gradient, and nothing would be "
            f"trained; got everything with model.quantization={settings.quantization.name}"
        )
    folder = fetch(settings, ())
    if (stored := folder.stored(folder.config())) is not Stored.plain:
        raise UserError(f"project.train must be lora for a model that is stored quantised, got {stored.name} weights")
    if settings.adapter is not None:
        raise UserError(
            f"project.train must be lora to go on from model.adapter, got everything with {settings.adapter!r}"
        )


def initial_adapter(settings: ModelSettings, recipe: Recipe) -> dict[str, Tensor]:
    """The whole model's adapter before the first step, by its names in a PEFT file: `model.adapter`, else a fresh one.

    Raises:
        UserError: modules that the model does not have; an adapter of another model, rank or scale.
    """
    from lab.lora import check_adapter_folder, fresh_adapter

    lora = lora_of(recipe)
    fresh = fresh_adapter(replace(settings, lora_targets=recipe.lora_targets), lora, recipe.seed)
    if settings.adapter is None:
        return fresh
    folder = Path(settings.adapter).expanduser().absolute()
    check_adapter_folder(folder, model_identity(settings))
    tensors: dict[str, Tensor] = load_file(folder / "adapter_model.safetensors")
    alpha = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("lora_alpha")
    if {name: tensor.shape for name, tensor in tensors.items()} != {n: t.shape for n, t in fresh.items()}:
        raise UserError(
            f"model.adapter must have the modules of model.lora_targets and project.lora.rank={lora.rank}, "
            f"got {str(folder)!r}"
        )
    if alpha != lora.alpha:
        raise UserError(f"model.adapter must have project.lora.alpha={lora.alpha}, got {alpha} in {str(folder)!r}")
    return tensors


def initial_weight(settings: ModelSettings, recipe: Recipe) -> Callable[[str], Tensor]:
    """A trainable weight before the first step, by its name in the whole model; read again, not kept."""
    if recipe.train is Train.lora:
        return initial_adapter(settings, recipe).__getitem__
    config: Any = load_config(settings).get_text_config(decoder=True)
    # A tied head is stored under the embedding's name only.
    stored = {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}

    def read(name: str) -> Tensor:
        place = stored.get(name, name)
        return fetch(settings, {place}).read({place})[place]

    return read


def lora_of(recipe: Recipe) -> LoraSettings:
    """The recipe's adapter, as the lab's settings have it."""
    return LoraSettings(rank=recipe.lora_rank, alpha=recipe.lora_alpha, dropout=recipe.lora_dropout)
