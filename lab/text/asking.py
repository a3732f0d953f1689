"""From the settings of a text to an engine's arguments: sampling with its rules, length, decoder."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from lab.engine.sampling import Sampling
from lab.settings import UserError, user_errors
from lab.text.logit_rules import LogitRules
from lab.text.settings import FILL, TextSettings

if TYPE_CHECKING:  # transformers takes seconds to import, and only names are needed here
    from transformers import PreTrainedTokenizerBase


def asked_sampling(asked: TextSettings, seed: int, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int) -> Sampling:
    """The sampling of a text with such a prompt. UserError for invalid penalties, biases or bad words."""
    with user_errors("project."):
        rules = LogitRules(
            prompt_tokens=prompt_tokens,
            repetition_penalty=asked.repetition_penalty,
            presence_penalty=asked.presence_penalty,
            frequency_penalty=asked.frequency_penalty,
            logit_bias=tuple(asked.biases),
            bad_words=tuple(word for text in asked.bad_words for word in bad_word_ids(tokenizer, text)),
        )
    return Sampling(
        seed=seed,
        temperature=asked.temperature,
        top_k=asked.top_k,
        top_p=asked.top_p,
        min_p=asked.min_p,
        logit_rules=None if rules.is_off else rules,
    )


def bad_word_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[int, ...]]:
    """The token sequences that write a text, at the beginning of a word and within one: without and with a space before
    it, as vLLM does it (docs.vllm.ai, SamplingParams.bad_words). Other ways to write it are not banned."""
    written = (text.lstrip(), f" {text.lstrip()}")
    return sorted({tuple(tokenizer(one, add_special_tokens=False)["input_ids"]) for one in written})


def check_rows(ids: Sequence[int], rows: int, whose: str, text_of: Callable[[int], Any]) -> None:
    """UserError for a prompt with an id that a model, `whose`, has no row for."""
    wrong = next((token for token in ids if token >= rows), None)
    if wrong is not None:
        rule = f"prompt must hold tokens that the {whose} has rows for, ids below {rows}"
        raise UserError(f"{rule}, got {text_of(wrong)!r} (id {wrong})")


def most_new_tokens(asked: TextSettings, prompt_tokens: int, context: int) -> int:
    """Most new tokens of a text. UserError for a prompt that fills the context."""
    if asked.max_new_tokens != FILL:
        return asked.max_new_tokens
    if prompt_tokens >= context:
        raise UserError(f"prompt must leave room in the context of {context} tokens, got {prompt_tokens}")
    return context - prompt_tokens


def decoder(tokenizer: PreTrainedTokenizerBase, ends: Collection[int]) -> Callable[[Sequence[int]], str]:
    """A function from ids to text: without control tokens and `ends`, and with every space as it is."""
    options: dict[str, Any] = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return lambda ids: str(tokenizer.decode([token for token in ids if token not in ends], **options))
