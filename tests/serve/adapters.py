"""Adapters on the random base for tests of the server."""

from __future__ import annotations

from pathlib import Path

from lab.command.entry import compose_settings
from lab.models.adapter import write_adapter
from lab.models.lora import fresh_adapter, lora_config
from lab.models.sources import model_identity
from lab.settings import LoraSettings
from serve.settings import ServeSettings


def make_adapter(folder: Path, seed: int) -> Path:
    """An adapter on the random base that changes its texts."""
    model = compose_settings("serve", "model=random model.dtype=float64", ServeSettings).model
    lora = LoraSettings(rank=4, alpha=64, dropout=0)
    tensors = fresh_adapter(model, lora, seed)
    changed = {name: tensor + 0.1 * (seed + 1) if "lora_B" in name else tensor for name, tensor in tensors.items()}
    folder.mkdir(parents=True)
    write_adapter(folder, lora_config(model.lora_targets, lora), changed, model.name, model_identity(model))
    return folder
