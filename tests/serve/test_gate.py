"""Who may come in, and how a server ends."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from lab.command.entry import compose_settings
from lab.settings import UserError
from serve.__main__ import announce
from serve.gate import Gate, Receive, Scope, Send
from serve.models.served import Models
from serve.settings import ServeSettings
from tests.serve.servers import SMALL, Client, said, serving
from tests.speculative.processes import role, wait_until

KEY = "0123456789abcdef0123456789abcdef"
PAGE = "http://pages.example:3000"


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("keyed")
    (folder / "key").write_text(KEY)
    (folder / "key").chmod(0o600)
    words = [f"network.key_file={folder}/key", f"project.cors_origins=[{PAGE}]", "project.sessions=2"]
    with serving(folder / "journal", *words, "project.max_waiting=2", "project.metrics_prefix='vllm:'") as client:
        yield client


def test_without_the_key_nothing_is_told(keyed: Client) -> None:
    for path in ("/v1/models", "/metrics", "/status", "/openapi.json", "/v1/streams/x", "/nowhere"):
        assert keyed.get(path).status_code == 401, path
        assert keyed.get(path, headers={"Authorization": f"Bearer {KEY[:-1]}x"}).status_code == 401
        assert keyed.get(path, headers={"Authorization": f"Bearer {KEY}"}).status_code != 401
    refused = keyed.post("/v1/completions", prompt="a")
    assert refused.json()["error"]["code"] == "invalid_api_key"
    assert refused.headers["www-authenticate"] == "Bearer"
    assert keyed.get("/health").status_code == 200
    assert keyed.get("/").status_code == 200, "the page, which asks for the key"


def test_the_command_that_is_suggested_can_be_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the names of the model and of the key's file."""
    file = tmp_path / 'José\'s $(key) "file"'
    file.write_text(KEY)
    settings = compose_settings("serve", ["model=random"], ServeSettings)
    settings = replace(settings, network=replace(settings.network, key_file=str(file)))
    model: Any = SimpleNamespace(id="Ann's $HOME", fingerprint="fp")
    announce("http://127.0.0.1:1", Models(0, {model.id: model}), settings)
    [hint, _] = capsys.readouterr().err.splitlines()
    curl = """curl() { printf '%s\\0' "$@"; }; """
    typed = subprocess.run(
        ["sh", "-c", curl + hint.removeprefix("try it: ")], capture_output=True, text=True, check=True
    )
    words = typed.stdout.split("\0")
    assert words[:5] == [
        "http://127.0.0.1:1/v1/chat/completions",
        *("-H", f"Authorization: Bearer {KEY}"),
        *("-H", "Content-Type: application/json"),
    ]
    assert (words[5], json.loads(words[6])["model"], words[7:]) == ("-d", model.id, [""])


def test_the_key_of_the_suggested_command_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = compose_settings("serve", ["model=random", "network.key_file=~/key"], ServeSettings)
    model: Any = SimpleNamespace(id="m", fingerprint="fp")
    announce("http://127.0.0.1:1", Models(0, {"m": model}), settings)
    assert f"$(cat {tmp_path}/key)" in capsys.readouterr().err


def test_pages_of_other_sites(keyed: Client) -> None:
    named = {"Authorization": f"Bearer {KEY}"}
    allowed = keyed.get("/v1/models", headers=named | {"Origin": PAGE})
    assert allowed.headers["access-control-allow-origin"] == PAGE
    other = keyed.get("/v1/models", headers=named | {"Origin": "http://evil.example"})
    assert "access-control-allow-origin" not in other.headers
    with httpx.Client(base_url=keyed.base) as http:
        asked = http.options("/v1/completions", headers={"Origin": PAGE, "Access-Control-Request-Method": "POST"})
        assert asked.status_code == 204
        wanted = {"Origin": PAGE, "Access-Control-Request-Headers": "authorization,x-stainless-os"}
        allowed = http.options("/v1/completions", headers=wanted)
        assert allowed.headers["access-control-allow-headers"] == "authorization,x-stainless-os"
        body = {"prompt": "a", "max_tokens": 1}
        evil = http.post("/v1/completions", json=body, headers=named | {"Origin": "http://evil.example"})
        assert evil.status_code == 403


def test_every_request_has_a_number(keyed: Client) -> None:
    assert keyed.get("/health", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert len({keyed.get("/health").headers["x-request-id"] for _ in range(3)}) == 3
    for bad in ("a" * 127 + " b", "a b", "a" * 200):  # not echoed: some could not be sent
        assert keyed.get("/health", headers={"X-Request-Id": bad}).headers["x-request-id"] != bad
    with httpx.Client(base_url=keyed.base) as http:
        assert http.head("/health").status_code == http.head("/").status_code == 200


def test_a_full_queue_says_when_to_try_again_and_metrics_have_the_names_of_boards(keyed: Client) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"prompt": "abc", "max_tokens": 200, "temperature": 1.5, "logit_bias": {"256": -100, "257": -100}}

    def ask(seed: int) -> httpx.Response:
        return httpx.post(f"{keyed.base}/v1/completions", json=body | {"seed": seed}, headers=headers, timeout=60)

    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(ask, range(12)))
    codes = [one.status_code for one in found]
    assert set(codes) == {200, 429}, "two places and two in line, for twelve"
    refused = next(one for one in found if one.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1
    text = keyed.get("/metrics", headers=headers).text
    for name in ("num_requests_running", "generation_tokens_total", "time_to_first_token_seconds_bucket",
                 "spec_decode_num_accepted_tokens_total", "prefix_cache_hits_total"):  # fmt: skip
        assert f"vllm:{name}" in text


def test_a_name_that_is_not_this_machine_s_is_not_served_without_a_key(tmp_path: Path) -> None:
    with serving(tmp_path) as client:
        rebound = client.get("/v1/models", headers={"Host": "evil.example"})
        assert rebound.status_code == 403
        assert client.get("/v1/models", headers={"Host": f"localhost:{client.role.port}"}).status_code == 200
        form = httpx.post(f"{client.base}/v1/completions", data={"prompt": "a"})
        assert form.status_code == 415, "what a page may send without asking"
        for switch in ("load", "unload"):
            refused = client.post(f"/v1/{switch}_lora_adapter", lora_name="a", lora_path="a")
            assert refused.status_code == 404, "only with project.load_adapters"

        def state(name: str) -> int:
            return int(client.get("/status").json()["models"]["random-1M"][name])

        # A client that goes away frees its place.
        before = state("new_tokens")
        with client.streaming(prompt="abc", max_tokens=450, logit_bias={"256": -100, "257": -100}) as events:
            begun = list(islice(events, 2))
        deadline = time.monotonic() + 20
        while state("running"):
            assert time.monotonic() < deadline
        assert 2 <= state("new_tokens") - before < 450, "it was not computed to its end"
        # SIGTERM: what runs is finished, what is new is refused.
        long: dict[str, Any] = {"prompt": "abc", "max_tokens": 450, "seed": 1, "logit_bias": {"256": -100, "257": -100}}
        text = client.text(**long)
        whole: list[str] = []
        with client.streaming(**long) as events:
            begun = list(islice(events, 1))
            thread = threading.Thread(target=lambda: whole.append(said([*begun, *events])))
            client.role.process.send_signal(signal.SIGTERM)
            wait_until(lambda: is_refused(client.base), "an end of new requests")
            assert client.role.process.poll() is None, "the text runs on"
            thread.start()
            thread.join(30)
        assert whole == [text]
        assert client.role.process.wait(20) == 0


def is_refused(base: str) -> bool:
    """Whether a new client gets no connection."""
    try:
        httpx.get(f"{base}/health", timeout=20)
    except httpx.ConnectError:
        return True
    return False


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("project.engine=split", "project.split.shards must name at least one shard"),
        (
            "project.engine=split project.split.shards=[127.0.0.1:9] project.adapters=/tmp",
            "project.adapters must be null unless engine=local",
        ),
        ("project.engine=speculative project.adapters=/tmp", "project.adapters must be null unless engine=local"),
        ("project.engine=speculative project.draft.source=layers", "project.draft.source must be ngram or none"),
        (
            "project.engine=speculative project.draft.source=model project.draft.model=random",
            "project.draft.source must be ngram or none",
        ),
        ("project.load_adapters=true", "project.load_adapters must be false"),
        ("project.temperature=3", "project.temperature must be in [0, 2]"),
        ("project.max_new_tokens=0", "project.max_new_tokens must be at least 1"),
    ],
)
def test_settings_that_cannot_be_served(words: str, line: str) -> None:
    with pytest.raises(UserError, match=re.escape(line)):
        compose_settings("serve", words, ServeSettings)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("network.host=0.0.0.0", "network.key_file must be set"),
        ("project.adapters=/nowhere", "project.adapters must be a folder"),
        ("project.journal=/proc/journal", "project.journal must be a folder that can be written"),
    ],
)
def test_what_cannot_be_served_is_one_line(words: str, line: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "serve", *SMALL, f"hydra.run.dir={tmp_path}"]
    done = subprocess.run([*command, words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert line in done.stderr


def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = [sys.executable, "-m", "serve", "model=random", f"hydra.run.dir={tmp_path}", f"network.port={port}"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert f"network.port must be free on 127.0.0.1, got {port}" in done.stderr


def test_no_verifier_is_one_line(tmp_path: Path) -> None:
    words = [*SMALL, f"hydra.run.dir={tmp_path}", "project.engine=speculative"]
    words += ["project.verifier.port=9", "network.connect_timeout_seconds=0.5"]
    done = subprocess.run([sys.executable, "-m", "serve", *words], capture_output=True, text=True, timeout=120)
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    assert "127.0.0.1:9" in done.stderr


def test_roles_know_their_server(tmp_path: Path) -> None:
    with role("serve", "model=random", "tracking=none", "network.port=0", f"project.journal={tmp_path}") as server:
        assert server.ready["base_url"] == f"http://127.0.0.1:{server.port}/v1"
        code, last = server.interrupt()
        assert "curl http://127.0.0.1" in server.stderr()
    assert code == 0
    assert last["ended_by"] == "interrupted"


def test_a_gate_is_closed_while_the_model_loads_and_when_it_is_crowded() -> None:
    held, served = asyncio.Event(), list[str]()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        served.append(scope["path"])
        await held.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def run() -> list[tuple[int, bytes]]:
        gate = Gate(app, key=b"", host="127.0.0.1", origins=[], most=2)

        async def ask() -> tuple[int, bytes]:
            sent: list[MutableMapping[str, Any]] = []

            async def send(message: MutableMapping[str, Any]) -> None:
                sent.append(message)

            headers = [(b"host", b"localhost:1")]
            await gate({"type": "http", "path": "/health", "method": "GET", "headers": headers}, receive, send)
            return int(sent[0]["status"]), bytes(sent[1]["body"])

        async def receive() -> MutableMapping[str, Any]:
            raise AssertionError

        loading = await ask()
        gate.is_loading = False
        asking = [asyncio.create_task(ask()) for _ in range(3)]
        await asyncio.sleep(0.01)
        held.set()
        return [loading, *await asyncio.gather(*asking)]

    (loading, body), *others = asyncio.run(run())
    assert loading == 503
    assert json.loads(body)["error"] == {
        "message": "Loading model", "type": "unavailable_error", "param": None, "code": 503
    }  # fmt: skip
    assert [status for status, _ in others] == [200, 200, 503]
    assert served == ["/health", "/health"]
