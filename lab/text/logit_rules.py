"""Rules that change logits before a token is drawn: penalties for tokens of the text, biases, banned sequences, and a
JSON schema.

They are a function of the text before the token and of nothing else: a drafter and a target with the same text change
logits alike, so speculation does not change the text. Applied in the order of vLLM (docs.vllm.ai,
v1/sample/sampler.py): banned tokens, bias, repetition, frequency, presence; the schema has the last word.

Knows nothing about logits: `lab.engine.history` changes them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

MAX_BIASES = 1024
MAX_BAD_WORDS = 1024
MAX_BAD_WORD_TOKENS = 4096
"""Most tokens of all bad words together."""
MAX_SCHEMA_BYTES = 2**14
"""Most bytes of a schema in UTF-8: it has to fit into the head of a frame (64 KiB), beside all other rules."""


@dataclass(frozen=True, kw_only=True)
class LogitRules:
    """The rules of one text. `Sampling.logit_rules` is None without any."""

    prompt_tokens: int
    """Length of the prompt: presence and frequency count only tokens after it."""
    repetition_penalty: float = 1.0
    """The logit of each token that occurs in the text, prompt included, is divided by this if it is positive, and
    multiplied if it is negative: transformers' `repetition_penalty`, after CTRL (Keskar et al., arXiv 1909.05858,
    section 4.1). 1 switches it off."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that was generated (OpenAI, API reference, `presence_penalty`; as vLLM
    does it). 0 switches it off."""
    frequency_penalty: float = 0.0
    """Subtracted once for each time the token was generated (OpenAI, `frequency_penalty`)."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids, and what is added to their logits (OpenAI, `logit_bias`)."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token sequences that never occur: the token that would complete one is banned, also where the prompt begins it
    (transformers, `bad_words_ids`). Where every token that may come is banned, none is: a text has to go on."""
    schema: str = ""
    """A JSON schema that the tokens after the prompt follow (`lab.text.grammars`); empty: none."""

    def __post_init__(self) -> None:
        check_ranges(self)
        check_bias(self.logit_bias)
        if len({token for token, _ in self.logit_bias}) < len(self.logit_bias):
            raise ValueError("logit_bias must name each token once, got one twice")
        if not all(self.bad_words):
            raise ValueError("bad_words must have at least one token each, got one without")
        tokens = sum(map(len, self.bad_words))
        if len(self.bad_words) > MAX_BAD_WORDS or tokens > MAX_BAD_WORD_TOKENS:
            raise ValueError(
                f"bad_words must be at most {MAX_BAD_WORDS} of {MAX_BAD_WORD_TOKENS} tokens together, "
                f"got {len(self.bad_words)} of {tokens}"
            )
        schema_bytes = len(self.schema.encode(errors="surrogatepass"))
        if schema_bytes > MAX_SCHEMA_BYTES:
            raise ValueError(f"schema must be at most {MAX_SCHEMA_BYTES} bytes of JSON, got {schema_bytes}")

    @property
    def is_off(self) -> bool:
        """Whether no rule changes anything."""
        return self == LogitRules(prompt_tokens=self.prompt_tokens)

    @property
    def _largest_id(self) -> int:
        named = [token for token, _ in self.logit_bias] + [token for word in self.bad_words for token in word]
        return max(named, default=-1)

    @property
    def has_penalties(self) -> bool:
        """Whether logits depend on the tokens of the text so far."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    def check_ids(self, vocabulary_size: int) -> None:
        """ValueError for ids beyond a model's vocabulary."""
        if self._largest_id >= vocabulary_size:
            raise ValueError(
                f"logit_bias and bad_words must name ids in [0, {vocabulary_size}), got {self._largest_id}"
            )

    def within(self, vocabulary_size: int) -> Self:
        """These rules for a drafter with a smaller vocabulary, without the ids that it lacks."""
        if self._largest_id < vocabulary_size:
            return self
        return replace(
            self,
            logit_bias=tuple(pair for pair in self.logit_bias if pair[0] < vocabulary_size),
            bad_words=tuple(word for word in self.bad_words if max(word) < vocabulary_size),
        )


_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda value: math.isfinite(value) and value >= 0, "finite and at least 0"),
    "top_k": (lambda value: 0 <= value < 2**32, "in [0, 2**32)"),
    "top_p": (lambda value: 0 < value <= 1, "in (0, 1]"),
    "min_p": (lambda value: 0 <= value <= 1, "in [0, 1]"),
    "repetition_penalty": (lambda value: 0.01 <= value <= 100, "in [0.01, 100]"),
    "presence_penalty": (lambda value: -2 <= value <= 2, "in [-2, 2]"),
    "frequency_penalty": (lambda value: -2 <= value <= 2, "in [-2, 2]"),
}


def check_ranges(given: object) -> None:
    """ValueError for the first field of `given` that is out of its range; fields without a range are skipped."""
    for name, (holds, rule) in _RANGES.items():
        if hasattr(given, name) and not holds(value := getattr(given, name)):
            raise ValueError(f"{name} must be {rule}, got {value}")


def check_bias(logit_bias: Sequence[tuple[int, float]]) -> None:
    """ValueError for too many biases, and for an id or bias that is out of range."""
    if len(logit_bias) > MAX_BIASES:
        raise ValueError(f"logit_bias must be for at most {MAX_BIASES} tokens, got {len(logit_bias)}")
    for token, bias in logit_bias:
        if not 0 <= token < 2**31:
            raise ValueError(f"logit_bias must name token ids in [0, 2^31), got {token}")
        if not -100 <= bias <= 100:
            raise ValueError(f"logit_bias must be in [-100, 100], got {bias} for token {token}")
