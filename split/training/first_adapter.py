"""The adapter that split training starts from: that of `model.adapter`, with its whole description, or a new one."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from peft import LoraConfig
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from lab.models.adapter import (
    AdapterFolder,
    Fit,
    fit_adapter,
    fit_config,
    inject_adapter,
    put_adapter,
    read_adapter,
    trained_weights,
)
from lab.models.lora import fresh_adapter, lora_config
from lab.models.peft_folder import check_base
from lab.models.sources import load_config, model_identity
from lab.settings import LoraSettings, ModelSettings, UserError
from split.training.messages import Recipe


@dataclass(frozen=True, kw_only=True)
class FirstAdapter:
    """An adapter before the first step."""

    settings: ModelSettings
    recipe: Recipe
    fit: Fit
    folder: AdapterFolder | None
    """None: a new one."""

    def put_on(self, model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
        """Add the adapter to a frozen model or slice; return its weights, by their names in a PEFT file."""
        inject_adapter(model, self.fit, trainable=True, dropout=self.recipe.lora_dropout)
        weights = trained_weights(model)
        if self.folder is not None:
            put_adapter(model, self.folder, self.fit)
        else:
            fresh = self._fresh()
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.copy_(fresh[name])
        return weights

    def tensors(self) -> Mapping[str, Tensor]:
        """Values of the trained tensors before the first step, by names in a PEFT file; read again, not kept."""
        return self._fresh() if self.folder is None else self.folder.tensors(self.fit.shapes)

    def described(self) -> LoraConfig:
        """PEFT's config of the adapter: the folder's own, with the recipe's dropout."""
        if self.folder is None:
            config = lora_config(self.recipe.lora_targets, lora_of(self.recipe))
        else:
            config = self.folder.config()
        config.lora_dropout = self.recipe.lora_dropout
        return config

    def untrained(self) -> dict[str, Tensor]:
        """Other tensors of the folder: base weights that PEFT saves with an adapter of the embedding."""
        return {} if self.folder is None else self.folder.tensors(self.folder.shapes.keys() - self.fit.shapes.keys())

    def _fresh(self) -> dict[str, Tensor]:
        settings = replace(self.settings, lora_targets=self.recipe.lora_targets)
        return fresh_adapter(settings, lora_of(self.recipe), self.recipe.seed)


def first_adapter(settings: ModelSettings, recipe: Recipe) -> FirstAdapter:
    """The adapter that a recipe starts from.

    Patterns, scale and kind are the folder's; rank, alpha and targets must be the recipe's, whose dropout counts.

    Raises:
        UserError: modules that the model does not have; an adapter of another model, rank, alpha or set of modules.
    """
    if settings.adapter is None:
        fresh_adapter(replace(settings, lora_targets=recipe.lora_targets), lora_of(recipe), recipe.seed)  # refuses
        fit = fit_config(lora_config(recipe.lora_targets, lora_of(recipe)), load_config(settings))
        return FirstAdapter(settings=settings, recipe=recipe, fit=fit, folder=None)
    folder = read_adapter(settings.adapter)
    check_base(folder.place, model_identity(settings))
    fit = fit_adapter(folder, load_config(settings))
    _check_recipe(folder, fit, recipe)
    return FirstAdapter(settings=settings, recipe=recipe, fit=fit, folder=folder)


def _check_recipe(folder: AdapterFolder, fit: Fit, recipe: Recipe) -> None:
    config = folder.config()
    targets = sorted({name.rsplit(".", 1)[-1] for name in (*fit.modules, *fit.parameters)})
    for name, found, wanted in (
        ("project.lora.rank", config.r, recipe.lora_rank),
        ("project.lora.alpha", config.lora_alpha, recipe.lora_alpha),
        ("model.lora_targets", targets, sorted(set(recipe.lora_targets))),
    ):
        if found != wanted:
            raise UserError(f"model.adapter must have {name}={wanted}, got {found} in {str(folder.place)!r}")
    if unnamed := sorted(fit.shapes.keys() - folder.shapes.keys()):
        raise UserError(
            f"model.adapter must be saved by the installed PEFT to be trained on, got {str(folder.place)!r} without "
            f"{unnamed[0]}"
        )


def lora_of(recipe: Recipe) -> LoraSettings:
    """The recipe's adapter as settings."""
    return LoraSettings(rank=recipe.lora_rank, alpha=recipe.lora_alpha, dropout=recipe.lora_dropout)
