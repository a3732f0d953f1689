"""The weights that split training starts from: a slice of a model made ready to learn."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from lab.layers import count_layers, load_layers
from lab.models import fetch, load_config, model_identity
from lab.proof import Use
from lab.settings import LoraSettings, ModelSettings, Quantization, UserError
from lab.slices import cut_of
from split.training_messages import Recipe, Train
from split.training_shard import TrainingShard


def load_training_shard(settings: ModelSettings, device: torch.device, layers: range, recipe: Recipe) -> TrainingShard:
    """The shard of these layers as it is before the first step; only its own tensors are read.

    Raises:
        UserError: what `load_layers` and `initial_adapter` refuse, everything trained where that cannot be.
    """
    model = _load_slice(settings, device, layers)
    if recipe.train is Train.lora:
        from lab.lora import add_lora  # loads PEFT

        add_lora(model, recipe.lora_targets, lora_of(recipe))
    else:
        check_can_train_everything(settings)
        for name, weight in model.named_parameters():
            weight.requires_grad_(cut_of(model).owns(name))
    shard = TrainingShard(model, recipe)
    if recipe.train is Train.lora:
        adapter = initial_adapter(settings, recipe)
        with torch.no_grad():
            for name, weight in shard.weights.items():
                weight.copy_(adapter[name])
    return shard


def _load_slice(settings: ModelSettings, device: torch.device, layers: range) -> PreTrainedModel:
    first, last = layers.start == 0, layers.stop == count_layers(load_config(settings))
    return load_layers(settings, device, layers, embedding=first, head=last, use=Use.training)


def check_can_train_everything(settings: ModelSettings) -> None:
    """UserError for weights that have no gradient, and for an adapter that nobody would train."""
    if settings.quantization is not Quantization.none:
        raise UserError(
            "project.train must be lora where the weights are quantised: they have no gradient, and nothing would be "
            f"trained; got everything with model.quantization={settings.quantization.name}"
        )
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


def initial_weight(settings: ModelSettings, recipe: Recipe, layers: range) -> Callable[[str], Tensor]:
    """A trainable weight before the first step, by its name in the whole model; read again, not kept.

    Where the checkpoint has the tensor under another name, or as a part of it, the slice is loaded again, and kept.
    """
    if recipe.train is Train.lora:
        return initial_adapter(settings, recipe).__getitem__
    folder = fetch(settings, ())

    @cache
    def again() -> dict[str, Tensor]:
        return dict(_load_slice(settings, torch.device("cpu"), layers).state_dict())

    def read(name: str) -> Tensor:
        return folder.read({name})[name] if name in folder.files else again()[name]

    return read


def lora_of(recipe: Recipe) -> LoraSettings:
    """The recipe's adapter, as the lab's settings have it."""
    return LoraSettings(rank=recipe.lora_rank, alpha=recipe.lora_alpha, dropout=recipe.lora_dropout)
