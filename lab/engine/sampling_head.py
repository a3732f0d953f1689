"""Sampling settings on the wire: the first fields of OPEN in every protocol."""

from typing import Annotated, Any

import msgspec

from lab.engine.sampling import Sampling
from lab.text.words import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_BIASES, Words
from lab.wire.fields import Uint31, Uint32, Uint63
from lab.wire.frames import Head

Bias = tuple[Uint31, float]
BadWord = Annotated[list[Uint31], msgspec.Meta(min_length=1, max_length=MAX_BAD_WORD_TOKENS)]

SAMPLING_BYTES = 96 + 16 * MAX_BIASES + 5 * MAX_BAD_WORD_TOKENS + 3 * MAX_BAD_WORDS
"""Most bytes of these fields: a frame that announces more is refused before anything is allocated for it."""


class WordsHead(Head):
    """The fields of `lab.text.words.Words`."""

    prompt_tokens: Uint32
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Annotated[list[Bias], msgspec.Meta(max_length=MAX_BIASES)]
    bad_words: Annotated[list[BadWord], msgspec.Meta(max_length=MAX_BAD_WORDS)]


class SamplingHead(Head):
    """The fields of `lab.engine.sampling.Sampling`."""

    seed: Uint63
    temperature: float
    top_k: Uint32
    top_p: float
    min_p: float
    words: WordsHead | None

    @property
    def sampling(self) -> Sampling:
        """The sampling that the head describes. Raises ValueError for values out of range."""
        own = {name: getattr(self, name) for name in SamplingHead.__struct_fields__}  # OPEN has more of its own
        return Sampling(**{**own, "words": _words(self.words)})


def sampling_fields(sampling: Sampling) -> dict[str, Any]:
    """The fields of a `SamplingHead`."""
    return {**vars(sampling), "words": _head(sampling.words)}


def _words(head: WordsHead | None) -> Words | None:
    if head is None:
        return None
    listed = {"logit_bias": tuple(head.logit_bias), "bad_words": tuple(map(tuple, head.bad_words))}
    return Words(**{**msgspec.structs.asdict(head), **listed})


def _head(words: Words | None) -> WordsHead | None:
    if words is None:
        return None
    listed = {"logit_bias": list(words.logit_bias), "bad_words": list(map(list, words.bad_words))}
    return WordsHead(**{**vars(words), **listed})
