"""Marks around the control tokens that stand in messages, so that they are known again behind a chat template."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

from lab.data_text import DataEncoder, Span

NOT_SAID = ("role", "type", "id", "tool_call_id")
"""Keys of a message, or in it, whose values are names."""


class Marks(NamedTuple):
    """Characters that stand in no text."""

    begin: str
    """Before a control token in a message."""
    end: str
    """Behind it."""
    edge: str
    """Where a message's text begins, and where it ends."""


def marked(message: dict[str, Any], encoder: DataEncoder, marks: Marks) -> dict[str, Any]:
    """The message with marks around its control tokens, and with edges where its texts begin and end: a control token
    over an edge is in part the message's."""
    control = control_of(message, encoder)

    def put(text: str) -> str:
        core = text.strip()
        if not core:
            return text
        before, _, behind = text.partition(core)
        found = encoder.pattern.sub(
            lambda one: f"{marks.begin}{one[0]}{marks.end}" if one[0] in control else one[0], core
        )
        return f"{before}{marks.edge}{found}{marks.edge}{behind}"

    return {key: value if key in NOT_SAID else each_text(value, put) for key, value in message.items()}


def control_of(message: dict[str, Any], encoder: DataEncoder) -> frozenset[str]:
    """What a model says in an answer may hold tokens that the template writes, too, such as <think>."""
    return encoder.special if message["role"] == "assistant" else encoder.control


def each_text(value: Any, change: Callable[[str], Any]) -> Any:
    """A value of a message with its texts changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: inner if key in NOT_SAID else each_text(inner, change) for key, inner in value.items()}
    if isinstance(value, list):
        return [each_text(inner, change) for inner in value]
    return value


def holds_control(message: dict[str, Any], encoder: DataEncoder) -> bool:
    """Whether a control token stands in what a message says."""
    found: list[str] = []
    each_text({key: value for key, value in message.items() if key not in NOT_SAID}, found.append)
    return any(encoder.data_spans(text, control_of(message, encoder)) for text in found)


def taken_out(text: str, marks: Marks) -> tuple[dict[str, set[int]], str]:
    """Where each mark was in the text without them, and that text."""
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
    """A text without its marks, and the places in it that had some around them."""
    places, plain = taken_out(text, marks)
    begins, ends = sorted(places[marks.begin]), sorted(places[marks.end])
    return plain, list(zip(begins, ends))
