"""The weights that split training starts from: a slice of a model made ready to learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lab.models import load_config, load_layers, name_in_whole, prepare_checkpoint, read_tensors
from lab.settings import ModelSettings, Quantization, UserError
from split.training_messages import Recipe, Train
from split.training_shard import TrainingShard


def load_training_shard(settings: ModelSettings, device: torch.device, layers: range, recipe: Recipe) -> TrainingShard:
    """The shard of these layers as it is before the first step; only its own tensors are read.

    Raises:
        UserError: what `load_layers` and `first_adapter` refuse, everything trained where that cannot be.
    """
    config: Any = load_config(settings).get_text_config(decoder=True)
    is_first, is_last = layers.start == 0, layers.stop == int(config.num_hidden_layers)
    model = load_layers(settings, device, layers.start, layers.stop, embedding=is_first, head=is_last)
    if recipe.train is Train.lora:
        from split.first_adapter import first_adapter  # loads PEFT

        weights = first_adapter(settings, recipe).put_on(model, layers)
    else:
        check_can_train_everything(settings)
        model.requires_grad_(True)
        weights = {name_in_whole(name, layers.start): weight for name, weight in model.named_parameters()}
    tied = bool(config.tie_word_embeddings)
    return TrainingShard(model, weights, layers, is_first=is_first, is_last=is_last, is_tied=tied, recipe=recipe)


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


def initial_weight(settings: ModelSettings, recipe: Recipe) -> Callable[[str], Tensor]:
    """A trainable weight before the first step, by its name in the whole model; read again, not kept."""
    if recipe.train is Train.lora:
        from split.first_adapter import first_adapter  # loads PEFT

        return first_adapter(settings, recipe).tensors().__getitem__
    folder = prepare_checkpoint(settings).folder
    config: Any = load_config(settings).get_text_config(decoder=True)
    # A tied head is stored under the embedding's name only.
    stored = {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}

    def read(name: str) -> Tensor:
        place = stored.get(name, name)
        return read_tensors(folder, {place})[place]

    return read
