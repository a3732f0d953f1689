"""Weights at the start of split training: a slice of a model, made trainable."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from lab.models.layers import load_layers
from lab.models.proof import Use
from lab.models.quantized import WeightFormat
from lab.models.shape import ModelShape
from lab.models.slices import cut_of
from lab.models.sources import check_weight_format, fetch, load_config
from lab.settings import ModelSettings, Quantization, UserError
from split.training.messages import Recipe
from split.training.settings import Train
from split.training.shard import TrainingShard


def load_training_shard(settings: ModelSettings, device: torch.device, layers: range, recipe: Recipe) -> TrainingShard:
    """The shard of these layers before the first step; only its own tensors are read.

    Raises:
        UserError: refused by `load_layers` or `first_adapter`, or all weights where not all can be trained.
    """
    model = _load_slice(settings, device, layers)
    if recipe.train is Train.lora:
        from split.training.first_adapter import first_adapter  # loads PEFT

        weights = first_adapter(settings, recipe).put_on(model)
    else:
        check_can_train_everything(settings)
        if unused := cut_of(model).structure.unused:
            raise UserError(f"project.train must be lora for a model with parts that no text uses, got {unused[0]}")
        weights = {name: weight for name, weight in model.named_parameters() if cut_of(model).owns(name)}
        for weight in weights.values():
            weight.requires_grad_(True)
    return TrainingShard(model, weights, recipe)


def _load_slice(settings: ModelSettings, device: torch.device, layers: range) -> PreTrainedModel:
    first, last = layers.start == 0, layers.stop == ModelShape.of(load_config(settings)).layers
    return load_layers(settings, device, layers, embedding=first, head=last, use=Use.training)


def check_can_train_everything(settings: ModelSettings) -> None:
    """UserError for weights that have no gradient, and for an adapter, which would not be trained."""
    stored = check_weight_format(fetch(settings, ()), load_config(settings), settings)
    if stored in (WeightFormat.nf4, WeightFormat.fp4):
        raise UserError(f"project.train must be lora for a model that is stored as {stored.name}, got everything")
    if settings.quantization is not Quantization.none:
        raise UserError(
            "project.train must be lora where the weights are quantised: they have no gradient, and nothing would be "
            f"trained; got everything with model.quantization={settings.quantization.name}"
        )
    if settings.adapter is not None:
        raise UserError(
            f"project.train must be lora to go on from model.adapter, got everything with {settings.adapter!r}"
        )


def initial_weight(settings: ModelSettings, recipe: Recipe, layers: range) -> Callable[[str], Tensor]:
    """Values of trainable weights before the first step, by name in the whole model; read again, not kept.

    If the checkpoint has a tensor under another name, or within another one, the slice is loaded again and kept.
    """
    if recipe.train is Train.lora:
        from split.training.first_adapter import first_adapter  # loads PEFT

        return first_adapter(settings, recipe).tensors().__getitem__
    folder = fetch(settings, ())
    is_plain = check_weight_format(folder, load_config(settings), settings) is WeightFormat.plain

    @cache
    def again() -> dict[str, Tensor]:
        return dict(_load_slice(settings, torch.device("cpu"), layers).state_dict())

    def read(name: str) -> Tensor:
        return folder.read({name})[name] if is_plain and name in folder.files else again()[name]

    return read
