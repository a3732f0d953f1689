"""Bytes of an adapter next to those of its base model, from `conf/model` alone: `python -m fl.sizes model=random`."""

from typing import Any

from fl.settings import FederatedSettings, WireDtype
from lab.command import entry
from lab.settings import ArchitectureSettings, ModelSettings, UserError

CHECKPOINT_NUMBER_BYTES = 2
"""Bytes per value of a published base model: it is published in 16 bits, in whatever precision it computes."""


def base_bytes(model: ModelSettings) -> int:
    """Bytes of the base model as it is published, from the sizes of its architecture.

    Linear layers, two norms per layer and a final one, the embedding, and the head unless it is tied to the embedding.
    Qwen2 has biases on queries, keys and values, Qwen3 a norm (one vector of head_dim) on queries and on keys.
    """
    numbers = model.architecture
    layer = sum(out * into for out, into in linear_shapes(numbers).values()) + 2 * numbers.hidden_size
    layer += (numbers.family == "qwen2") * (numbers.heads + 2 * numbers.kv_heads) * numbers.head_dim
    layer += (numbers.family == "qwen3") * 2 * numbers.head_dim
    embeddings = numbers.vocabulary * numbers.hidden_size * (1 if numbers.tied_embeddings else 2)
    return (numbers.layers * layer + embeddings + numbers.hidden_size) * CHECKPOINT_NUMBER_BYTES


def adapter_bytes(model: ModelSettings, rank: int, dtype: WireDtype) -> int:
    """Bytes of one adapter on the wire.

    A LoRA pair on a linear layer in -> out has rank * (in + out) values (Hu et al. 2021, arXiv 2106.09685). UserError
    for a target module that such a decoder does not have.
    """
    shapes = linear_shapes(model.architecture)
    for module in model.lora_targets:
        if module not in shapes:
            raise UserError(f"model.lora_targets must be among {sorted(shapes)}, got {module!r}")
    values = sum(rank * sum(shapes[module]) for module in set(model.lora_targets))
    return values * model.architecture.layers * dtype.itemsize


def linear_shapes(numbers: ArchitectureSettings) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer in one llama-like decoder layer, by module name."""
    hidden, intermediate = numbers.hidden_size, numbers.intermediate_size
    queries, keys = numbers.heads * numbers.head_dim, numbers.kv_heads * numbers.head_dim
    return {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }


def run(settings: FederatedSettings, place: entry.Run) -> dict[str, Any]:
    """Adapter bytes next to base bytes."""
    adapter = adapter_bytes(settings.model, settings.project.lora.rank, settings.project.wire_dtype)
    base = base_bytes(settings.model)
    return {
        "model": settings.model.name,
        "rank": settings.project.lora.rank,
        "lora_targets": settings.model.lora_targets,
        "wire_dtype": settings.project.wire_dtype,
        "adapter_bytes": adapter,
        "base_bytes": base,
        "ratio": base / adapter,
    }


main = entry.command("fed_learn", FederatedSettings, run)

if __name__ == "__main__":
    main()
