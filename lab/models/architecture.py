"""Name and sizes of a model from its own files, unless a preset describes it."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from omegaconf import OmegaConf

import conf
from lab.files import path_of
from lab.models.shape import ModelShape
from lab.settings import ArchitectureSettings, ModelSettings, ModelSource, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def as_described(settings: ModelSettings) -> ModelSettings:
    """The settings with the name and the sizes of the model that they select.

    A preset's name goes where a model has another origin than the preset's; a name that is no preset's was given for
    this model and stays. Nothing is downloaded or converted: the numbers of a hub model are the preset's still
    (`architecture_of` its config has its own). What cannot be read is left for its loader to refuse.
    """
    if settings.source is ModelSource.random or _is_preset(settings):
        return settings
    if settings.name in {preset["name"] for preset in _presets()}:
        settings = replace(settings, name=own_name(settings))
    if settings.source is ModelSource.hub:
        return settings
    from lab.models.sources import read_own_config  # loads transformers

    try:
        return replace(settings, architecture=architecture_of(read_own_config(settings)))
    except UserError:
        return settings


def is_of_preset(settings: ModelSettings) -> bool:
    """Whether `model.architecture` was written for this model."""
    return settings.source is ModelSource.random or _is_preset(settings)


def own_name(settings: ModelSettings) -> str:
    """The last part of the repository, the folder's path, or the file's path without its ending."""
    if settings.source is ModelSource.hub:
        return str(settings.repo).rpartition("/")[2]
    path = path_of(str(settings.path), "model.path")
    return path.stem if settings.source is ModelSource.gguf else path.name


def architecture_of(config: PreTrainedConfig) -> ArchitectureSettings:
    """The sizes in a config; UserError if it lacks one of them."""
    text: Any = config.get_text_config(decoder=True)
    heads = _value(text, "num_attention_heads")
    hidden = text.hidden_size
    numbers = {
        "layers": text.num_hidden_layers,
        "hidden_size": hidden,
        "intermediate_size": _first(text, "intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner") or 4 * hidden,
        "heads": heads,
        "kv_heads": _kv_heads(text) or heads,
        "head_dim": _first(text, "head_dim") or (hidden // heads if _is_count(heads) else None),
        "vocabulary": text.vocab_size,
        "context": _first(text, "max_position_embeddings", "n_positions", "max_seq_len", "seq_length"),
    }
    if odd := [name for name, value in numbers.items() if not _is_count(value)]:
        raise UserError(f"model.architecture must have {odd[0]}, got a {text.model_type} whose config has none")
    try:
        tied = bool(_value(text, "tie_word_embeddings"))
        return ArchitectureSettings(family=text.model_type, tied_embeddings=tied, **numbers)
    except ValueError as error:
        raise UserError(f"model.architecture.{error}") from None


class LayerWeights(NamedTuple):
    """Number of weights in the matrices of one layer."""

    packable: int
    """In modules that nf4 packs."""
    others: int
    """In other modules, such as fused experts, which keep the model's precision."""


def layer_weights_of(config: PreTrainedConfig) -> list[LayerWeights]:
    """The weights of each layer, by the model's own modules; no weights are made."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # numbers that make no model
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"model must have a config that makes a model, got {config.model_type} ({reason})") from None
    count = ModelShape.of(config).layers
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == count]
    layers = []
    for layer in (layer for found in lists for layer in found):
        every = sum(weight.numel() for weight in layer.parameters() if weight.dim() > 1)
        linear = [part for part in layer.modules() if type(part) is torch.nn.Linear or isinstance(part, Conv1D)]
        packable = sum(part.weight.numel() for part in linear)
        layers.append(LayerWeights(packable, every - packable))
    if not layers:
        raise UserError(f"model must have its layers in a list to be planned, got {config.model_type}")
    return layers


def _kv_heads(text: Any) -> Any:
    if _value(text, "multi_query") and not _value(text, "new_decoder_architecture"):  # Falcon, BigCode
        return 1
    return _first(text, "num_key_value_heads", "num_kv_heads")


def _first(text: Any, *names: str) -> Any:
    return next((value for name in names if (value := _value(text, name)) is not None), None)


def _value(text: Any, name: str) -> Any:
    """A value of a config; None if it has none, the largest if layers differ."""
    try:
        return getattr(text, name, None)
    except RuntimeError:  # what transformers raises for a value that differs by layer
        values: list[Any] = [getattr(layer, name, None) for layer in text.per_layer_config]
        return max((value for value in values if _is_count(value)), default=None)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


@functools.cache
def _presets() -> list[dict[str, Any]]:
    files = sorted((Path(conf.__file__).parent / "model").glob("*.yaml"))
    return [dict(OmegaConf.load(file)) for file in files]


def _is_preset(settings: ModelSettings) -> bool:
    origin = (settings.source.name, settings.repo, settings.path, settings.package is None)
    return any(
        (preset["source"], preset.get("repo"), preset.get("path"), preset.get("package") is None) == origin
        for preset in _presets()
    )
