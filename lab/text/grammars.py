"""Texts that follow a JSON schema: the tokens that may come next, and those that must.

llguidance (https://github.com/guidance-ai/llguidance) compiles a schema and matches tokens with it. What it allows is a
function of the schema and of the tokens after the prompt, and of nothing else: a drafter, a target and a shard that was
rebuilt allow the same tokens.

JSON is written in one line, as Python's `json.dumps` does. JSON allows any whitespace between two parts, and a small
model that may write some can write it for ever; and where the layout is free, fewer tokens are forced.

Knows nothing about logits: `lab.engine.history` masks them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from functools import cached_property, lru_cache
from itertools import takewhile
from typing import TYPE_CHECKING

from llguidance import LLMatcher, LLTokenizer

from lab.faults import Fault

if TYPE_CHECKING:  # transformers takes seconds to import, and only names are needed here
    from llguidance._lib import JsonCompileOptions  # in its stubs only
    from transformers import PreTrainedTokenizerBase

LAYOUT: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
}
"""Options of llguidance's compiler; a schema cannot change them. `lenient` would skip keywords that it does not know,
so that a text need not follow its schema."""
MOST_COMPILED = 32
"""Schemas that are kept compiled."""
PROBES = (
    '{"a": [1, -2.5e+10, true, null], "b c": {}}',
    " two  spaces, \"quotes\" \\ and 'a' tab\tand\n\nlines",
    "Größe naïve Żółw",
    "жук 漢字 עברית",
    "\U0001f642\U0001f469\u200d\U0001f52c",
)
"""Texts that a tokenizer must keep to the byte."""


class GrammarFailed(Fault):
    """llguidance cannot follow a text any further: one of its limits, or no token that continues the text."""


class Grammars:
    """Compiles schemas for one tokenizer.

    Args:
        load: Gives the tokenizer, and the ids that end a text. Called for the first schema: most processes never meet
            one, and the index of a large vocabulary takes a second and tens of megabytes.
    """

    def __init__(self, load: Callable[[], tuple[PreTrainedTokenizerBase, Sequence[int]]]) -> None:
        self._load = load
        self._compiled = lru_cache(MOST_COMPILED)(self._compile)

    def check(self, schema: str) -> None:
        """ValueError for a schema that cannot be compiled, and for any schema if the tokenizer does not fit."""
        self._compiled(schema)

    def begin(self, schema: str) -> GrammarText:
        """An empty text under this schema. ValueError as in `check`."""
        return GrammarText(self._compiled(schema).deep_copy(), self._vocabulary)

    def _compile(self, schema: str) -> LLMatcher:
        tokenizer = self._vocabulary.tokenizer
        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides=LAYOUT)
        except ValueError as error:
            raise ValueError(f"schema must be a JSON object that describes one, got: {_first_line(error)}") from None
        if fault := LLMatcher.validate_grammar(grammar, tokenizer):
            raise ValueError(f"schema must be one that llguidance can compile, got: {_first_line(fault)}")
        matcher = LLMatcher(tokenizer, grammar, log_level=0)
        matcher.compute_bitmask()  # some schemas fail only here, such as one that refers to itself and to nothing else
        if matcher.is_error():
            raise ValueError(f"schema must be one that a text can follow, got: {_first_line(matcher.get_error())}")
        return matcher

    @property
    def _vocabulary(self) -> _Vocabulary:
        found = self._found
        if isinstance(found, str):
            raise ValueError(found)
        return found

    @cached_property
    def _found(self) -> _Vocabulary | str:
        """The vocabulary, or why no schema can be followed with it."""
        tokenizer, end_ids = self._load()
        if not end_ids:
            return "schema must be off for a model without end tokens: its texts would never end"
        if not getattr(tokenizer, "is_fast", False):
            return f"schema must be off for a tokenizer without a tokenizer.json, got {type(tokenizer).__name__}"
        backend = copy(tokenizer.backend_tokenizer)
        backend.no_padding()
        backend.no_truncation()
        try:
            found = LLTokenizer(backend.to_str(), eos_token=list(end_ids))
        except ValueError as error:
            return f"schema must be off for a tokenizer that llguidance cannot read, got: {_first_line(error)}"
        for text in PROBES:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if found.decode_bytes(ids).removeprefix(b" ") != text.encode().removeprefix(b" "):
                return f"schema must be off for a tokenizer whose tokens do not spell a text's bytes, got {text!r} lost"
        return _Vocabulary(found, end_ids)


class _Vocabulary:
    """The tokens of one tokenizer, as llguidance knows them."""

    def __init__(self, tokenizer: LLTokenizer, end_ids: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.end_ids = tuple(end_ids)
        self.size = max(tokenizer.vocab_size, *(token + 1 for token in end_ids))


class GrammarText:
    """The tokens of one text after its prompt, followed through its grammar.

    Costs as much as the tokens that are added or removed. The grammar follows a text up to the first token that it
    does not allow, which only a draft token can be; after that, as after its end, only end tokens are allowed.
    """

    def __init__(self, matcher: LLMatcher, vocabulary: _Vocabulary) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary
        self._followed = 0
        """Tokens that the matcher holds."""
        self.length = 0
        """Tokens of the text."""

    @property
    def is_over(self) -> bool:
        """Whether the text holds an end token, or one that the grammar does not allow."""
        return self._followed < self.length

    def go_back(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if self._followed > length:
            if not self._matcher.rollback(self._followed - length):
                raise GrammarFailed(f"the grammar cannot go back: {_first_line(self._matcher.get_error())}")
            self._followed = length
        self.length = min(self.length, length)

    def go_on(self, ids: Sequence[int]) -> None:
        """Append tokens."""
        if not self.is_over:
            of_text = [*takewhile(self._is_of_text, ids)]
            self._followed += self._matcher.try_consume_tokens(of_text)
            self._check()
        self.length += len(ids)

    def allows(self, token: int) -> bool:
        """Whether this token may come next."""
        if token in self._vocabulary.end_ids:
            return self.is_over or self._matcher.is_accepting()
        return not self.is_over and self._is_of_text(token) and self._matcher.validate_tokens([token]) == 1

    def allowed(self) -> bytearray:
        """[token] is not 0 for each token that may come next; longer tokenizers than models are possible, and shorter.

        Raises:
            GrammarFailed: none may, or a limit of llguidance is reached.
        """
        if self.is_over:
            mask, may_end = bytearray(self._vocabulary.size), True
        else:
            mask, may_end = bytearray(self._matcher.compute_logit_bias()), self._matcher.is_accepting()
            self._check()
            mask += bytes(self._vocabulary.size - len(mask))
        for token in self._vocabulary.end_ids:
            mask[token] = may_end
        if not any(mask):
            raise GrammarFailed(f"no token of the vocabulary continues the text under its schema (token {self.length})")
        return mask

    def forced(self) -> list[int]:
        """Tokens that spell what must come next, as the tokenizer writes it; none where there is a choice.

        The target may write the same bytes with other tokens: these are draft tokens, and no more.
        """
        if self.is_over:
            return []
        if self._matcher.is_stopped():
            return list(self._vocabulary.end_ids[:1])
        return self._vocabulary.tokenizer.tokenize_bytes(self._matcher.compute_ff_bytes())

    def _is_of_text(self, token: int) -> bool:
        return token < self._vocabulary.tokenizer.vocab_size and token not in self._vocabulary.end_ids

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarFailed(f"the grammar cannot follow the text: {_first_line(self._matcher.get_error())}")


def _first_line(fault: object) -> str:
    return " ".join(str(fault).strip().splitlines()[0].split())[:200] if str(fault).strip() else "no reason"
