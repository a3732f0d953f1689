"""One request for texts: the fields of a chat or of a completion, checked, as prompts of token ids and a sampling."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lab.engine.sampling import Sampling
from lab.text.logit_rules import MAX_BIASES, LogitRules
from lab.text.settings import FILL, MAX_STOP_LENGTH, MAX_STOPS
from serve.faults import RequestFault, wrong
from serve.fields import Fields, is_text

MOST_TOP = 20
"""Most alternatives of a token (`top_logprobs`), as OpenAI allows."""
MOST_PROMPTS = 256
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
WHOLE = 2**63
ANY_OBJECT = '{"type":"object"}'


class Texts(Protocol):
    """The tokenizer of a model, for text that is data."""

    vocabulary_size: int
    """Ids are in [0, vocabulary_size)."""
    context: int
    """Most tokens of a text, prompt included."""

    def ids_of_prompt(self, prompt: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a plain prompt. RequestFault where there are none."""

    def ids_of_messages(self, messages: list[dict[str, Any]]) -> list[int]:
        """The ids of messages as the chat template shows them. RequestFault for messages that it refuses."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the server gives to one request, and the values of fields that it does not name."""

    max_new_tokens: int
    temperature: float
    choices: int


@dataclass(frozen=True, kw_only=True)
class TextRequest:
    """A request, ready for a model."""

    is_chat: bool
    prompts: Sequence[Sequence[int]]
    choices: int
    """Choices of each prompt."""
    max_new_tokens: int | None
    """None: as the server is set."""
    sampling: Sampling
    """Of the first choice; each further one has the next seed."""
    rules: dict[str, Any]
    """Fields of `LogitRules` that are not off."""
    stops: Sequence[str]
    logprobs: int | None
    """Alternatives to report of each token; None: no log probabilities."""
    echo: bool
    is_stream: bool
    has_usage: bool
    """Whether a stream ends with its usage."""
    has_usage_always: bool
    """Whether each chunk of a stream has the usage so far."""
    is_speculative: bool
    has_token_ids: bool
    """Whether a whole document has the ids of its new tokens."""
    shows_guesses: bool
    """Whether pieces of a stream say that they were draft tokens: a field that no other server has."""
    user: str
    """Whose request this is, where users share an address; empty: unknown."""

    @property
    def scores_prompt(self) -> bool:
        """Whether the log probabilities of the prompt are asked for."""
        return self.echo and self.logprobs is not None

    @property
    def count(self) -> int:
        """All choices of all prompts."""
        return len(self.prompts) * self.choices

    def sampling_of(self, choice: int, prompt_tokens: int) -> Sampling:
        """The sampling of one choice."""
        own, rules = self.sampling, None
        if self.rules:
            biases = tuple((token, bias) for token, bias in self.rules.get("logit_bias", ()))
            rules = LogitRules(prompt_tokens=prompt_tokens, **{**self.rules, "logit_bias": biases})
        return Sampling(
            seed=(own.seed + choice) % WHOLE,
            temperature=own.temperature,
            top_k=own.top_k,
            top_p=own.top_p,
            min_p=own.min_p,
            logit_rules=rules,
            top_tokens=self.logprobs or 0,
        )

    def new_tokens(self, prompt_tokens: int, context: int, limits: Limits) -> int:
        """Most new tokens of a choice. RequestFault for a prompt that leaves no room."""
        room = context - prompt_tokens
        name = "messages" if self.is_chat else "prompt"
        if room < 0 or (room == 0 and (self.max_new_tokens != 0 or self.scores_prompt)):
            raise RequestFault(
                400,
                f"{name} must leave room for a token in the context of {context} tokens, got {prompt_tokens} tokens",
                param=name,
                code="context_length_exceeded",
            )
        asked = self.max_new_tokens
        if asked is None:
            asked = room if limits.max_new_tokens == FILL else limits.max_new_tokens
        return min(asked, room)


def read_chat(fields: Fields, texts: Texts, limits: Limits) -> TextRequest:
    """The request for a chat completion. RequestFault for a field that breaks its rule."""
    most = fields.whole("max_tokens", 0, math.inf)
    most = fields.whole("max_completion_tokens", 0, math.inf, most)
    has_logprobs = fields.flag("logprobs", False)
    top = fields.whole("top_logprobs", 0, MOST_TOP)
    if top is not None and not has_logprobs:
        raise wrong("top_logprobs", "must be absent unless logprobs is true", top)
    for name in ("tool_choice", "function_call"):
        if fields.raw(name) not in (None, "auto", "none"):
            raise wrong(name, 'must be "auto" or "none": this server makes no tool calls', fields.raw(name))
    return _request(
        fields,
        limits,
        is_chat=True,
        prompts=[texts.ids_of_messages(messages_of(fields))],
        max_new_tokens=most,
        logprobs=(top or 0) if has_logprobs else None,
        echo=False,
        vocabulary_size=texts.vocabulary_size,
    )


def read_completion(fields: Fields, texts: Texts, limits: Limits) -> TextRequest:
    """The request for a completion. RequestFault for a field that breaks its rule."""
    if fields.has("suffix"):
        raise wrong("suffix", "must be null: no model here fills in the middle", fields.raw("suffix"))
    given = _given_prompts(fields)
    _check_count(fields, len(given), limits)  # before anything is tokenised
    return _request(
        fields,
        limits,
        is_chat=False,
        prompts=[_prompt(one, texts) for one in given],
        max_new_tokens=fields.whole("max_tokens", 0, math.inf, 16),
        logprobs=fields.whole("logprobs", 0, MOST_TOP),
        echo=fields.flag("echo", False),
        vocabulary_size=texts.vocabulary_size,
    )


def _request(
    fields: Fields,
    limits: Limits,
    *,
    is_chat: bool,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | None,
    logprobs: int | None,
    echo: bool,
    vocabulary_size: int,
) -> TextRequest:
    is_stream = fields.flag("stream", False)
    options = fields.block("stream_options")
    if options is not None and not is_stream:
        raise wrong("stream_options", "must be absent unless stream is true", fields.raw("stream_options"))
    choices = _check_count(fields, len(prompts), limits)
    best_of = fields.whole("best_of", 0, math.inf)
    if best_of is not None and best_of > choices:
        raise wrong("best_of", f"must be at most n, which is {choices}", best_of)
    rules = _rules(fields, vocabulary_size)
    sampling = Sampling(
        seed=_seed(fields),
        temperature=fields.number("temperature", 0, 2, limits.temperature),
        top_k=max(0, fields.whole("top_k", -1, 2**32 - 1, 0) or 0),
        top_p=fields.number("top_p", 0, 1, 1) or 1e-9,  # 0 leaves the best token, as the smallest positive number does
        min_p=fields.number("min_p", 0, 1, 0),
    )
    return TextRequest(
        is_chat=is_chat,
        prompts=prompts,
        choices=choices,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        rules=rules,
        stops=fields.texts("stop", MAX_STOPS, MAX_STOP_LENGTH),
        logprobs=logprobs,
        echo=echo,
        is_stream=is_stream,
        has_usage=options is not None and options.flag("include_usage", False),
        has_usage_always=options is not None and options.flag("continuous_usage_stats", False),
        is_speculative=fields.flag("speculative", True),
        has_token_ids=fields.flag("return_token_ids", False),
        shows_guesses=fields.flag("show_guesses", False),
        user=fields.text("user", "") or "",
    )


def _check_count(fields: Fields, prompts: int, limits: Limits) -> int:
    """Choices of each prompt. RequestFault for too many in all."""
    choices = fields.whole("n", 1, limits.choices, 1) or 1
    if prompts * choices > limits.choices:
        rule = f"must ask for at most {limits.choices} choices (n times the number of prompts)"
        raise wrong("n", rule, prompts * choices)
    return choices


def _seed(fields: Fields) -> int:
    """The seed; without one a new one, so that two requests differ."""
    seed = fields.whole("seed", -(2**63), 2**64)
    return secrets.randbelow(WHOLE) if seed is None else seed % WHOLE


def _rules(fields: Fields, vocabulary_size: int) -> dict[str, Any]:
    """The fields of `LogitRules` that are not off."""
    found: dict[str, Any] = {
        "repetition_penalty": fields.number("repetition_penalty", 0.01, 100, 1),
        "presence_penalty": fields.number("presence_penalty", -2, 2, 0),
        "frequency_penalty": fields.number("frequency_penalty", -2, 2, 0),
        "logit_bias": _biases(fields, vocabulary_size),
        "schema": _schema(fields),
    }
    off = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "logit_bias": (), "schema": ""}
    return {name: value for name, value in found.items() if value != off[name]}


def _schema(fields: Fields) -> str:
    """The JSON schema that the text must follow; empty: none."""
    form = fields.block("response_format")
    if form is None:
        return ""
    kind = form.raw("type")
    if kind == "text":
        return ""
    if kind == "json_object":
        return ANY_OBJECT
    if kind != "json_schema":
        raise wrong("response_format.type", 'must be "text", "json_object" or "json_schema"', kind)
    inner = form.block("json_schema")
    schema = None if inner is None else inner.raw("schema")
    if not isinstance(schema, dict):
        raise wrong("response_format.json_schema.schema", "must be a JSON schema", schema)
    return json.dumps(schema, ensure_ascii=False, separators=(",", ":"))


def _biases(fields: Fields, vocabulary_size: int) -> tuple[tuple[int, float], ...]:
    found: dict[int, float] = {}
    for name, bias in fields.items("logit_bias"):
        is_id = name.isascii() and name.isdecimal() and len(name) < 10 and int(name) < vocabulary_size
        if not is_id:
            raise wrong("logit_bias", f"must name token ids in [0, {vocabulary_size})", name)
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise wrong("logit_bias", "must hold numbers in [-100, 100]", bias)
        found[int(name)] = float(bias)
    if len(found) > MAX_BIASES:
        raise wrong("logit_bias", f"must name at most {MAX_BIASES} tokens", len(found))
    return tuple(found.items())


def messages_of(fields: Fields) -> list[dict[str, Any]]:
    """The messages of a chat, as chat templates take them."""
    given = fields.raw("messages")
    if not isinstance(given, list) or not given:
        raise wrong("messages", "must be a list of at least one message", given)
    return [_message(place, one) for place, one in enumerate(given)]


def _message(place: int, given: Any) -> dict[str, Any]:
    name = f"messages[{place}]"
    if not isinstance(given, dict):
        raise wrong("messages", f"must hold objects; {name} is none", given)
    role = given.get("role")
    if role not in ROLES:
        raise wrong("messages", f"must hold roles of {', '.join(ROLES)}; {name}.role is another", role)
    for part in ("tool_calls", "function_call"):
        if given.get(part):
            raise wrong(
                "messages", f"must hold no tool calls: this server shows none; {name}.{part} has some", given[part]
            )
    content = given.get("content")
    if content is None and role == "assistant":
        content = ""
    if isinstance(content, list):
        content = "".join(_part(name, part) for part in content)
    if not isinstance(content, str) or not is_text(content):
        raise wrong("messages", f"must hold texts; {name}.content is none", content)
    return {"role": "system" if role == "developer" else role, "content": content}


def _part(name: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "refusal") or not isinstance(part.get(kind), str):
        raise wrong("messages", f'must hold parts of type "text"; {name}.content has another', part)
    return str(part[kind])


def _given_prompts(fields: Fields) -> list[Any]:
    """The prompts of a completion as they were sent."""
    given = fields.raw("prompt")
    is_one = isinstance(given, str) or (isinstance(given, list) and given and all(type(one) is int for one in given))
    found = [given] if is_one else given
    if not isinstance(found, list) or not 1 <= len(found) <= MOST_PROMPTS:
        rule = f"must be a text, a list of token ids, or a list of 1 to {MOST_PROMPTS} of them"
        raise wrong("prompt", rule, given)
    return found


def _prompt(given: Any, texts: Texts) -> list[int]:
    if isinstance(given, str) and is_text(given):
        return texts.ids_of_prompt(given)
    if not isinstance(given, list) or not given or not all(type(one) is int for one in given):
        raise wrong("prompt", "must hold texts, or lists of token ids", given)
    strange = next((one for one in given if not 0 <= one < texts.vocabulary_size), None)
    if strange is not None:
        raise wrong("prompt", f"must hold token ids in [0, {texts.vocabulary_size})", strange)
    return given
