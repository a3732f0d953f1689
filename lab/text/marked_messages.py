"""Marks around control tokens in messages, by which they are recognised in the output of a chat template."""

import itertools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from lab.text.data_text import DataEncoder, Span

_NAMES = ("role", "type", "id", "tool_call_id")
"""Keys whose values a template may compare with names of its own: values without control tokens stay as they are."""


class Marks(NamedTuple):
    """Characters that occur in no text of a dialogue."""

    begin: str
    """Before a control token in a message."""
    end: str
    """After it."""
    edge: str
    """At the beginning and at the end of a message's text."""


def marked(message: Any, control: Collection[str], encoder: DataEncoder, marks: Marks) -> Any:
    """The message, or a tool, with marks around control tokens (of this set) and edges around its texts: a control
    token across an edge is partly the message's."""

    def put(text: str) -> str:
        core = text.strip()
        if not core:
            return text
        before, _, behind = text.partition(core)
        found = encoder.pattern.sub(
            lambda one: f"{marks.begin}{one[0]}{marks.end}" if one[0] in control else one[0], core
        )
        return f"{before}{marks.edge}{found}{marks.edge}{behind}"

    return _each_text(message, put, lambda name: put(name) if may_hold_control(name, encoder) else name)


def control_of(message: dict[str, Any], encoder: DataEncoder) -> frozenset[str]:
    """Control tokens that are plain text in `message`. A model's answer may contain those of the template, such as
    <think>."""
    return encoder.special if message["role"] == "assistant" else frozenset(encoder.control)


def texts_of(value: Any) -> list[str]:
    """All texts in a message or a tool, names and keys included."""
    found: list[str] = []

    def note(text: str) -> str:
        found.append(text)
        return text

    _each_text(value, note, note)
    return found


def _each_text(value: Any, change: Callable[[str], str], change_name: Callable[[str], str]) -> Any:
    """A value of a message: texts changed by `change`, keys and the values of `_NAMES` by `change_name`."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {
            change_name(key): _each_text(inner, change_name if key in _NAMES else change, change_name)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [_each_text(inner, change, change_name) for inner in value]
    return value


def may_hold_control(text: str, encoder: DataEncoder) -> bool:
    """Whether a text contains a control token, or may be part of one across its edges."""
    core = text.strip()
    return any(
        token in core or any(core.endswith(token[:cut]) or core.startswith(token[cut:]) for cut in range(1, len(token)))
        for token in encoder.control
    )


def holds_control(value: Any, control: Collection[str], encoder: DataEncoder) -> bool:
    """Whether a message or a tool contains a control token (of this set)."""
    return any(encoder.data_spans(text, control) for text in texts_of(value))


def taken_out(text: str, marks: Marks) -> tuple[dict[str, set[int]], str]:
    """The positions of each mark, counted in the text without marks, and that text."""
    places: dict[str, set[int]] = {mark: set() for mark in marks}
    kept: list[str] = []
    at = 0
    for is_ours, letters in itertools.groupby(text, key=lambda letter: letter in places):
        run = "".join(letters)
        if is_ours:
            for letter in run:
                places[letter].add(at)
        else:
            kept.append(run)
            at += len(run)
    return places, "".join(kept)


def spans_of(text: str, marks: Marks) -> tuple[str, list[Span]]:
    """A text without its marks, and the spans that were marked."""
    places, plain = taken_out(text, marks)
    begins, ends = sorted(places[marks.begin]), sorted(places[marks.end])
    return plain, list(zip(begins, ends))
