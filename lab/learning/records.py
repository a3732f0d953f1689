"""One line of data as a record: plain text or a dialogue, read from any of the usual formats.

Knows nothing about files, tokenizers or models. The first format whose keys a JSON object has is the one that is read:

    {"messages": [{"role": ..., "content": ...}, ...]}, also with "tools"       chat, as OpenAI and transformers have it
    {"conversations": [{"from": "human", "value": ...}, ...]}                   ShareGPT
    {"instruction": ..., "input": ..., "output": ...}                           Alpaca; "input" may be absent or empty
    {"prompt": ..., "response": ...} or {"prompt": ..., "completion": ...}      also lists of messages, as TRL has it
    {"text": ...}                                                               plain text: every token counts

A "system" text in the second, third and fourth format becomes the first message. Other keys are metadata and ignored.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lab.settings import UserError

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}
TEMPLATE_KEYS = ("name", "tool_call_id", "reasoning_content")
"""Other keys of a message that chat templates show."""


class MalformedRecord(UserError):
    """A line (or file, or row) that cannot be learnt from: the text names it, the rule, and what is there instead.

    Values that may be somebody's text are described, not quoted: messages like these end up in logs.
    """


@dataclass(frozen=True)
class Text:
    """Plain text: every token counts."""

    text: str
    whole: bool = False
    """Whether all of it is trained on or held out together, as a line is; each window of a file is on its own."""


@dataclass(frozen=True)
class Message:
    """One turn of a dialogue."""

    role: str
    content: str
    counts: bool = True
    """False for an answer that is shown but not learnt (OpenAI's `"weight": 0`)."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Tool calls and TEMPLATE_KEYS, as a chat template takes them."""

    @property
    def calls(self) -> list[str]:
        """Names of the tools that the message calls."""
        return [call["function"]["name"] for call in self.extra.get("tool_calls", [])]


@dataclass(frozen=True)
class Dialogue:
    """Turns of which only the assistant's answers count."""

    messages: tuple[Message, ...]
    name: str
    """The document it came from."""
    tools: tuple[dict[str, Any], ...] = ()
    """JSON schemas of the tools that the assistant may call."""


Record = Text | Dialogue


def parse_line(line: bytes, name: str) -> Record:
    """The record in one line of JSON; MalformedRecord with `name`, rule and value when it holds none."""
    try:
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=unique_keys(name))
        return parse_row(row, name)
    except UnicodeDecodeError as error:
        raise MalformedRecord(f"{name} must be UTF-8 text, got {bad_byte(error)}") from None
    except json.JSONDecodeError as error:
        raise MalformedRecord(f"{name} must be one JSON object, got: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise MalformedRecord(f"{name} must be one JSON object, got one that is nested too deeply") from None
    except MalformedRecord:
        raise
    except ValueError:  # Python's own limit: 4300 digits
        raise MalformedRecord(f"{name} must be one JSON object, got a number of too many digits") from None


def parse_row(row: Any, name: str) -> Record:
    """The record that a JSON value holds; MalformedRecord with `name`, key, rule and value when it holds none."""
    _require(isinstance(row, dict), name, "be a JSON object", row)
    for keys, parse in FORMATS:
        if all(key in row for key in keys):
            return parse(row, name)
    known = ", ".join(" and ".join(f'"{key}"' for key in keys) for keys, _ in FORMATS)
    raise MalformedRecord(f"{name} must have {known}, got the keys {sorted(str(key)[:32] for key in row)[:8]}")


def bad_byte(error: UnicodeDecodeError) -> str:
    """The byte that is no UTF-8, and its offset."""
    return f"byte 0x{error.object[error.start]:02x} at offset {error.start}"


def _parse_chat(row: dict[str, Any], name: str) -> Record:
    return Dialogue(_messages(row["messages"], f"{name} messages"), name, _tools(row, name))


def _parse_sharegpt(row: dict[str, Any], name: str) -> Record:
    messages = _messages(row["conversations"], f"{name} conversations")
    return Dialogue((*_system(row, name), *messages), name, _tools(row, name))


def _parse_alpaca(row: dict[str, Any], name: str) -> Record:
    _require(not row.get("history"), f"{name} history", "be empty: turns belong in messages", row.get("history"))
    prompt, answer = _filled(row, "instruction", name), _filled(row, "output", name)
    if row.get("input"):  # absent, null and empty mean none
        prompt += "\n\n" + _filled(row, "input", name)
    return Dialogue((*_system(row, name), Message("user", prompt), Message("assistant", answer)), name)


def _parse_pair(answer_key: str) -> Callable[[dict[str, Any], str], Record]:
    def parse(row: dict[str, Any], name: str) -> Record:
        if isinstance(row["prompt"], list) and isinstance(row[answer_key], list):
            shown = [
                replace(message, counts=message.role != "assistant")
                for message in _messages(row["prompt"], f"{name} prompt")
            ]
            return Dialogue((*shown, *_messages(row[answer_key], f"{name} {answer_key}")), name, _tools(row, name))
        prompt, answer = _filled(row, "prompt", name), _filled(row, answer_key, name)
        return Dialogue((*_system(row, name), Message("user", prompt), Message("assistant", answer)), name)

    return parse


def _parse_text(row: dict[str, Any], name: str) -> Record:
    return Text(_filled(row, "text", name), whole=True)


FORMATS: list[tuple[tuple[str, ...], Callable[[dict[str, Any], str], Record]]] = [
    (("messages",), _parse_chat),
    (("conversations",), _parse_sharegpt),
    (("instruction", "output"), _parse_alpaca),
    (("prompt", "response"), _parse_pair("response")),
    (("prompt", "completion"), _parse_pair("completion")),
    (("text",), _parse_text),
]
"""The keys that tell a format, and how it is read."""


def _messages(messages: Any, name: str) -> tuple[Message, ...]:
    _require(isinstance(messages, list) and bool(messages), name, "be a list that is not empty", messages)
    return tuple(_message(message, f"{name}[{index}]") for index, message in enumerate(messages))


def _message(message: Any, name: str) -> Message:
    _require(isinstance(message, dict), name, "be an object with role and content", message)
    if "from" in message and "role" not in message:
        return _sharegpt_message(message, name)
    role = _one_of(message.get("role"), ROLES, f"{name}.role")
    extra: dict[str, Any] = {
        key: _text(message[key], f"{name}.{key}") for key in TEMPLATE_KEYS if message.get(key) is not None
    }
    calls = message.get("tool_calls")
    if role == "assistant" and calls not in (None, []):
        extra["tool_calls"] = _calls(calls, f"{name}.tool_calls")
    weight = message.get("weight", 1)
    _require(weight in (0, 1), f"{name}.weight", "be 0 or 1", weight)
    content = message.get("content")
    if content is None and "tool_calls" in extra:
        content = ""
    return Message(role, _content(content, f"{name}.content"), bool(weight), extra)


def _sharegpt_message(message: dict[str, Any], name: str) -> Message:
    speaker = _one_of(message["from"], SHAREGPT_ROLES, f"{name}.from")
    value = _text(message.get("value"), f"{name}.value")
    if speaker != "function_call":
        return Message(SHAREGPT_ROLES[speaker], value)
    call = _json_object(value, f"{name}.value")
    return Message("assistant", "", extra={"tool_calls": _calls([call], f"{name}.value")})


def _content(content: Any, name: str) -> str:
    """Text, or the text of a list of parts one after the other."""
    if not isinstance(content, list):
        return _text(content, name)
    for index, part in enumerate(content):
        place = f"{name}[{index}]"
        _require(isinstance(part, dict), place, 'be a part with "type" and "text"', part)
        _one_of(part.get("type"), ("text",), f"{place}.type")
    return "".join(_text(part.get("text"), f"{name}[{index}].text") for index, part in enumerate(content))


def _calls(calls: Any, name: str) -> list[dict[str, Any]]:
    """Tool calls as chat templates take them: arguments are an object, which OpenAI writes as JSON text."""
    _require(isinstance(calls, list) and bool(calls), name, "be a list that is not empty", calls)
    return [_call(call, f"{name}[{index}]") for index, call in enumerate(calls)]


def _call(call: Any, name: str) -> dict[str, Any]:
    _require(isinstance(call, dict), name, "be an object", call)
    function = call.get("function", call)
    _require(isinstance(function, dict), f"{name}.function", "be an object", function)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _json_object(arguments, f"{name}.arguments")
    _require(isinstance(arguments, dict), f"{name}.arguments", "be an object", arguments)
    _encodable(arguments, f"{name}.arguments")
    called = {"name": _filled(function, "name", name), "arguments": arguments}
    identity = {"id": _text(call["id"], f"{name}.id")} if call.get("id") is not None else {}
    return {**identity, "type": "function", "function": called}


def _tools(row: dict[str, Any], name: str) -> tuple[dict[str, Any], ...]:
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _json(tools, f"{name} tools")
    if not tools:
        return ()
    _require(isinstance(tools, list) and all(isinstance(t, dict) for t in tools), f"{name} tools", "be objects", tools)
    _encodable(tools, f"{name} tools")
    for index, tool in enumerate(tools):
        place = f"{name} tools[{index}]" + (".function" if "function" in tool else "")
        function = tool.get("function", tool)
        _require(isinstance(function, dict), place, "be an object", function)
        _require(isinstance(function.get("name", ""), str), f"{place}.name", "be text", function.get("name"))
    return tuple(tools)


def _system(row: dict[str, Any], name: str) -> tuple[Message, ...]:
    return (Message("system", _filled(row, "system", name)),) if row.get("system") else ()


def _filled(row: dict[str, Any], key: str, name: str) -> str:
    value = row.get(key)
    _require(isinstance(value, str) and bool(value), f"{name} {key}", "be text that is not empty", value)
    return _text(value, f"{name} {key}")


def _text(value: Any, name: str) -> str:
    _require(isinstance(value, str), name, "be text", value)
    _encodable(value, name)
    return str(value)


def _encodable(value: Any, name: str) -> None:
    """JSON may escape one half of a character alone; no tokenizer takes that."""
    try:
        (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise MalformedRecord(f"{name} must be text, got half a character ({half}) at offset {error.start}") from None
    except RecursionError:
        raise MalformedRecord(f"{name} must not be nested too deeply") from None


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise MalformedRecord(f"{name} must be JSON, got {_kind(text)}") from None
    except RecursionError:
        raise MalformedRecord(f"{name} must not be nested too deeply") from None


def _json_object(text: str, name: str) -> dict[str, Any]:
    value = _json(text, name)
    _require(isinstance(value, dict), name, "be a JSON object", value)
    return dict(value)


def _one_of(value: Any, known: Any, name: str) -> str:
    if not isinstance(value, str) or value not in known:
        shown = repr(value[:32]) if isinstance(value, str) else _kind(value)
        raise MalformedRecord(f"{name} must be one of {', '.join(known)}, got {shown}")
    return value


def unique_keys(name: str) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """For `json.loads`: MalformedRecord for an object, one of those in `name`, that has a key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise MalformedRecord(
                f"{name} must have every key once, got {len(pairs)} keys of which {len(found)} differ"
            )
        return found

    return unique


def _require(holds: bool, name: str, rule: str, value: Any) -> None:
    if not holds:
        raise MalformedRecord(f"{name} must {rule}, got {_kind(value)}")


def _kind(value: Any) -> str:
    """The kind of `value`, without its content."""
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    kind = {"str": "text", "list": "a list", "dict": "an object"}.get(type(value).__name__)
    return f"{kind} of length {len(value)}" if kind else type(value).__name__
