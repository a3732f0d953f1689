import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.learning.records import Dialogue, MalformedRecord, Message, Text, parse_line, parse_row

FUNCTION = {"name": "add", "arguments": {"a": 1}}
CALL = {"type": "function", "function": FUNCTION}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


def messages(*turns: tuple[str, str]) -> tuple[Message, ...]:
    return tuple(Message(role, content) for role, content in turns)


PAIR = messages(("user", "p"), ("assistant", "r"))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "response": "r", "id": 7}, PAIR),
        ({"prompt": "p", "completion": "r"}, PAIR),
        ({"instruction": "p", "output": "r"}, PAIR),
        ({"instruction": "p", "input": "", "output": "r", "text": "not read"}, PAIR),
        ({"instruction": "p", "input": None, "output": "r", "history": []}, PAIR),
        ({"instruction": "p", "input": "i", "output": "r"}, messages(("user", "p\n\ni"), ("assistant", "r"))),
        ({"system": "s", "prompt": "p", "response": "r"}, (Message("system", "s"), *PAIR)),
        ({"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "r"}]}, PAIR),
        ({"conversations": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}]}, PAIR),
        (
            {"prompt": [{"role": "user", "content": "p"}], "completion": [{"role": "assistant", "content": "r"}]},
            PAIR,
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                    {"role": "assistant", "content": "r", "weight": 0},
                ]
            },
            (Message("user", "ab"), Message("assistant", "r", counts=False)),
        ),
    ],
)
def test_a_dialogue_of_every_format(row: dict[str, Any], expected: tuple[Message, ...]) -> None:
    assert parse_row(row, "f:1") == Dialogue(expected, "f:1")


@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}'])
def test_a_tool_call_has_its_arguments_as_an_object(arguments: Any) -> None:
    called = {**FUNCTION, "arguments": arguments}
    row = {
        "messages": [
            {"role": "user", "content": "1 + 1?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": called}],
            },
            {"role": "tool", "content": "2", "name": "add"},
        ],
        "tools": json.dumps([TOOL]),
    }
    record = parse_row(row, "f:1")
    assert isinstance(record, Dialogue)
    assert record.messages[1] == Message("assistant", "", extra={"tool_calls": [CALL]})
    assert record.messages[1].calls == ["add"]
    assert record.messages[2].extra == {"name": "add"}
    assert record.tools == (TOOL,)


def test_sharegpt_calls_tools_too() -> None:
    turns = [
        {"from": "human", "value": "1 + 1?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "2"},
    ]
    record = parse_row({"conversations": turns}, "f:1")
    assert isinstance(record, Dialogue)
    assert record.messages[1].extra == {"tool_calls": [CALL]}
    assert record.messages[2].role == "tool"


def test_a_text_is_a_line() -> None:
    assert parse_row({"text": "é"}, "f:1") == Text("é", whole=True)


def chat(**message: Any) -> dict[str, Any]:
    return {"messages": [message]}


def with_tool(tool: dict[str, Any]) -> dict[str, Any]:
    return {**chat(role="user", content="x"), "tools": [tool]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "f:1 must be a JSON object, got a list of length 1"),
        ({"prompt": "p", "response": 5}, "f:1 response must be text that is not empty, got 5"),
        ({"prompt": "p", "response": ""}, "f:1 response must be text that is not empty, got text of length 0"),
        ({"prompt": "p", "completion": None}, "f:1 completion must be text that is not empty, got null"),
        ({"instruction": "p", "input": 3, "output": "r"}, "f:1 input must be text that is not empty, got 3"),
        (
            {"instruction": "p", "output": "r", "history": [["a", "b"]]},
            "f:1 history must be empty: turns belong in messages, got a list of length 1",
        ),
        ({"text": None}, "f:1 text must be text that is not empty, got null"),
        ({"messages": []}, "f:1 messages must be a list that is not empty, got a list of length 0"),
        ({"messages": ["hi"]}, "f:1 messages[0] must be an object with role and content, got text of length 2"),
        (
            chat(role="robot", content="x"),
            "f:1 messages[0].role must be one of system, user, assistant, tool, got 'robot'",
        ),
        (chat(role="user"), "f:1 messages[0].content must be text, got null"),
        (chat(role="assistant", content="x", weight=0.5), "f:1 messages[0].weight must be 0 or 1, got 0.5"),
        (
            chat(role="user", content=[{"type": "image_url", "image_url": "x"}]),
            "f:1 messages[0].content[0].type must be one of text, got 'image_url'",
        ),
        (
            chat(role="assistant", content=None, tool_calls=[{"function": {"name": "f", "arguments": "{"}}]),
            "f:1 messages[0].tool_calls[0].arguments must be JSON, got text of length 1",
        ),
        (with_tool({"function": "f"}), "f:1 tools[0].function must be an object, got text of length 1"),
        (with_tool({"function": None}), "f:1 tools[0].function must be an object, got null"),
        (with_tool({"function": ["f"]}), "f:1 tools[0].function must be an object, got a list of length 1"),
        (with_tool({"function": {"name": 5}}), "f:1 tools[0].function.name must be text, got 5"),
        (with_tool({"name": None}), "f:1 tools[0].name must be text, got null"),
        ({"conversations": [{"from": "human"}]}, "f:1 conversations[0].value must be text, got null"),
        ({"prompt": "\ud83d", "response": "r"}, "f:1 prompt must be text, got half a character (\\ud83d) at offset 0"),
    ],
)
def test_a_malformed_line_is_named_with_key_rule_and_value(row: Any, message: str) -> None:
    with pytest.raises(MalformedRecord) as caught:
        parse_row(row, "f:1")
    assert str(caught.value) == message


def test_a_line_of_no_format_is_told_them_all() -> None:
    with pytest.raises(
        MalformedRecord, match=r'f:1 must have "messages", .*"prompt" and "completion", "text", got the keys'
    ):
        parse_row({"prompt": "p"}, "f:1")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a", "id": ' + b"1" * 5000 + b"}", "got a number of too many digits"),
        (b'{"text": "a", "m": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "got one that is nested too deeply"),
        (b'{"text": "a\\ud83d"}', r"f:1 text must be text, got half a character \(\\ud83d\) at offset 1"),
        (b'{"text": "caf\xe9"}', "must be UTF-8 text, got byte 0xe9 at offset 13"),
        (b'{"text": "a", "text": "b"}', "must have every key once, got 2 keys of which 1 differ"),
        (b"\xff\xfe{\x00", "must be UTF-8 text, got byte 0xff"),
        (b'{"text": "a"} {"text": "b"}', "must be one JSON object, got: Extra data at column 15"),
        (b'{"text": "a\x00"}', "must be one JSON object, got: Invalid control character"),
    ],
)
def test_what_json_or_python_stumbles_over_is_a_malformed_line(line: bytes, message: str) -> None:
    with pytest.raises(MalformedRecord, match=message):
        parse_line(line, "f:1")


KEYS = (
    "messages conversations instruction input output prompt response completion text role content from value "
    "tool_calls tools system weight function name arguments"
).split()
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), values, max_size=4))
def test_any_json_object_is_a_record_or_a_malformed_line(row: dict[str, Any]) -> None:
    try:
        parse_line(json.dumps(row).encode(), "f:1")
        said = "f:1 "
    except MalformedRecord as error:
        said = str(error)
    assert said.startswith("f:1 ")
    assert said.isprintable()
