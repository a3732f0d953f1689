"""Layers of a model read as a slice, after its architecture is proved."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from lab.device import check_dtype
from lab.models.proof import Use, require
from lab.models.quantized import WeightFormat, load_options
from lab.models.shape import ModelShape
from lab.models.slices import read_slice
from lab.models.sources import (
    LoadedModel,
    check_room,
    check_weight_format,
    fetch,
    list_tensors,
    load_config,
    load_model,
    prepared,
    quantization_config,
)
from lab.settings import ModelSettings, Quantization, UserError


def load_proved(settings: ModelSettings, device: torch.device) -> LoadedModel:
    """A whole model for an engine: `load_model` of an architecture that is proved with our cache.

    Raises:
        UserError: an architecture that is not proved, or a model that cannot be loaded.
    """
    config, packed = load_config(settings), settings.quantization.bits is not None
    require(config, Use.engine, settings.cache_dir, packed=WeightFormat[settings.quantization.name] if packed else None)
    return load_model(settings, device)


def load_layers(
    settings: ModelSettings, device: torch.device, layers: range, *, embedding: bool, head: bool, use: Use = Use.slices
) -> PreTrainedModel:
    """Some layers of a model as a slice of it (`lab.models.slices`), frozen; no other tensor is read from the disk.

    A slice of all layers computes, bit by bit, what `load_model` computes.

    Args:
        settings: The model's.
        device: Where the slice will be.
        layers: Which layers.
        embedding, head: Whether it has them.
        use: The use for which the architecture must be proved.

    Raises:
        UserError: layers that the model lacks, an architecture that is not proved, an unavailable quantisation, a
            checkpoint without the tensors of its architecture.
    """
    disable_progress_bar()
    dtype = check_dtype(device, settings.dtype)
    quantization = quantization_config(settings, device, dtype)
    described = fetch(settings, ())
    config = described.config()
    check_layers(config, layers)
    stored = check_weight_format(described, config, settings)
    is_packed = settings.quantization is not Quantization.none
    as_packed = WeightFormat[settings.quantization.name] if is_packed else stored
    structure = require(
        config,
        use,
        settings.cache_dir,
        packed=None if as_packed in (WeightFormat.plain, WeightFormat.fp8) else as_packed,
    ).structure
    assert structure is not None, "what is proved to be cut is known in its parts"
    listed = list_tensors(settings)
    config = listed.config()
    ties = ModelShape.of(config).is_tied
    names = structure.stored_names(listed.files, layers, embedding=embedding, head=head, ties=ties)
    folder = fetch(settings, names)
    stored = check_weight_format(folder, config, settings)
    check_room([of for name, of in folder.shapes().items() if name in names], stored, settings, device, dtype)
    placement = load_options(stored, quantization, device, dtype)
    with folder.lazy(names) as tensors:
        model = read_slice(config, tensors, structure, layers, embedding=embedding, head=head, dtype=dtype, **placement)
    return prepared(model, settings, device, dtype, moves="device_map" not in placement)


def check_layers(config: PreTrainedConfig, layers: range) -> None:
    """UserError for layers that the model lacks."""
    count = ModelShape.of(config).layers
    if not 0 <= layers.start < layers.stop <= count:
        raise UserError(
            f"layers must be a range within the model's {count} layers, got {layers.start} to {layers.stop}"
        )


def with_adapter(model: PreTrainedModel, settings: ModelSettings) -> PreTrainedModel:
    """The model, with the adapter of its settings if they name one."""
    if settings.adapter is not None:
        from lab.models.adapter import add_adapter  # loads PEFT and bitsandbytes, which plain models can do without

        add_adapter(model, settings)
    return model
