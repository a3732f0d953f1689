"""Sizes of a model, from its config, for shards, caches and benchmarks. Loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class ModelShape(NamedTuple):
    """Sizes of the part of a model that reads text."""

    layers: int
    hidden_size: int
    vocabulary: int
    """Rows of the embedding, padding included."""
    is_tied: bool
    """Whether the LM head is the embedding matrix."""

    @classmethod
    def of(cls, config: PreTrainedConfig) -> ModelShape:
        """The shape in a config; that of an image model is in its text config."""
        text: Any = config.get_text_config(decoder=True)
        is_tied = any(getattr(part, "tie_word_embeddings", False) for part in (config, text))
        return cls(int(text.num_hidden_layers), int(text.hidden_size), int(text.vocab_size), is_tied)
