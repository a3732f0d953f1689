"""The tokenizer of a served model: prompts and messages as ids, ids as text and bytes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from typing_extensions import override

from lab.settings import UserError
from lab.text.data_text import DataEncoder
from lab.text.generation import decoder
from lab.text.prompts import chat_ids
from serve.faults import RequestFault
from serve.text_request import Texts

_BYTE = re.compile(r"<0x([0-9A-F]{2})>\Z")
KEPT_PIECES = 2**16


class ModelTexts(Texts):
    """The texts of one model.

    Args:
        tokenizer: Its own.
        end_ids: Ids that end a text, and are no part of it.
        vocabulary_size: Ids that the model has rows for.
        context: Most tokens of a text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int], *, vocabulary_size: int, context: int
    ) -> None:
        self._tokenizer: Any = tokenizer
        self.end_ids = frozenset(end_ids)
        self.vocabulary_size, self.context = vocabulary_size, context
        self.decode: Callable[[Sequence[int]], str] = decoder(tokenizer, self.end_ids)
        self._encoder = DataEncoder(tokenizer)
        self.piece = lru_cache(KEPT_PIECES)(self._piece)
        """Text and bytes of one token inside a text."""
        self._encoder.encode_data("a", add_special_tokens=True)  # what is made once is made here, in one thread

    @override
    def ids_of_prompt(self, prompt: str, *, add_special_tokens: bool = True) -> list[int]:
        found = self._encoded(prompt, "prompt", add_special_tokens=add_special_tokens)
        if not found:
            raise RequestFault(400, f"prompt must hold at least one token, got {prompt!r}", param="prompt")
        self._check_rows(found, "prompt")
        return found

    @override
    def ids_of_messages(self, messages: list[dict[str, Any]]) -> list[int]:
        if not self._tokenizer.chat_template:
            return self._without_template(messages)
        try:
            found = chat_ids(self._tokenizer, messages, "messages", self._encoder)
        except UserError as error:
            raise RequestFault(400, str(error), param="messages") from None
        self._check_rows(found, "messages")
        return found

    def _without_template(self, messages: list[dict[str, Any]]) -> list[int]:
        """Messages as `lab.text.chat` shows them to a model without a template when it learns: a line break after each,
        the end-of-text token after an answer."""
        begin = self._encoded("", "messages", add_special_tokens=True)
        end = self._tokenizer.eos_token_id
        found = list(begin)
        for message in messages:
            is_answer = message["role"] == "assistant" and end is not None
            shown = message["content"] + ("" if is_answer else "\n")
            found += [*self._encoded(shown, "messages", add_special_tokens=False), *([end] if is_answer else [])]
        self._check_rows(found, "messages")
        return found

    def tokenize(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The ids of a text, in which control tokens are plain text; none for an empty one."""
        return self._encoded(text, "prompt", add_special_tokens=add_special_tokens)

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of ids, control tokens included."""
        options: dict[str, Any] = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return str(self._tokenizer.decode(list(ids), **options))

    def info(self) -> dict[str, Any]:
        """What evaluation harnesses ask of a tokenizer: class, control tokens, chat template."""
        tokens = {name: str(token) for name, token in self._tokenizer.special_tokens_map.items() if token}
        return {
            "tokenizer_class": type(self._tokenizer).__name__,
            "chat_template": self._tokenizer.chat_template,
            "eos_token": self._tokenizer.eos_token,
            "bos_token": self._tokenizer.bos_token,
            "pad_token": self._tokenizer.pad_token,
            "model_max_length": self.context,
            "vocab_size": self.vocabulary_size,
        } | {name: value for name, value in tokens.items() if isinstance(value, str)}

    def names(self, ids: Sequence[int]) -> list[str]:
        """Names of ids in the vocabulary."""
        return [str(name) for name in self._tokenizer.convert_ids_to_tokens(list(ids))]

    def _encoded(self, text: str, param: str, *, add_special_tokens: bool) -> list[int]:
        try:
            return self._encoder.encode_data(text, add_special_tokens=add_special_tokens)
        except UserError as error:
            raise RequestFault(400, str(error), param=param) from None

    @cached_property
    def _before(self) -> list[int]:
        """A token before another: tokenizers treat the first token of a text differently."""
        return self._encoder.encode_data("a", add_special_tokens=False)[-1:]

    @cached_property
    def _bytes_of_letters(self) -> dict[str, int]:
        """Letters that stand for bytes in a byte-level vocabulary."""
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        return {letter: byte for byte, letter in bytes_to_unicode().items()}

    def _piece(self, token: int) -> tuple[str, bytes]:
        options: dict[str, Any] = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        before = str(self._tokenizer.decode(self._before, **options))
        text = str(self._tokenizer.decode([*self._before, token], **options))[len(before) :]
        if "\N{REPLACEMENT CHARACTER}" not in text:
            return text, text.encode()
        name = str(self._tokenizer.convert_ids_to_tokens([token])[0])
        if byte := _BYTE.match(name):
            return text, bytes([int(byte[1], 16)])
        letters = [self._bytes_of_letters.get(letter) for letter in name]
        known = bytes(byte for byte in letters if byte is not None)
        return text, known if len(known) == len(letters) else text.encode()

    def _check_rows(self, ids: Sequence[int], param: str) -> None:
        strange = next((one for one in ids if one >= self.vocabulary_size), None)
        if strange is not None:
            rule = f"{param} must hold tokens that the model has rows for, ids below {self.vocabulary_size}"
            raise RequestFault(400, f"{rule}, got {strange}", param=param)
