"""Text that is data: what looks like a control token in it, such as <|im_end|>, is encoded as plain characters.

A tokenizer finds its control tokens in any text, whatever their origin. So that it finds none in the data, the text is
encoded by a copy of the tokenizer whose control tokens have other names, and the real control tokens of the text are
replaced by these names. Everything else (merges, spaces) is as the tokenizer does it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from functools import cached_property
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from lab.settings import UserError

if TYPE_CHECKING:  # transformers takes seconds to import, and only names are needed here
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
_UNUSED = range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE)
"""Unicode's private use areas, which have no meaning and hardly ever occur in a text."""


def unused_letters(count: int, *texts: str) -> list[str]:
    """Characters that occur in none of these texts. UserError if the texts hold all private-use characters."""
    taken = set().union(*texts)
    free = list(islice((chr(code) for code in chain(*_UNUSED) if chr(code) not in taken), count))
    if len(free) < count:
        raise UserError(f"texts must leave {count} characters for private use unused, got all of them")
    return free


class DataEncoder:
    """Encodes texts, parts of which are data, with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer: Any = tokenizer
        added = {token.content: token for token in self._tokenizer.added_tokens_decoder.values()}
        added = {text: token for text, token in added.items() if text.strip()}
        template = _template_of(self._tokenizer)
        self.special = frozenset(text for text, token in added.items() if token.special)
        """Control tokens by their text."""
        self.control = self.special | {text for text in added if text in template}
        """These, and the tokens that the chat template writes although they are not marked as special."""
        self._letters: list[str] | None = None
        """Letters of the names in the copy; None: there is no copy yet."""
        self._names: dict[str, str] = {}
        self._renamed: Tokenizer
        self._own_ids: dict[int, int] = {}
        """Ids of the copy's added tokens, and those of the tokenizer."""
        # A tokenizer takes the longest of those that begin at the first place where one begins.
        longest = sorted(added, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest)) or r"(?!)")

    def data_spans(self, text: str, control: Collection[str] | None = None) -> list[Span]:
        """Positions of control tokens (of this set) in a text that is all data."""
        known = self.control if control is None else control
        return [found.span() for found in self.pattern.finditer(text) if found[0] in known]

    def encode_data(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The ids of a text that is all data."""
        return self.encode(text, self.data_spans(text), add_special_tokens=add_special_tokens)

    def encode(self, text: str, data: Sequence[Span], *, add_special_tokens: bool) -> list[int]:
        """The ids of a text in which the control tokens at `data` are plain text.

        Raises:
            UserError: a tokenizer that has no other way to write one of them.
        """
        if not data:  # verbose: a text that is too long is for others to refuse
            return list(self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])
        names = self._names_for(text)
        places = set(data)
        real: list[str] = []
        pieces, at = [], 0
        for found in self.pattern.finditer(text):
            if found[0] in names and found.span() not in places:
                pieces += [text[at : found.start()], names[found[0]]]
                real.append(found[0])
                at = found.end()
        ids = [self._own_ids.get(number, number) for number in self._encoded("".join([*pieces, text[at:]]))]
        known = {self._id(token) for token in self.control}
        if [token for token in ids if token in known] != [self._id(token) for token in real]:
            shown = sorted({text[start:end] for start, end in data})
            raise UserError(
                f"prompt must hold no {', '.join(shown)} for this tokenizer, which has no other way to write it"
            )
        before, behind = self._around if add_special_tokens else ([], [])
        return [*before, *ids, *behind]

    def _names_for(self, text: str) -> dict[str, str]:
        """New names for control tokens, by their own; none of them occurs in `text`."""
        if self._letters is None or any(letter in text for letter in self._letters):
            first, last = self._letters = unused_letters(2, text)
            self._names = {token: f"{first}{index}{last}" for index, token in enumerate(sorted(self.control))}
            self._renamed = self._copy(self._names)
            called = {name: token for token, name in self._names.items()}
            self._own_ids = {
                number: self._id(called.get(token.content, token.content))
                for number, token in self._renamed.get_added_tokens_decoder().items()
            }
        return self._names

    def _encoded(self, text: str) -> list[int]:
        return list(self._renamed.encode(text, add_special_tokens=False).ids)

    def _copy(self, names: dict[str, str]) -> Tokenizer:
        from tokenizers import Tokenizer

        described = json.loads(self._description)
        for token in described["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        return Tokenizer.from_str(json.dumps(described, ensure_ascii=False))

    def _id(self, token: str) -> int:
        return int(self._tokenizer.convert_tokens_to_ids(token))

    @cached_property
    def _description(self) -> str:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError("prompt must hold no control tokens for a tokenizer without a tokenizer.json")
        return str(backend.to_str())

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """The ids that the tokenizer adds before and after every text."""
        alone = list(self._tokenizer("a", add_special_tokens=False)["input_ids"])
        whole = list(self._tokenizer("a")["input_ids"])
        starts = (start for start in range(len(whole)) if whole[start : start + len(alone)] == alone)
        start = next(starts, 0)
        return whole[:start], whole[start + len(alone) :]


def _template_of(tokenizer: Any) -> str:
    template = tokenizer.chat_template
    return template if isinstance(template, str) else json.dumps(template or "", ensure_ascii=False)
