"""Fingerprints of a model: all that must be equal for two roles to mean the same weights."""

from lab.models.peft_folder import folder_digest
from lab.models.sources import model_identity
from lab.settings import ModelSettings


def weights_fingerprints(model: ModelSettings) -> dict[str, str]:
    """Fingerprints of tensors, config, adapter and precision, by name.

    A random model's seed and sizes are in its identity. UserError for a model or an adapter that cannot be read.
    """
    return {
        "model": model_identity(model),
        "adapter": "none" if model.adapter is None else folder_digest(model.adapter),
        "dtype": model.dtype.name,
        "quantization": model.quantization.name,
    }


def changes(before: dict[str, str], now: dict[str, str]) -> str:
    """The fingerprints that differ, with both values, for people; empty when all are equal."""
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"its {name} was {before.get(name)} and is {now.get(name)}" for name in changed)
