"""Prompts as the ids that a model reads: plain text, or messages through its chat template.

A message is data: control tokens in it are plain text. To tell them from those that the template writes itself, the
messages are rendered once more with marks around theirs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.learning.records import Dialogue, Message, parse_row, unique_keys
from lab.settings import UserError
from lab.text.chat import check_shown, plain_message
from lab.text.data_text import DataEncoder, Span, unused_letters
from lab.text.marked_messages import Marks, control_of, marked, may_hold_control, taken_out, texts_of
from lab.text.settings import TextSettings

if TYPE_CHECKING:  # transformers takes seconds to import, and only names are needed here
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]
"""Messages as chat templates take them."""


def input_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, settings: TextSettings) -> list[int]:
    """The ids of `prompt`, or of `project.messages`.

    Raises:
        UserError: no prompt, or both a prompt and messages; messages that the chat template does not show, or a file
            without any.
    """
    if settings.messages is not None:
        if prompt:
            raise UserError("prompt must be empty where project.messages is given, got both")
        _check_template(tokenizer, settings, "messages")
        return dialogue_ids(tokenizer, read_messages(settings.messages))
    if not prompt:
        raise UserError("prompt must not be empty, got ''")
    if settings.system is not None:
        _check_template(tokenizer, settings, "system")
        messages = Message("system", settings.system), Message("user", prompt)
        return dialogue_ids(tokenizer, Dialogue(messages, "project.system and prompt"))
    return prompt_ids(tokenizer, prompt, settings.chat, special_tokens=settings.special_tokens)


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool, *, special_tokens: bool = False
) -> list[int]:
    """The ids of a prompt; with `chat`, through the model's chat template if it has one.

    `special_tokens`: whether control tokens in a prompt without a template are read as such, and not as text.
    """
    if chat and tokenizer.chat_template:
        return chat_ids(tokenizer, [{"role": "user", "content": prompt}], "prompt")
    if special_tokens:
        return list(tokenizer(prompt)["input_ids"])
    return DataEncoder(tokenizer).encode_data(prompt, add_special_tokens=True)


def chat_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, whose: str, encoder: DataEncoder | None = None
) -> list[int]:
    """The ids of messages as the chat template shows them, up to the point where the model continues. A server has an
    `encoder` of its tokenizer already."""
    encoder = encoder or DataEncoder(tokenizer)
    text = _rendered(tokenizer, messages, whose)
    data: list[Span] = []
    if any(may_hold_control(said, encoder) for said in texts_of(messages)):
        data = _data_spans(tokenizer, encoder, messages, text, whose)
    return encoder.encode(text, data, add_special_tokens=False)


def dialogue_ids(tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue) -> list[int]:
    """The ids of a dialogue. UserError if the template leaves out a part, such as a system message or a tool call."""

    def plain(dialogue: Dialogue) -> Messages:
        return [plain_message(message) for message in dialogue.messages]

    last = len(dialogue.messages) - 1
    check_shown(dialogue, last, lambda marked: _rendered(tokenizer, plain(marked), dialogue.name))
    return chat_ids(tokenizer, plain(dialogue), dialogue.name)


def read_messages(file: str) -> Dialogue:
    """The messages in a JSON file. UserError for a file without any, or if the last one is not the user's."""
    try:
        text = Path(file).expanduser().read_bytes().decode("utf-8-sig")
        rows = json.loads(text, object_pairs_hook=unique_keys("a message"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"project.messages must be a JSON file in UTF-8, got {file!r} ({reason})") from None
    dialogue = parse_row({"messages": rows}, "project.messages")
    assert isinstance(dialogue, Dialogue)
    if dialogue.messages[-1].role not in ("user", "tool"):
        raise UserError(
            f"project.messages must end with what the model answers (role user), got {dialogue.messages[-1].role}"
        )
    return dialogue


def _check_template(tokenizer: PreTrainedTokenizerBase, settings: TextSettings, name: str) -> None:
    if not settings.chat:
        raise UserError(f"project.chat must be true for project.{name}, got false")
    if not tokenizer.chat_template:
        raise UserError(f"project.{name} must be null for a model without a chat template")


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Messages, whose: str) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template raises what it likes
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{whose} must suit the model's chat template, got: {reason}") from None


def _data_spans(
    tokenizer: PreTrainedTokenizerBase, encoder: DataEncoder, messages: Messages, text: str, whose: str
) -> list[Span]:
    """Spans of the rendered text that look like control tokens and belong to messages, not to the template."""
    marks = Marks(*unused_letters(3, text, json.dumps(messages, ensure_ascii=False)))
    shown_marked = [marked(message, control_of(message, encoder), encoder, marks) for message in messages]
    places, shown = taken_out(_rendered(tokenizer, shown_marked, whose), marks)
    if shown != text:
        raise UserError(
            f"{whose} must hold no control tokens with this chat template, which shows a message otherwise with marks "
            "around them"
        )
    begins, ends, _ = (places[mark] for mark in marks)
    everywhere = set().union(*places.values())
    return [
        (start, end)
        for start, end in encoder.data_spans(text)
        if (start in begins and end in ends) or not everywhere.isdisjoint(range(start + 1, end))
    ]
