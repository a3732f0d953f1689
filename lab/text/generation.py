"""An engine's arguments for a generation, from its settings: sampling with its logit rules, length, decoder."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.engine.sampling import Sampling
from lab.settings import ModelSettings, UserError, user_errors
from lab.text.grammars import Grammars
from lab.text.logit_rules import LogitRules
from lab.text.settings import FILL, TextSettings

if TYPE_CHECKING:  # transformers takes seconds to import, and only names are needed here
    from transformers import PreTrainedTokenizerBase


def sampling_of(settings: TextSettings, seed: int, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int) -> Sampling:
    """The sampling of a generation with a prompt of `prompt_tokens`. UserError for invalid logit rules."""
    with user_errors("project."):
        rules = LogitRules(
            prompt_tokens=prompt_tokens,
            repetition_penalty=settings.repetition_penalty,
            presence_penalty=settings.presence_penalty,
            frequency_penalty=settings.frequency_penalty,
            logit_bias=tuple(settings.biases),
            bad_words=tuple(word for text in settings.bad_words for word in bad_word_ids(tokenizer, text)),
            schema=schema_text(settings.schema) if settings.schema is not None else "",
        )
    return Sampling(
        seed=seed,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
        logit_rules=None if rules.is_off else rules,
    )


def schema_text(given: str) -> str:
    """A JSON schema, given inline or as a file, without whitespace between its parts. UserError for anything else."""
    is_inline = given.lstrip().startswith("{")
    try:
        text = given if is_inline else Path(given).expanduser().read_bytes().decode("utf-8-sig")
        return json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":"))
    except (OSError, ValueError, RuntimeError, RecursionError) as error:  # RuntimeError: ~ without a home
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        got = "JSON" if is_inline else repr(given)
        raise UserError(f"project.schema must be a JSON schema or a JSON file in UTF-8, got {got} ({reason})") from None


def grammars_of(model: ModelSettings) -> Grammars:
    """Grammars for a model's tokenizer and its end tokens."""

    def load() -> tuple[PreTrainedTokenizerBase, Sequence[int]]:
        from lab.models.sources import end_ids_of, load_tokenizer_only

        return load_tokenizer_only(model), end_ids_of(model)

    return Grammars(load)


def bad_word_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[int, ...]]:
    """The token sequences of a bad word: without and with a space before it, as in vLLM (docs.vllm.ai,
    SamplingParams.bad_words). Other tokens that spell it are not banned."""
    written = (text.lstrip(), f" {text.lstrip()}")
    return sorted({tuple(tokenizer(one, add_special_tokens=False)["input_ids"]) for one in written})


def check_rows(ids: Sequence[int], rows: int, whose: str, text_of: Callable[[int], Any]) -> None:
    """UserError for a prompt with an id that the model named `whose` has no row for."""
    wrong = next((token for token in ids if token >= rows), None)
    if wrong is not None:
        rule = f"prompt must hold tokens that the {whose} has rows for, ids below {rows}"
        raise UserError(f"{rule}, got {text_of(wrong)!r} (id {wrong})")


def most_new_tokens(settings: TextSettings, prompt_tokens: int, context: int) -> int:
    """Most new tokens of a generation. UserError for a prompt that fills the context."""
    if settings.max_new_tokens != FILL:
        return settings.max_new_tokens
    if prompt_tokens >= context:
        raise UserError(f"prompt must leave room in the context of {context} tokens, got {prompt_tokens}")
    return context - prompt_tokens


def decoder(tokenizer: PreTrainedTokenizerBase, ends: Collection[int]) -> Callable[[Sequence[int]], str]:
    """A function from ids to text, without control tokens and `ends`; no space is changed."""
    options: dict[str, Any] = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return lambda ids: str(tokenizer.decode([token for token in ids if token not in ends], **options))
