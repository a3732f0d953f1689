"""Sampling settings on the wire: the first fields of OPEN in every protocol."""

from typing import Annotated, Any

import msgspec

from lab.engine.sampling import Sampling
from lab.text.logit_rules import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_BIASES, MAX_SCHEMA_BYTES, LogitRules
from lab.wire.fields import Uint31, Uint32, Uint63
from lab.wire.frames import Head

Bias = tuple[Uint31, float]
BadWord = Annotated[list[Uint31], msgspec.Meta(min_length=1, max_length=MAX_BAD_WORD_TOKENS)]

SAMPLING_BYTES = 101 + 16 * MAX_BIASES + 5 * MAX_BAD_WORD_TOKENS + 3 * MAX_BAD_WORDS + MAX_SCHEMA_BYTES
"""Most bytes of these fields: a frame that announces more is refused before anything is allocated for it."""


class LogitRulesHead(Head):
    """The fields of `lab.text.logit_rules.LogitRules`."""

    prompt_tokens: Uint32
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Annotated[list[Bias], msgspec.Meta(max_length=MAX_BIASES)]
    bad_words: Annotated[list[BadWord], msgspec.Meta(max_length=MAX_BAD_WORDS)]
    schema: Annotated[str, msgspec.Meta(max_length=MAX_SCHEMA_BYTES)]


class SamplingHead(Head):
    """The fields of `lab.engine.sampling.Sampling`."""

    seed: Uint63
    temperature: float
    top_k: Uint32
    top_p: float
    min_p: float
    logit_rules: LogitRulesHead | None
    top_tokens: Uint32

    @property
    def sampling(self) -> Sampling:
        """The sampling that the head describes. Raises ValueError for values out of range."""
        own = {name: getattr(self, name) for name in SamplingHead.__struct_fields__}  # OPEN has more of its own
        return Sampling(**{**own, "logit_rules": _rules(self.logit_rules)})


def sampling_fields(sampling: Sampling) -> dict[str, Any]:
    """The fields of a `SamplingHead`."""
    return {**vars(sampling), "logit_rules": _head(sampling.logit_rules)}


def _rules(head: LogitRulesHead | None) -> LogitRules | None:
    if head is None:
        return None
    listed = {"logit_bias": tuple(head.logit_bias), "bad_words": tuple(map(tuple, head.bad_words))}
    return LogitRules(**{**msgspec.structs.asdict(head), **listed})


def _head(rules: LogitRules | None) -> LogitRulesHead | None:
    if rules is None:
        return None
    listed = {"logit_bias": list(rules.logit_bias), "bad_words": list(map(list, rules.bad_words))}
    return LogitRulesHead(**{**vars(rules), **listed})
