"""What travels against what does not, from `conf/model` alone: `python -m fl.sizes model=llama3_8b`."""

from __future__ import annotations

from typing import Any

from fl.adapters import adapter_bytes, base_model_bytes
from fl.settings import FederatedSettings, WireDtype
from lab import entry
from lab.settings import Dtype, ModelSettings

DTYPE_BYTES = {Dtype.float64: 8, Dtype.float32: 4, Dtype.bfloat16: 2, Dtype.float16: 2}


def base_bytes(model: ModelSettings) -> int:
    """Bytes of the base model's parameters in `model.dtype`, from the numbers of its architecture."""
    numbers = model.architecture
    return base_model_bytes(
        hidden_size=numbers.hidden_size,
        intermediate_size=numbers.intermediate_size,
        num_layers=numbers.layers,
        num_heads=numbers.heads,
        num_kv_heads=numbers.kv_heads,
        head_dim=numbers.head_dim,
        vocab_size=numbers.vocabulary,
        tied_embeddings=numbers.tied_embeddings,
        bytes_per_value=DTYPE_BYTES[model.dtype],
        qk_norm=numbers.family == "qwen3",
    )


def travelling_bytes(model: ModelSettings, rank: int, dtype: WireDtype) -> int:
    """Bytes of one adapter on the wire."""
    numbers = model.architecture
    return adapter_bytes(
        hidden_size=numbers.hidden_size,
        intermediate_size=numbers.intermediate_size,
        num_layers=numbers.layers,
        num_heads=numbers.heads,
        num_kv_heads=numbers.kv_heads,
        head_dim=numbers.head_dim,
        target_modules=model.lora_targets,
        rank=rank,
        dtype=dtype,
    )


def run(settings: FederatedSettings, place: entry.Run) -> dict[str, Any]:
    """Adapter bytes beside base bytes."""
    adapter = travelling_bytes(settings.model, settings.project.lora.rank, settings.project.wire_dtype)
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


def main() -> None:
    """Prints the table of one model as a JSON line."""
    entry.main("fed_learn", FederatedSettings, run)


if __name__ == "__main__":
    main()
