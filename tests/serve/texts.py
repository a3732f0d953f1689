"""The byte-level tokenizer of the random model, for tests without a model."""

from lab.command.entry import compose_settings
from lab.models.sources import load_tokenizer_only
from serve.models.tokens import ModelTexts
from serve.settings import ServeSettings


def byte_texts() -> ModelTexts:
    """One id for each byte; 256 ends a text."""
    model = compose_settings("serve", "model=random", ServeSettings).model
    return ModelTexts(load_tokenizer_only(model), [256], vocabulary_size=259, context=64)
