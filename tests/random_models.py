"""Small random models of each architecture, for tests that compare numbers and need no text."""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

WINDOW = 8
VOCABULARY = 264
_HYBRID = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

_ARCHITECTURES: dict[str, tuple[type[PreTrainedModel], type, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen2": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": _HYBRID},
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": WINDOW}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {"head_dim": 16, "sliding_window": WINDOW, "layer_types": _HYBRID}),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, {"head_dim": 16, "sliding_window": WINDOW, "layer_types": _HYBRID}),
}
ARCHITECTURES = tuple(_ARCHITECTURES)


def random_model(architecture: str, dtype: torch.dtype, **overrides: Any) -> PreTrainedModel:
    """Four layers of random weights, the same in every call, with sliding windows of 8 where the architecture has them.

    Weights are larger than a fresh model's and embeddings are not tied unless overridden, so that the text is varied
    and a wrong mask changes it. Gemma2 runs eager attention, as it must with soft-caps.
    """
    model_class, config_class, own = _ARCHITECTURES[architecture]
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    config = config_class(**{**sizes, **own, **overrides})
    config._attn_implementation = "eager" if architecture == "gemma2" else "sdpa"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = model_class(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.25)
    return cast(PreTrainedModel, model.to(dtype).eval())
