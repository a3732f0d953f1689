"""Chat in a terminal as people start it: in a pipe, at a terminal, before our server and before a foreign one."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from select import select
from typing import Any

import httpx
import pytest

from tests.serve.chat_server import base_url, chat_server
from tests.serve.foreign import Foreign, Relay, foreign_server
from tests.speculative.processes import Role

SECONDS = 60.0
OPTIONS = ("tracking=none", "seed=7", "project.max_tokens=60")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Role]:
    with chat_server(tmp_path_factory.mktemp("server"), "model.dtype=float64", "project.context=1024") as running:
        yield running


@pytest.fixture
def foreign() -> Iterator[Foreign]:
    with foreign_server() as running:
        yield running


def environment(**own: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("LAB_KEY", "OPENAI_API_KEY", "NO_COLOR")}
    return kept | {"TERM": "xterm"} | own


def command(folder: Path, url: str, *words: str) -> list[str]:
    fixed = [sys.executable, "-m", "serve.chat", f"hydra.run.dir={folder}/run", f"project.base_url={url}"]
    return [*fixed, *OPTIONS, *words]


def piped(
    folder: Path, url: str, lines: str, *words: str, code: int = 0, **own: str
) -> tuple[str, dict[str, Any], str]:
    """What it wrote before its last line, the last line, and standard error."""
    done = subprocess.run(
        command(folder, url, *words),
        input=lines,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=environment(**own),
    )
    assert done.returncode == code, done.stderr
    text, _, last = done.stdout.rstrip("\n").rpartition("\n")
    return text, json.loads(last) if last else {}, done.stderr


def told(server: Role, messages: Sequence[Mapping[str, str]]) -> str:
    """The server's own answer, without the chat."""
    body = {"messages": messages, "seed": 7, "max_tokens": 60}
    found = httpx.post(f"{base_url(server)}/chat/completions", json=body, timeout=SECONDS).json()
    return str(found["choices"][0]["message"]["content"])


def test_a_pipe_gets_the_answers_and_nothing_else(server: Role, tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    lines = f"one\n\n/system Be brief.\ntwo\n/save {saved}\n/new\nthree\n"
    text, last, errors = piped(tmp_path, base_url(server), lines)
    first = told(server, [{"role": "user", "content": "one"}])
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": first}]
    system = {"role": "system", "content": "Be brief."}
    second = told(server, [system, *turns, {"role": "user", "content": "two"}])
    third = told(server, [system, {"role": "user", "content": "three"}])
    assert text == "\n".join([first, second, third])
    assert (last["status"], last["ended_by"], last["answers"], last["new_tokens"]) == ("ok", "done", 3, 180)
    assert errors == ""
    messages = json.loads(saved.read_text())["messages"]
    assert [one["role"] for one in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[-1]["content"] == second


def test_an_answer_whose_connection_breaks_is_whole(server: Role, tmp_path: Path) -> None:
    relay = Relay(server.port)
    try:
        relay.hold(6)
        cutting = threading.Thread(target=lambda: (wait_for(lambda: relay.is_holding), relay.cut()))
        cutting.start()
        text, last, _ = piped(tmp_path, f"http://127.0.0.1:{relay.port}/v1", "one\n")
        cutting.join(SECONDS)
    finally:
        relay.close()
    assert text == told(server, [{"role": "user", "content": "one"}])
    assert (last["breaks"], relay.streams) == (1, 2)


def test_a_server_that_speaks_the_bare_protocol(foreign: Foreign, tmp_path: Path) -> None:
    foreign.pieces = ["a\u2028b\x85c", "\x1b[31mred"]
    words = ("project.temperature=0.5", "prompt=hello")
    text, last, _ = piped(tmp_path, f"{foreign.url}/v1/", "again\n", *words, OPENAI_API_KEY="theirs")
    assert text == "a\u2028b\x85c\x1b[31mred\n" * 2 + "" or text == "\n".join(["a\u2028b\x85c\x1b[31mred"] * 2)
    assert (last["model"], last["answers"]) == ("theirs", 2)
    assert foreign.keys == ["Bearer theirs"] * 2
    assert foreign.asked[0] == {
        "model": "theirs", "messages": [{"role": "user", "content": "hello"}], "stream": True, "seed": 7,
        "temperature": 0.5, "max_tokens": 60,
    }  # fmt: skip
    assert [one["role"] for one in foreign.asked[1]["messages"]] == ["user", "assistant", "user"]


def test_what_cannot_be_is_refused_in_one_line(foreign: Foreign, server: Role, tmp_path: Path) -> None:
    for words, own, code, reason in (
        (["project.base_url=ftp://x"], {}, 2, "project.base_url must begin with http:// or https://"),
        (["project.base_url=http://10.0.0.1/v1"], {"OPENAI_API_KEY": "x"}, 2, "network.trusted_link must be true"),
        (["project.base_url=http://127.0.0.1:1/v1"], {}, 1, "no server answers at http://127.0.0.1:1/v1"),
        (["project.model_id=other"], {}, 2, "project.model_id must be one of theirs, got 'other'"),
    ):
        _, _, errors = piped(tmp_path, f"{foreign.url}/v1", "hi\n", *words, code=code, **own)
        assert reason in errors
        assert len(errors.splitlines()) == 1
    _, last, errors = piped(tmp_path, f"{foreign.url}/v1", "/wrong\n", code=2)
    assert "must be a command (/help), got '/wrong'" in errors
    _, last, errors = piped(tmp_path, base_url(server), "x" * 5000 + "\n", code=1)
    assert "must leave room for a token in the context of 1024 tokens" in errors
    assert last["status"] == "failed"


@dataclass
class Terminal:
    """A chat at a terminal."""

    process: subprocess.Popen[bytes]
    screen: int
    seen: str = ""

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def until(self, text: str, count: int = 1) -> None:
        deadline = time.monotonic() + SECONDS
        while self.seen.count(text) < count:
            ready, _, _ = select([self.screen], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"not shown: {text!r} in {self.seen!r}"
            self.seen += os.read(self.screen, 2**16).decode(errors="replace")

    def end(self) -> int:
        while True:
            try:
                data = os.read(self.screen, 2**16)
            except OSError:  # the other end is closed
                break
            if not data:
                break
            self.seen += data.decode(errors="replace")
        return self.process.wait(SECONDS)


@contextmanager
def terminal(folder: Path, url: str, **own: str) -> Iterator[Terminal]:
    screen, theirs = pty.openpty()
    process = subprocess.Popen(
        command(folder, url), stdin=theirs, stdout=theirs, stderr=theirs, env=environment(**own), start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)
    watchdog = threading.Timer(2 * SECONDS, process.kill)
    watchdog.start()
    try:
        yield Terminal(process, screen)
    finally:
        watchdog.cancel()
        process.kill()
        process.wait(SECONDS)
        os.close(screen)


def wait_for(holds: Any) -> None:
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


def test_ctrl_c_stops_the_answer_and_a_second_one_at_the_prompt_the_chat(server: Role, tmp_path: Path) -> None:
    relay = Relay(server.port)
    try:
        with terminal(tmp_path, f"http://127.0.0.1:{relay.port}/v1") as chat:
            chat.until("> ")
            relay.hold(6)
            chat.type("one\n")
            wait_for(lambda: relay.is_holding)
            chat.type("\x03")
            chat.until("(stopped)")
            relay.release()
            chat.until("> ", 2)
            chat.type("/new\ntwo\n")
            chat.until("> ", 4)
            chat.type("\x03")
            assert chat.end() == 0
            last = json.loads(chat.seen.splitlines()[-1])
    finally:
        relay.close()
    assert (last["ended_by"], last["answers"], last["stopped"]) == ("interrupted", 1, 1)
    assert "\x1b[33m" in chat.seen, "the model's own tokens have their colour"


@pytest.mark.parametrize("own", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
def test_a_terminal_is_kept_from_control_characters(foreign: Foreign, tmp_path: Path, own: dict[str, str]) -> None:
    foreign.pieces = ["\x1b]0;title\x07", "\x9b31m", "fine"]
    with terminal(tmp_path, f"{foreign.url}/v1", **own) as chat:
        chat.until("> ")
        chat.type("hi\n")
        chat.until("fine")
        chat.until("> ", 2)
        chat.type("/quit\n")
        assert chat.end() == 0
    assert "?]0;title??31mfine" in chat.seen
    assert "\x1b[3" not in chat.seen


def test_ctrl_c_in_a_pipe_ends_the_command(server: Role, tmp_path: Path) -> None:
    relay = Relay(server.port)
    relay.hold(6)
    process = subprocess.Popen(
        command(tmp_path, f"http://127.0.0.1:{relay.port}/v1"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=environment(),
    )  # fmt: skip
    try:
        assert process.stdin is not None
        process.stdin.write("one\n")
        process.stdin.flush()
        wait_for(lambda: relay.is_holding)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
        process.wait(SECONDS)
        relay.close()
    assert process.returncode == 130
    assert json.loads(out.splitlines()[-1])["ended_by"] == "interrupted"
