"""The stock `openai` client against a real server: what it sends is served, what it reads has the types it names."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from lab.files import write_whole
from tests.serve.chat_server import CONTEXT, MODEL, base_url, chat_server, taken
from tests.speculative.processes import Role, wait_until

PLACES = 3
"""Texts that may run or wait at the second server."""
KEY = "a long key for tests only"
HELLO: Any = [{"role": "user", "content": "Hello there"}]
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
KEPT_SECONDS = 6.0
"""httpx, and so openai's client, keeps a connection for 5 s."""
LONG = CONTEXT - 100
"""Most tokens of texts that are left early."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Role]:
    with chat_server(tmp_path_factory.mktemp("serve")) as started:
        yield started


@pytest.fixture(scope="module")
def client(server: Role) -> Iterator[OpenAI]:
    with connected(server) as client:
        yield client


def connected(server: Role, key: str = "none") -> OpenAI:
    return OpenAI(base_url=base_url(server), api_key=key, max_retries=0, timeout=60)


def chat(client: OpenAI, **asked: Any) -> ChatCompletion:
    options: dict[str, Any] = {"model": MODEL, "messages": HELLO, "max_tokens": 12, "seed": 5, **asked}
    found = client.chat.completions.create(**options)
    assert isinstance(found, ChatCompletion)
    return found


def stream(client: OpenAI, **asked: Any) -> list[ChatCompletionChunk]:
    options: dict[str, Any] = {"model": MODEL, "messages": HELLO, "max_tokens": 12, "seed": 5, **asked}
    return list(client.chat.completions.create(stream=True, **options))


def said(chunks: Iterable[ChatCompletionChunk], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


def text_of(found: ChatCompletion, index: int = 0) -> str:
    text = found.choices[index].message.content
    assert isinstance(text, str)
    return text


def test_models_are_listed_and_found(client: OpenAI) -> None:
    [model] = client.models.list()
    assert (model.id, model.object) == (MODEL, "model")
    assert client.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("another")
    assert caught.value.code == "model_not_found"


def test_a_chat_has_its_text_its_usage_and_its_reason(client: OpenAI) -> None:
    found = chat(client)
    [choice] = found.choices
    assert (choice.message.role, choice.finish_reason, choice.logprobs) == ("assistant", "length", None)
    assert choice.message.tool_calls is None
    usage = found.usage
    assert usage is not None
    assert usage.completion_tokens == 12
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert found.system_fingerprint
    assert found.system_fingerprint.startswith("fp_")


def test_a_stream_is_the_text_without_a_stream(client: OpenAI) -> None:
    chunks = stream(client, n=2)
    whole = chat(client, n=2)
    assert [said(chunks, index) for index in (0, 1)] == [text_of(whole, index) for index in (0, 1)]
    assert text_of(whole, 0) != text_of(whole, 1), "each choice has its own seed"
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


def test_a_seed_decides_the_text_and_another_one_changes_it(client: OpenAI) -> None:
    assert text_of(chat(client, seed=7)) == text_of(chat(client, seed=7)) != text_of(chat(client, seed=8))
    assert text_of(chat(client, seed=-3)) == text_of(chat(client, seed=-3)), "negative seeds are seeds"


def test_max_completion_tokens_beats_max_tokens(client: OpenAI) -> None:
    usage = chat(client, max_tokens=3, max_completion_tokens=5).usage
    assert usage is not None
    assert usage.completion_tokens == 5


def test_messages_may_be_parts_and_have_every_role(client: OpenAI) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]}]
    assert text_of(chat(client, messages=parts)) == text_of(chat(client))
    roles = ("system", "developer", "user", "assistant", "tool")
    messages = [{"role": role, "content": "x", "tool_call_id": "1"} for role in roles]
    assert chat(client, messages=messages).choices[0].finish_reason == "length"


def test_a_stop_string_ends_the_text_before_it(client: OpenAI) -> None:
    text = text_of(chat(client, max_tokens=40))
    stop = text[10:12]
    expected = text[: text.index(stop)]
    for given in (stop, ["\x01\x02\x03", stop]):
        found = chat(client, max_tokens=40, stop=given)
        assert (text_of(found), found.choices[0].finish_reason) == (expected, "stop")
        chunks = stream(client, max_tokens=40, stop=given)
        assert said(chunks) == expected
        assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "stop"


def test_a_bias_forces_a_token_and_forbids_it(client: OpenAI) -> None:
    letter = ord("Z")  # the byte tokenizer's ids are the bytes
    assert text_of(chat(client, logit_bias={str(letter): 100}, max_tokens=5)) == "ZZZZZ"
    greedy = text_of(chat(client, temperature=0))
    first = greedy.encode()[0]
    assert text_of(chat(client, temperature=0, logit_bias={str(first): -100})).encode()[0] != first


@pytest.mark.parametrize("top", [None, 0, 3])
def test_log_probabilities_have_an_entry_a_token_also_in_a_stream(client: OpenAI, top: int | None) -> None:
    asked = {"logprobs": True} | ({} if top is None else {"top_logprobs": top})
    whole = chat(client, **asked).choices[0].logprobs
    assert whole is not None
    assert whole.content is not None
    assert len(whole.content) == 12
    assert {len(one.top_logprobs) for one in whole.content} == {top or 0}
    assert all(one.logprob <= 0 and one.bytes is not None for one in whole.content)
    told = [choice.logprobs for chunk in stream(client, **asked) for choice in chunk.choices if choice.logprobs]
    assert [one for part in told for one in part.content or ()] == whole.content


def test_the_bytes_of_log_probabilities_are_those_of_the_text(client: OpenAI) -> None:
    choice = chat(client, logprobs=True, logit_bias={str(byte): 100 for byte in range(32, 127)}).choices[0]
    assert choice.logprobs is not None
    spelled = bytes(byte for one in choice.logprobs.content or () for byte in one.bytes or ())
    assert spelled.decode() == choice.message.content


def test_the_usage_of_a_stream_is_told_where_it_is_asked_for(client: OpenAI) -> None:
    whole = chat(client).usage
    chunks = stream(client, stream_options={"include_usage": True})
    assert chunks[-1].choices == []
    told = chunks[-1].usage
    assert whole is not None
    assert told is not None
    assert (told.prompt_tokens, told.completion_tokens) == (whole.prompt_tokens, whole.completion_tokens)
    assert {chunk.usage for chunk in chunks[:-1]} == {None}
    assert {chunk.usage for chunk in stream(client)} == {None}


def test_completions_of_texts_ids_and_lists(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 6, "temperature": 0}
    one = client.completions.create(prompt="ab", **asked)
    by_ids = client.completions.create(prompt=[97, 98], **asked)
    several = client.completions.create(prompt=["ab", "cd"], **asked)
    lists = client.completions.create(prompt=[[97, 98], [99, 100]], **asked)
    assert one.object == "text_completion"
    assert one.choices[0].text == by_ids.choices[0].text == several.choices[0].text
    assert [choice.text for choice in several.choices] == [choice.text for choice in lists.choices]
    assert [choice.index for choice in several.choices] == [0, 1]


def test_completions_echo_their_prompt_with_its_log_probabilities(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": "abc", "temperature": 0, "echo": True, "logprobs": 1}
    scored = client.completions.create(max_tokens=0, **asked).choices[0]
    longer = client.completions.create(max_tokens=1, **asked).choices[0]
    assert scored.text == "abc"
    assert scored.logprobs is not None
    assert longer.logprobs is not None
    assert scored.logprobs.tokens == ["a", "b", "c"]
    assert scored.logprobs.token_logprobs is not None
    assert longer.logprobs.token_logprobs is not None
    assert scored.logprobs.token_logprobs[0] is None
    assert longer.logprobs.token_logprobs[:3] == scored.logprobs.token_logprobs
    assert longer.logprobs.text_offset == [0, 1, 2, 3]


def test_completions_stream(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": "abc", "max_tokens": 8, "seed": 1}
    whole = client.completions.create(**asked).choices[0]
    pieces = list(client.completions.create(stream=True, **asked))
    assert "".join(choice.text for piece in pieces for choice in piece.choices) == whole.text
    assert [choice.finish_reason for piece in pieces for choice in piece.choices if choice.finish_reason] == ["length"]


def test_a_request_without_speculation_has_the_same_text(client: OpenAI) -> None:
    for temperature in (0, 1):
        asked = {"temperature": temperature, "max_tokens": 40}
        plain = chat(client, extra_body={"speculative": False}, **asked)
        assert text_of(plain) == text_of(chat(client, **asked))
        details = plain.usage.completion_tokens_details if plain.usage else None
        assert details is not None
        assert details.accepted_prediction_tokens == 0


def test_the_stream_helper_of_the_client_gathers_the_same_text(client: OpenAI) -> None:
    stop = text_of(chat(client))[6:8]
    asked: dict[str, Any] = {"model": MODEL, "messages": HELLO, "max_tokens": 12, "seed": 5, "stop": stop}
    with client.chat.completions.stream(**asked) as events:
        gathered = events.get_final_completion()
    assert gathered.choices[0].message.content == text_of(chat(client, stop=stop)) != ""


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"top_p": -1}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 100}, "n"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logit_bias": {"word": 1}}, "logit_bias"),
        ({"stop": [""]}, "stop"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * CONTEXT}]}, "messages"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"functions": [], "function_call": {"name": "look"}}, "function_call"),
        ({"messages": [{"role": "assistant", "tool_calls": [CALL]}, *HELLO]}, "messages"),
    ],
)
def test_a_wrong_value_is_a_bad_request_that_names_its_field(client: OpenAI, asked: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **asked)
    assert (caught.value.param, caught.value.type) == (param, "invalid_request_error")
    assert text_of(chat(client)), "the server still works"


def test_a_prompt_beyond_the_context_names_both_numbers(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="x" * (CONTEXT + 7), max_tokens=1)
    assert (caught.value.param, caught.value.code) == ("prompt", "context_length_exceeded")
    assert f"context of {CONTEXT} tokens, got {CONTEXT + 7} tokens" in str(caught.value)


def test_a_text_follows_its_schema_also_as_a_stream(client: OpenAI) -> None:
    schema = {"enum": [{"a": 1}, {"a": 2}]}
    form = {"type": "json_schema", "json_schema": {"name": "one", "schema": schema}}
    whole = text_of(chat(client, response_format=form, max_tokens=60))
    assert json.loads(whole) in schema["enum"]
    assert said(stream(client, response_format=form, max_tokens=60)) == whole
    closing = {str(ord("}")): 100}  # the random model would go on for long
    found = text_of(chat(client, response_format={"type": "json_object"}, max_tokens=60, logit_bias=closing))
    assert isinstance(json.loads(found), dict)


@pytest.mark.parametrize("schema", [{"type": "nonsense"}, {"$ref": "#/nowhere"}, {"pattern": "(", "type": "string"}])
def test_a_schema_that_cannot_be_compiled_is_one_line(client: OpenAI, schema: Any) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "one", "schema": schema}}
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, response_format=form)
    assert caught.value.param == "response_format"
    assert "\n" not in str(caught.value.body)
    assert text_of(chat(client)), "the server still works"


def test_metrics_count_accepted_draft_tokens_by_place(server: Role, client: OpenAI) -> None:
    found = chat(client, logit_bias={str(ord("a")): 100}, max_tokens=60)
    assert found.usage is not None
    assert found.usage.completion_tokens_details is not None
    assert found.usage.completion_tokens_details.accepted_prediction_tokens
    text = httpx.get(f"http://127.0.0.1:{server.port}/metrics").text
    name = "lab:spec_decode_num_accepted_tokens"
    by_place = re.findall(rf'{name}_per_pos_total{{model_name="{MODEL}",position="(\d+)"}} ([\d.]+)', text)
    counts = [float(count) for _, count in sorted(by_place, key=lambda one: int(one[0]))]
    [total] = re.findall(rf'{name}_total{{model_name="{MODEL}"}} ([\d.]+)', text)
    assert len(counts) > 1
    assert counts == sorted(counts, reverse=True), "a place counts only if all before it held"
    assert 0 < sum(counts) <= float(total), "texts that were left early are in the total alone"


def test_a_text_is_what_its_ids_are(server: Role) -> None:
    def ask(path: str, body: dict[str, Any]) -> dict[str, Any]:
        reply = httpx.post(f"http://127.0.0.1:{server.port}{path}", json=body)
        assert reply.status_code == 200, reply.text
        return dict(reply.json())

    text = "Grüße <eos>"
    ids = ask("/tokenize", {"prompt": text, "return_token_strs": True})
    assert ids["count"] == len(ids["tokens"]) == len(ids["token_strs"]) == len(text.encode())
    assert ids["max_model_len"] == CONTEXT
    assert ask("/detokenize", {"tokens": ids["tokens"]}) == {"prompt": text}
    shown = ask("/detokenize", {"tokens": ask("/tokenize", {"messages": HELLO})["tokens"]})["prompt"]
    assert shown == "user: Hello there\nassistant: "
    info = httpx.get(f"http://127.0.0.1:{server.port}/tokenizer_info").json()
    assert (info["eos_token"], info["model_max_length"]) == ("<eos>", CONTEXT)


def test_a_connection_that_a_client_still_keeps_is_not_closed(server: Role) -> None:
    with closing(HTTPConnection("127.0.0.1", server.port, timeout=30)) as connection:
        for pause in (KEPT_SECONDS, 0.0):
            connection.request("GET", "/health")
            assert connection.getresponse().read() == b'{"status":"ok"}'
            time.sleep(pause)


def test_described_paths_have_their_parameters(server: Role) -> None:
    paths = httpx.get(f"http://127.0.0.1:{server.port}/openapi.json").json()["paths"]
    assert "/v1/streams/{name}" in paths
    for path, operations in paths.items():
        for about in operations.values():
            assert {one["name"] for one in about.get("parameters", ())} == set(re.findall(r"{(\w+)}", path)), path


def test_an_unknown_model_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        chat(client, model="gpt-9")
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")


def test_tools_are_ignored_unless_one_is_demanded(server: Role, client: OpenAI) -> None:
    """The server makes no tool calls."""
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
    for choice in ("auto", "none"):
        assert text_of(chat(client, tools=tools, tool_choice=choice)) == text_of(chat(client))
    assert server.stderr().count("no model here is shown any") == 1, "said once"
    with pytest.raises(openai.BadRequestError):
        chat(client, tools=tools, tool_choice={"type": "function", "function": {"name": "look"}})


def test_the_async_client_streams_several_texts_concurrently(server: Role, client: OpenAI) -> None:
    alone = [text_of(chat(client, seed=seed)) for seed in range(4)]

    async def one(client: AsyncOpenAI, seed: int) -> str:
        asked: dict[str, Any] = {"model": MODEL, "messages": HELLO, "max_tokens": 12, "seed": seed}
        if seed % 2:
            found = await client.chat.completions.create(**asked)
            return text_of(found)
        return said([chunk async for chunk in await client.chat.completions.create(stream=True, **asked)])

    async def all_of_them() -> list[str]:
        async with AsyncOpenAI(base_url=base_url(server), api_key="none", max_retries=0, timeout=60) as client:
            return list(await asyncio.gather(*(one(client, seed) for seed in range(4))))

    assert asyncio.run(all_of_them()) == alone


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Role]:
    """A server with a key and few places."""
    folder = tmp_path_factory.mktemp("guarded")
    write_whole(folder / "key", KEY)
    (folder / "key").chmod(0o600)
    words = (f"network.key_file={folder / 'key'}", "project.sessions=1", f"project.max_waiting={PLACES - 1}")
    with chat_server(folder, *words) as started:
        yield started


def test_a_wrong_key_is_an_authentication_error(guarded: Role) -> None:
    with connected(guarded, "another key") as client, pytest.raises(openai.AuthenticationError) as caught:
        chat(client)
    assert caught.value.code == "invalid_api_key"
    with connected(guarded, KEY) as client:
        assert text_of(chat(client))


def test_a_full_queue_is_a_rate_limit_and_a_client_that_leaves_frees_its_place(guarded: Role) -> None:
    with connected(guarded, KEY) as client, ExitStack() as streams:
        asked: dict[str, Any] = {"model": MODEL, "messages": HELLO, "max_tokens": LONG, "logit_bias": {"256": -100}}
        for _ in range(PLACES):
            streams.enter_context(client.chat.completions.create(stream=True, **asked))
        with pytest.raises(openai.RateLimitError) as caught:
            chat(client)
        assert int(caught.value.response.headers["Retry-After"]) >= 1
        assert caught.value.code == "queue_full"
        streams.close()
        wait_until(lambda: taken(guarded, KEY) == 0, "places of clients that left")
        assert text_of(chat(client))
        told = client.with_options(base_url=base_url(guarded).removesuffix("/v1")).get("/metrics", cast_to=str)
        assert f'lab:request_success_total{{finished_reason="left",model_name="{MODEL}"}} {PLACES}.0' in told
