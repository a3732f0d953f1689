"""Bugs of other servers that broke real clients, one test each: our server must not have them.

The numbers are those of reports against the servers named: sglang, vllm, litellm, mlx-lm, exo, llama.cpp, ollama and
others. Responses are read as bytes and JSON here, not through a client that may forgive.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.lab.models.adapters import make_adapter
from tests.serve.chat_server import CONTEXT, base_url, chat_model, chat_server
from tests.speculative.processes import Role

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
NO_END = {"256": -100}
KEEP_ALIVE_SECONDS = 0.05


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Role]:
    """A server of one place, so that a second text waits."""
    words = ("project.sessions=1", f"project.keep_alive_seconds={KEEP_ALIVE_SECONDS}")
    with chat_server(tmp_path_factory.mktemp("serve"), *words) as started:
        yield started


@pytest.fixture(scope="module")
def http(server: Role) -> Iterator[httpx.Client]:
    """A client without a key."""
    with httpx.Client(base_url=base_url(server), timeout=60) as client:
        yield client


def body(**asked: Any) -> dict[str, Any]:
    """A request of 8 tokens; the end token is forbidden unless `asked` has biases of its own."""
    own = {"max_tokens": 8, "seed": 1, "logit_bias": NO_END}
    return {"messages": [{"role": "user", "content": "Hello"}], **own, **asked}


def whole(http: httpx.Client, **asked: Any) -> dict[str, Any]:
    reply = http.post("/chat/completions", json=body(**asked))
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def lines(http: httpx.Client, **asked: Any) -> list[str]:
    with http.stream("POST", "/chat/completions", json=body(stream=True, **asked)) as reply:
        assert reply.status_code == 200
        return [line for line in reply.iter_lines() if line]


def chunks(http: httpx.Client, **asked: Any) -> list[dict[str, Any]]:
    data = [line.removeprefix("data: ") for line in lines(http, **asked) if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    return [json.loads(one) for one in data]


def choices(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [choice for chunk in found for choice in chunk["choices"]]


def test_01_finish_reason_is_null_until_the_end_and_never_empty(http: httpx.Client) -> None:
    """sglang 3912."""
    *before, last = choices(chunks(http))
    assert {choice["finish_reason"] for choice in before} == {None}
    assert last["finish_reason"] == "length"
    assert all("finish_reason" in choice for choice in before)


def test_02_the_last_chunk_has_an_empty_delta(http: httpx.Client) -> None:
    """vllm 35705, litellm 2010."""
    found = choices(chunks(http, n=2))
    ending = [choice for choice in found if choice["finish_reason"]]
    assert [choice["delta"] for choice in ending] == [{}, {}]


def test_03_no_delta_is_null(http: httpx.Client) -> None:
    """agent-framework 5734, autogen 7711."""
    for asked in ({}, {"logprobs": True}, {"stream_options": {"include_usage": True}}):
        assert all(isinstance(choice["delta"], dict) for choice in choices(chunks(http, **asked)))


def test_04_no_choice_of_a_stream_lacks_its_delta(http: httpx.Client) -> None:
    """octopus 62: also where no new token is asked for, and where the text stops at once."""
    for asked in ({}, {"max_tokens": 0}, {"logit_bias": {"256": 100}}):
        found = choices(chunks(http, **asked))
        assert found
        assert all("delta" in choice for choice in found)
        assert sum(choice["finish_reason"] is not None for choice in found) == 1


def test_05_the_first_chunk_has_a_role_and_a_content_and_no_later_one_a_null(http: httpx.Client) -> None:
    """sglang 18335, exo 2082."""
    first, *later = choices(chunks(http))
    assert first["delta"] == {"role": "assistant", "content": ""}
    for choice in later[:-1]:
        assert list(choice["delta"]) == ["content"]
        assert choice["delta"]["content"], "a chunk without text and without a reason says nothing"


def test_06_tool_calls_are_absent_from_texts(http: httpx.Client) -> None:
    """spring-ai 6441: an empty list starts a client's tool mode. Ours makes no tool calls, and ignores tools."""
    asked = {"tools": TOOLS, "tool_choice": "auto"}
    assert "tool_calls" not in "".join(lines(http, **asked))
    message = whole(http, **asked)["choices"][0]["message"]
    assert set(message) == {"role", "content"}


def test_07_a_message_always_has_its_content(http: httpx.Client) -> None:
    """mlx-lm 1739: also an empty one."""
    for asked in ({}, {"max_tokens": 0}, {"logit_bias": {"256": 100}}):
        message = whole(http, **asked)["choices"][0]["message"]
        assert isinstance(message["content"], str)
    assert message["content"] == ""


def test_08_log_probabilities_are_in_streams_too_and_zero_alternatives_are_a_number(http: httpx.Client) -> None:
    """mlx-lm 1630, tpu-inference 3572."""
    asked = {"logprobs": True, "top_logprobs": 0}
    told = [choice["logprobs"] for choice in choices(chunks(http, **asked)) if choice.get("logprobs")]
    entries = [entry for one in told for entry in one["content"]]
    assert entries == whole(http, **asked)["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in entries] == [[]] * 8
    reply = http.post("/completions", json={"prompt": "Hello", "logprobs": 0, "max_tokens": 3})
    assert reply.status_code == 200
    assert len(reply.json()["choices"][0]["logprobs"]["token_logprobs"]) == 3


def test_09_log_probabilities_go_with_tools_in_a_stream(http: httpx.Client) -> None:
    """llama.cpp 28478."""
    found = choices(chunks(http, tools=TOOLS, logprobs=True, top_logprobs=2))
    entries = [entry for choice in found if choice.get("logprobs") for entry in choice["logprobs"]["content"]]
    assert [len(entry["top_logprobs"]) for entry in entries] == [2] * 8


def test_10_usage_has_its_details(http: httpx.Client) -> None:
    """llama.cpp 22659 (`/v1/responses`, which is not served here): every usage has both details."""
    [*_, last] = chunks(http, stream_options={"include_usage": True})
    for usage in (whole(http)["usage"], last["usage"]):
        assert usage["prompt_tokens_details"]["cached_tokens"] >= 0
        assert usage["completion_tokens_details"]["accepted_prediction_tokens"] >= 0
    for refused, status in (
        (http.post("/responses", json={"input": "Hello"}), 404),
        (http.get("/chat/completions/chatcmpl-1"), 404),
        (http.get("/chat/completions"), 405),
    ):
        assert refused.status_code == status
        assert "/v1/chat/completions" in refused.json()["error"]["message"]


@pytest.mark.parametrize("key", [None, "", "none", "sk-dummy"])
def test_11_a_server_without_a_key_takes_any_key_and_none(http: httpx.Client, key: str | None) -> None:
    """open-webui 3840, 4348, 3330."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}".strip()}
    assert http.get("/models", headers=headers).status_code == 200
    assert http.post("/chat/completions", json=body(), headers=headers).status_code == 200


def test_12_a_stream_that_waits_says_so(http: httpx.Client) -> None:
    """exo 1803: a client times out while a long prompt is computed. All the places are taken here."""
    long = {"stream": True, "max_tokens": CONTEXT - 100}
    with http.stream("POST", "/chat/completions", json=body(**long)) as first:
        told = first.iter_lines()
        next(told)
        comments = [line for line in lines(http) if line.startswith(":")]
    assert comments, "a line that clients ignore"
    data = [line for line in lines(http) if not line.startswith((":", "id: ", "data: "))]
    assert data == []


def test_13_a_seed_changes_no_other_setting(http: httpx.Client) -> None:
    """ollama 5044: a seed set the temperature to 0, or the other way round."""
    texts = {whole(http, seed=seed, max_tokens=16)["choices"][0]["message"]["content"] for seed in range(3)}
    assert len(texts) == 3, "the temperature is the server's own, 1"
    greedy = {
        whole(http, seed=seed, temperature=0, max_tokens=16)["choices"][0]["message"]["content"] for seed in range(3)
    }
    assert len(greedy) == 1
    unseeded = {whole(http, seed=None, max_tokens=16)["choices"][0]["message"]["content"] for _ in range(3)}
    assert len(unseeded) == 3


def test_14_an_adapter_that_the_server_was_started_with_is_in_its_texts(
    http: httpx.Client, server: Role, tmp_path: Path
) -> None:
    """mlx-lm 1249: its path was ignored."""
    model = chat_model(tmp_path / "model")
    adapter = make_adapter(model, tmp_path / "adapter")
    with ExitStack() as stack:
        adapted = stack.enter_context(chat_server(tmp_path, f"model.adapter={adapter}"))
        other = stack.enter_context(httpx.Client(base_url=base_url(adapted), timeout=60))
        texts = [whole(one, temperature=0, max_tokens=32)["choices"][0]["message"] for one in (http, other)]
    assert texts[0] != texts[1]
    assert adapted.ready["system_fingerprint"] != server.ready["system_fingerprint"]
