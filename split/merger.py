"""Turns the parts of a checkpoint into one folder. Their tensors already have the names of the whole model."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lab.environment import commit
from lab.files import whole_folder
from lab.models.folder import GENERATION, ModelFolder
from lab.models.proof import Use, require
from lab.models.shape import ModelShape
from lab.models.sources import fetch, model_identity
from lab.models.structure import Structure
from lab.settings import ModelSettings, Quantization, UserError
from split.training.checkpoint import Manifest, Parts, latest_step, part_of, read_manifest
from split.training.open import identity_of
from split.training.settings import Train

log = logging.getLogger(__name__)


def merge(model: ModelSettings, checkpoint: Path, output: Path) -> dict[str, Any]:
    """Write the folder `output` from a run's checkpoints, or one step's; return the figures of the last line.

    Raises:
        UserError: parts are missing or damaged, `model` is not what the run began with, or `output` exists.
    """
    key = "project.checkpoint"
    folder = latest_step(checkpoint.absolute(), key)
    manifest = read_manifest(folder, key)
    ours = identity_of(model)
    if manifest.model != ours:
        raise UserError(f"model must be what the run began with, {manifest.model}, got {ours}")
    output = output.absolute()
    if output.exists():
        raise UserError(f"project.output must not be there yet, got {str(output)!r}")
    weights = read_weights(folder, manifest)
    with whole_folder(output) as unfinished:
        if manifest.recipe.train is Train.lora:
            write_adapter(model, manifest, weights, unfinished, output)
        else:
            write_model(model, weights, unfinished)
    return {
        "kind": "peft" if manifest.recipe.train is Train.lora else "transformers",
        "step": manifest.step,
        "loss": manifest.loss_by_step[-1],
        "tensors": len(weights),
        "parameters": sum(tensor.numel() for tensor in weights.values()),
        "output": output,
    }


def read_weights(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    """The trained weights of all shards, by their names in the whole model."""
    found: dict[str, Tensor] = {}
    for place, (layers, digest) in enumerate(zip(manifest.layers, manifest.digests, strict=True)):
        part = part_of(manifest.step, place, len(manifest.layers), layers, manifest.recipe)
        weights, _ = Parts(folder.parent.parent, manifest.run, place).read(part, digest)
        assert not found.keys() & weights.keys(), "every weight belongs to one shard"
        found |= weights
    return found


def write_model(model: ModelSettings, weights: dict[str, Tensor], folder: Path) -> None:
    """Write a transformers folder: config, weights, tokenizer."""
    base = fetch(replace(model, quantization=Quantization.none), ())
    config: Any = base.config()
    if ModelShape.of(config).is_tied:
        _drop_tied_head(weights, require(config, Use.training, model.cache_dir).structure)
    config.dtype = next(iter(weights.values())).dtype
    buffers = _buffers(base, config)
    save_file(buffers | weights, folder / "model.safetensors", metadata={"format": "pt"})
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # trained weights are stored as they are
    config.save_pretrained(folder)
    if (base.path / GENERATION).exists():
        shutil.copy(base.path / GENERATION, folder)
    _copy_tokenizer(base, folder)


def _buffers(base: ModelFolder, config: Any) -> dict[str, Tensor]:
    """Tensors of the base model that are not weights, such as a router's corrections: they are not trained."""
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    weights = {name for name, _ in whole.named_parameters(remove_duplicate=False)}
    names = whole.state_dict().keys() - weights
    if names <= base.files.keys():
        return base.read(names)
    loaded = base.load(config, config.dtype).state_dict()  # stored under other names
    return {name: loaded[name].clone() for name in names}


def _drop_tied_head(weights: dict[str, Tensor], structure: Structure | None) -> None:
    """Remove the head if it is the embedding; an independent head stays."""
    assert structure is not None, "what was trained in slices is known in its parts"
    head, embedding = f"{structure.head}.weight", f"{structure.embedding}.weight"
    if head in weights and embedding in weights and torch.equal(weights[head], weights[embedding]):
        del weights[head]


def write_adapter(
    model: ModelSettings, manifest: Manifest, weights: dict[str, Tensor], folder: Path, output: Path
) -> None:
    """Write a PEFT folder, with the record of its base model and a model card; `output` is the final folder."""
    from lab.models import adapter  # loads PEFT
    from lab.models.base_model import base_name, base_origin, loading_code
    from split.training.first_adapter import first_adapter

    first, base, identity = first_adapter(model, manifest.recipe), base_name(model), model_identity(model)
    tensors, about = first.untrained() | weights, {"name": model.name, "step": manifest.step, "commit": commit()}
    adapter.write_adapter(folder, first.described(), tensors, base, identity, **about)
    code = loading_code(base, str(output))
    card = f"# Adapter after {manifest.step} steps of split training\n\n{base_origin(model)}\n\n{code}\n"
    (folder / "README.md").write_text(card, encoding="utf-8")


def _copy_tokenizer(base: ModelFolder, folder: Path) -> None:
    try:
        base.tokenizer().save_pretrained(str(folder))
    except (OSError, ValueError) as error:  # the folder has weights only
        log.warning("no tokenizer is in the merged folder: %s", " ".join(str(error).split())[:200])
