"""The bodies of requests as JSON schemas, for those who read /openapi.json. null is as absent in every field that is
not required; the readers (`serve.text_request`) are what decides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lab.text.settings import MAX_STOP_LENGTH, MAX_STOPS
from serve.text_request import MOST_PROMPTS, MOST_TOP, ROLES

Schema = Mapping[str, Any]

TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
OBJECT: Schema = {"type": "object"}


def number(least: float, most: float) -> Schema:
    """A number in [least, most]."""
    return {"type": "number", "minimum": least, "maximum": most}


def whole(least: int, most: int | None = None) -> Schema:
    """A whole number from `least` on, up to `most`."""
    return {"type": "integer", "minimum": least} | ({} if most is None else {"maximum": most})


IDS: Schema = {"type": "array", "items": whole(0), "minItems": 1}
STOP: Schema = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}
NONE: Schema = {"type": "array", "maxItems": 0}
PARTS: Schema = {"type": "array", "items": {**OBJECT, "required": ["type"]}}
MESSAGES: Schema = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role"],
        "properties": {
            "role": {"enum": list(ROLES)},
            "content": {"anyOf": [TEXT, PARTS, {"type": "null"}]},
            "tool_calls": NONE,
            "function_call": {"type": "null"},
        },
    },
}
SAMPLING: dict[str, Schema] = {
    "model": TEXT,
    "max_tokens": whole(0),
    "temperature": number(0, 2),
    "top_p": number(0, 1),
    "top_k": whole(-1, 2**32 - 1),
    "min_p": number(0, 1),
    "n": whole(1),
    "best_of": whole(0),
    "seed": whole(-(2**63), 2**64),
    "stop": {"anyOf": [STOP, {"type": "array", "items": STOP, "maxItems": MAX_STOPS}]},
    "repetition_penalty": number(0.01, 100),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "logit_bias": {"type": "object", "additionalProperties": number(-100, 100)},
    "response_format": {
        "type": "object",
        "required": ["type"],
        "properties": {"type": {"enum": ["text", "json_object", "json_schema"]}, "json_schema": OBJECT},
    },
    "stream": FLAG,
    "stream_options": {
        "type": "object",
        "properties": {"include_usage": FLAG, "continuous_usage_stats": FLAG},
    },
    "speculative": FLAG,
    "show_guesses": FLAG,
    "return_token_ids": FLAG,
    "user": TEXT,
}
CHAT = SAMPLING | {
    "messages": MESSAGES,
    "max_completion_tokens": whole(0),
    "logprobs": FLAG,
    "top_logprobs": whole(0, MOST_TOP),
    "tool_choice": {"enum": ["auto", "none"]},
    "function_call": {"enum": ["auto", "none"]},
}
COMPLETION = SAMPLING | {
    "prompt": {
        "anyOf": [
            TEXT,
            IDS,
            {"type": "array", "items": {"anyOf": [TEXT, IDS]}, "minItems": 1, "maxItems": MOST_PROMPTS},
        ]
    },
    "logprobs": whole(0, MOST_TOP),
    "echo": FLAG,
    "suffix": {"type": "null"},
}
TOKENIZE: Mapping[str, Schema] = {
    "model": TEXT,
    "prompt": TEXT,
    "messages": MESSAGES,
    "add_special_tokens": FLAG,
    "return_token_strs": FLAG,
}
DETOKENIZE: Mapping[str, Schema] = {"model": TEXT, "tokens": {"type": "array", "items": whole(0)}}
LOAD: Mapping[str, Schema] = {"lora_name": TEXT, "lora_path": TEXT}
UNLOAD: Mapping[str, Schema] = {"lora_name": TEXT}


def body(properties: Mapping[str, Schema], *required: str) -> dict[str, Any]:
    """What a route says of its body."""
    schema = {"type": "object", "required": list(required), "properties": dict(properties)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
