"""Settings of a generation, which `speculative.drafter` and `split.infer` share."""

from dataclasses import dataclass
from typing import Any

from lab.settings import require
from lab.text.logit_rules import check_bias, check_ranges

FILL = -1
"""Value of `max_new_tokens` for as many as the context has room for."""
MAX_STOPS = 64
MAX_STOP_LENGTH = 1024
"""Characters of one stop string."""


@dataclass(kw_only=True)
class TextSettings:
    """One generation, from its prompt to its end."""

    max_new_tokens: int
    """Most new tokens; -1: as many as the context has room for."""
    stop: Any  # OmegaConf 2.3 knows no union of a text and a list
    """One text or a list of them: the text ends before the first occurrence of one of them, which is not part of
    it."""
    temperature: float
    """0 takes the target's best token."""
    top_k: int
    """Only the k best tokens can be drawn; 0: all."""
    top_p: float
    """Only the best tokens that together have this probability can be drawn; 1: all."""
    min_p: float
    """Only tokens that have at least this share of the best one's probability can be drawn; 0: all."""
    repetition_penalty: float
    """Logits of tokens that occur in the text, prompt included, are divided by this (multiplied if they are
    negative), as in transformers; 1: off."""
    presence_penalty: float
    """Subtracted from the logits of tokens that were generated, as OpenAI and vLLM do; 0: off."""
    frequency_penalty: float
    """The same, times how often each was generated; 0: off."""
    logit_bias: Any  # OmegaConf 2.3 lets no typed mapping be given on the command line
    """Token ids, and what is added to their logits, from -100 to 100; null: nothing."""
    bad_words: list[str]
    """Texts that must not occur, as their tokens with and without a space before them: the token that would complete
    one is banned."""
    schema: str | None
    """A JSON schema that the text follows: a JSON file, or the schema itself, which begins with a brace. null: none."""
    chat: bool
    """Put the prompt through the model's chat template when it has one."""
    system: str | None
    """System message before the prompt, where the chat template has a place for one; null: none."""
    messages: str | None
    """A JSON file with a list of {"role": ..., "content": ...} in place of the prompt, the last one the user's; null:
    `prompt` is the only one."""
    special_tokens: bool
    """Without a chat template: whether control tokens in a prompt, such as <|im_end|>, are control tokens. false: text,
    as they always are in a message."""

    def __post_init__(self) -> None:
        counts = f"max_new_tokens must be in [1, 2**32), or {FILL} to fill the context"
        require(1 <= self.max_new_tokens < 2**32 or self.max_new_tokens == FILL, counts, self.max_new_tokens)
        check_ranges(self)
        check_bias(self.biases)
        require(len(self.stops) <= MAX_STOPS, f"stop must hold at most {MAX_STOPS} texts", len(self.stops))
        for text in self.stops:
            rule = f"stop must hold texts of 1 to {MAX_STOP_LENGTH} characters"
            require(1 <= len(text) <= MAX_STOP_LENGTH, rule, text)
        for text in self.bad_words:
            require(bool(text.strip()), "bad_words must hold texts with something in them", text)
        both = self.system is not None and self.messages is not None
        require(not both, "system must be null where messages holds the system's, too", self.system)

    @property
    def biases(self) -> list[tuple[int, float]]:
        """Token ids with their biases."""
        given = {} if self.logit_bias is None else self.logit_bias
        rule = "logit_bias must be token ids with numbers, such as {5: -100}"
        require(isinstance(given, dict), rule, given)
        for token, bias in given.items():
            require(type(token) is int and type(bias) in (int, float), rule, given)
        return [(token, float(bias)) for token, bias in given.items()]

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        is_list = isinstance(given, list) and all(isinstance(text, str) for text in given)
        require(is_list, "stop must be a text or a list of texts", given)
        return given
