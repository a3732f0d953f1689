"""The same prompt and seed give the same text, whatever is behind the server, and whoever shares it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from tests.serve.servers import Client, serving, shards
from tests.speculative.processes import role, wait_until

FLOAT64 = ("model=random", "model.dtype=float64", "tracking=none", "network.port=0", "project.context=512")
PROMPT = "To be, or not to be, that is the question. To be, or not to be, "
BODIES: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0, "seed": 7},
    {"temperature": 0.7, "seed": 8, "top_p": 0.9, "frequency_penalty": 0.5, "logit_bias": {"101": 3}},
    {"temperature": 1.2, "seed": 9, "top_k": 20, "min_p": 0.02, "presence_penalty": 0.4, "speculative": False},
]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Client]]:
    with ExitStack() as stack:

        def behind(name: str, *words: str) -> Client:
            return stack.enter_context(serving(tmp_path_factory.mktemp(name), *words))

        words = [word for word in FLOAT64 if not word.startswith("network")]
        two = stack.enter_context(shards([*words, "network.port=0"], ["0:2", "2:4"]))
        three = stack.enter_context(shards([*words, "network.port=0"], ["0:1", "1:3", "3:4"]))
        verifier = stack.enter_context(role("speculative.verifier", *FLOAT64))
        over = {count: f"project.split.shards=[{','.join(own)}]" for count, own in ((2, two), (3, three))}
        yield {
            "local": behind("local"),
            "without a cache": behind("plain", "project.prefix_tokens=0", "project.lookup=false"),
            "split": behind("split", "project.engine=split", over[2]),
            "split in three": behind("three", "project.engine=split", over[3]),
            "speculative": behind(
                "speculative", "project.engine=speculative", f"project.verifier.port={verifier.port}"
            ),
        }


@pytest.mark.parametrize("body", BODIES, ids=lambda body: f"temperature {body['temperature']}")
def test_every_engine_gives_the_same_text(servers: dict[str, Client], body: dict[str, Any]) -> None:
    texts = {name: server.text(prompt=PROMPT, max_tokens=48, **body) for name, server in servers.items()}
    assert len(set(texts.values())) == 1, texts


@pytest.mark.parametrize("name", ["local", "split", "speculative"])
def test_alone_and_among_eight_others(servers: dict[str, Client], name: str) -> None:
    server = servers[name]
    asked = [{"prompt": PROMPT * (1 + place % 3), "max_tokens": 24, "seed": place} for place in range(9)]
    alone = [server.text(**body) for body in asked]
    with ThreadPoolExecutor(9) as pool:
        assert list(pool.map(lambda body: server.text(**body), asked)) == alone


def test_the_next_turn_of_a_chat_is_not_computed_again_and_says_the_same(servers: dict[str, Client]) -> None:
    history = [{"role": "user", "content": PROMPT * 5}]
    for _ in range(2):
        told = {}
        for name in ("local", "without a cache", "split"):
            reply = servers[name].post("/v1/chat/completions", messages=history, max_tokens=16, temperature=0).json()
            told[name] = reply["choices"][0]["message"]["content"], reply["usage"]["prompt_tokens_details"]
        assert len({text for text, _ in told.values()}) == 1
        history += [{"role": "assistant", "content": told["local"][0]}, {"role": "user", "content": "Go on."}]
    assert told["local"][1] == told["split"][1] != told["without a cache"][1]
    assert told["local"][1]["cached_tokens"] > 128


def test_a_prompt_is_scored_where_the_model_is_or_refused(servers: dict[str, Client]) -> None:
    asked: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 0, "echo": True, "logprobs": 0}
    refused = servers["speculative"].post("/v1/completions", **asked)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "echo"
    assert "verifier" in refused.json()["error"]["message"]
    scores = [
        servers[name].complete(**asked)["choices"][0]["logprobs"]["token_logprobs"] for name in ("local", "split")
    ]
    assert scores[0][1:] == pytest.approx(scores[1][1:], abs=1e-6)  # hidden states travel as float32


def test_log_probabilities_are_those_of_every_engine(servers: dict[str, Client]) -> None:
    asked = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "logprobs": 3}
    found = [server.complete(**asked)["choices"][0]["logprobs"] for server in servers.values()]
    assert found[0]["token_logprobs"] == [max(top.values()) for top in found[0]["top_logprobs"]], "ties are ties"
    for other in found[1:]:
        assert other["tokens"] == found[0]["tokens"]
        assert other["token_logprobs"] == pytest.approx(found[0]["token_logprobs"], abs=1e-4)


def test_a_prompt_is_scored_as_it_is_generated(servers: dict[str, Client]) -> None:
    """What the echo says of a token is what was said when it was generated: log probabilities are the model's own."""
    for name in ("local", "split"):
        asked = {"prompt": "abc", "max_tokens": 20, "temperature": 0, "logprobs": 1, "return_token_ids": True}
        made = servers[name].complete(**asked)["choices"][0]
        whole = [*b"abc", *made["token_ids"]]
        scored = servers[name].complete(prompt=[whole], max_tokens=0, echo=True, logprobs=1)["choices"][0]["logprobs"]
        assert scored["token_logprobs"][0] is None
        assert scored["token_logprobs"][3:] == pytest.approx(made["logprobs"]["token_logprobs"], abs=1e-4)
        best = [top and max(top.values()) for top in scored["top_logprobs"][3:]]
        assert scored["token_logprobs"][3:] == best, "greedy tokens are the best ones, as the same floats"
    for count in (0, 1):  # a prompt of one token
        one = servers["local"].complete(prompt=[[70]], max_tokens=count, echo=True, logprobs=1)["choices"][0]
        assert one["logprobs"]["tokens"] == list(one["text"]), one
        assert len(one["logprobs"]["tokens"]) == 1 + count
    full = servers["local"].post("/v1/completions", prompt=[[70] * 512], max_tokens=0, echo=True, logprobs=1)
    assert full.status_code == 400, "it never ended"
    assert "512" in full.json()["error"]["message"]
    refused = servers["speculative"].post("/v1/completions", prompt="abc", max_tokens=1, echo=True, logprobs=1)
    assert refused.status_code == 400, "a verifier scores no prompts"
    assert refused.json()["error"]["param"] == "echo"


def test_the_page_is_told_what_runs_where(servers: dict[str, Client]) -> None:
    def places(name: str) -> list[dict[str, Any]]:
        (model,) = servers[name].get("/status").json()["models"].values()
        assert model["new_tokens"] > 0
        found: list[dict[str, Any]] = model["places"]
        return found

    for server in servers.values():
        server.text(prompt=PROMPT, max_tokens=8)
    wait_until(lambda: all(one["compute_seconds"] for name in ("local", "split") for one in places(name)), "a look")
    wait_until(lambda: places("speculative")[1]["hop_seconds"], "a heartbeat of the verifier")
    told = {name: [(one["role"], one["layers"]) for one in places(name)] for name in servers}
    assert told["local"] == [("model", [0, 4])]
    assert told["split"] == [("shard", [0, 2]), ("shard", [2, 4])]
    assert told["split in three"] == [("shard", [0, 1]), ("shard", [1, 3]), ("shard", [3, 4])]
    assert told["speculative"] == [("drafter", None), ("verifier", None)]
    assert max(one["hop_seconds"] for one in places("split")) > 0
    for one in places("split"):
        assert one["hop_seconds"] >= 0
        assert one["weights_bytes"] > 0
        assert one["cache_bytes"] > 0
        assert one["rss_bytes"] > one["weights_bytes"]
