"""What /openapi.json says of bodies: the fields that are read, and no others, with the types that are served."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from serve import bodies
from serve.faults import RequestFault
from serve.fields import Fields
from serve.text_request import Limits, TextRequest, read_chat, read_completion

LIMITS = Limits(max_new_tokens=8, temperature=1.0, choices=4)
READERS: dict[str, tuple[Callable[..., TextRequest], Mapping[str, Any], dict[str, Any]]] = {
    "chat": (read_chat, bodies.CHAT, {"messages": [{"role": "user", "content": "a"}]}),
    "completion": (read_completion, bodies.COMPLETION, {"prompt": "a"}),
}
NOT_OF_READERS = {"model", "show_guesses"}
"""Fields that the routes read."""
WRONG = {"string": 5, "boolean": "yes", "integer": 1.5, "number": "1", "object": [], "array": 5, "null": "x"}
"""A value that is not of this type."""


class Bytes:
    """A tokenizer whose tokens are bytes."""

    vocabulary_size = 256
    context = 512

    def ids_of_prompt(self, prompt: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(prompt.encode())

    def ids_of_messages(self, messages: list[dict[str, Any]]) -> list[int]:
        return list(str(messages).encode())


class Noted(dict[str, Any]):
    """A document that notes which of its fields are read."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        super().__init__(document)
        self.read = set[str]()

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)


@pytest.mark.parametrize("kind", READERS)
def test_the_fields_that_are_read_are_those_that_are_described(kind: str) -> None:
    read, described, least = READERS[kind]
    document = Noted(least)
    read(Fields(document), Bytes(), LIMITS)
    assert document.read | NOT_OF_READERS == set(described)


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, (_, described, _) in READERS.items() for name in described]
)
def test_a_value_of_another_type_is_refused(kind: str, name: str) -> None:
    if name in NOT_OF_READERS:
        return
    read, described, least = READERS[kind]
    schema = described[name]
    value = WRONG[schema["type"]] if "type" in schema else {"x": 1}
    with pytest.raises(RequestFault) as caught:
        read(Fields({**least, name: value}), Bytes(), LIMITS)
    assert caught.value.status == 400
    assert str(caught.value.param).startswith(name)


@pytest.mark.parametrize(
    ("kind", "name", "bound"),
    [
        (kind, name, bound)
        for kind, (_, described, _) in READERS.items()
        for name, schema in described.items()
        for bound in ("minimum", "maximum")
        if bound in schema
    ],
)
def test_bounds_are_those_that_are_served(kind: str, name: str, bound: str) -> None:
    read, described, least = READERS[kind]
    edge, step = described[name][bound], (-1 if bound == "minimum" else 1)
    others = {"logprobs": True} if (kind, name) == ("chat", "top_logprobs") else {}
    read(Fields({**least, **others, name: edge}), Bytes(), LIMITS)
    with pytest.raises(RequestFault):
        read(Fields({**least, **others, name: edge + step}), Bytes(), LIMITS)
