"""Chat in a terminal as people start it: in a pipe, at a terminal, before our server and before a foreign one."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import signal
import subprocess
import sys
import termios
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

from serve.chat import __main__ as chat
from tests.in_process import exit_code
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
    assert text == "\n".join(["a\u2028b\x85c\x1b[31mred"] * 2), "in a pipe a text is exactly what it is"
    assert (last["model"], last["answers"]) == ("theirs", 2)
    assert foreign.keys == ["Bearer theirs"] * 2
    assert foreign.asked[0] == {
        "model": "theirs", "messages": [{"role": "user", "content": "hello"}], "stream": True, "seed": 7,
        "temperature": 0.5, "max_tokens": 60,
    }  # fmt: skip
    assert [one["role"] for one in foreign.asked[1]["messages"]] == ["user", "assistant", "user"]


REFUSED = [
    ("hi", ["project.base_url=ftp://x"], 2, "project.base_url must begin with http:// or https://, got 'ftp://x'"),
    ("hi", ["project.base_url=http://10.0.0.1/v1"], 2, "network.trusted_link must be true to send a key without TLS"),
    ("hi", ["project.base_url=http://127.0.0.1:1/v1"], 1, "no server answers at http://127.0.0.1:1/v1"),
    ("hi", ["project.model_id=other"], 2, "project.model_id must be one of theirs, got 'other'"),
    ("/wrong", [], 2, "a line that begins with / must be a command (/help), got '/wrong'"),
    ("/save /", [], 2, "/save must name a file that can be written, got '/'"),
]


@pytest.mark.parametrize(("line", "words", "code", "reason"), REFUSED, ids=lambda value: str(value)[:30])
def test_what_cannot_be_is_refused_in_one_line(
    foreign: Foreign,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    line: str,
    words: list[str],
    code: int,
    reason: str,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "theirs")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{line}\n"))
    own = [f"hydra.run.dir={tmp_path}/run", *OPTIONS]
    base = [] if any("base_url" in word for word in words) else [f"project.base_url={foreign.url}/v1"]
    assert exit_code(chat.main, *own, *base, *words) == code
    (said,) = capsys.readouterr().err.splitlines()
    assert reason in said
    assert foreign.asked == []


def test_a_request_that_the_server_refuses_ends_a_pipe(
    server: Role, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("x" * 5000 + "\n"))
    own = [f"hydra.run.dir={tmp_path}/run", *OPTIONS, f"project.base_url={base_url(server)}"]
    assert exit_code(chat.main, *own) == 1
    said = capsys.readouterr()
    assert "must leave room for a token in the context of 1024 tokens" in said.err
    assert json.loads(said.out.splitlines()[-1])["status"] == "failed"


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

    def ends_within(self, seconds: float) -> bool:
        """Whether it closes its end; what it writes until then is seen."""
        deadline = time.monotonic() + seconds
        while select([self.screen], [], [], max(0.0, deadline - time.monotonic()))[0]:
            try:
                self.seen += os.read(self.screen, 2**16).decode(errors="replace")
            except OSError:
                return True
        return False

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


def take_terminal() -> None:
    """Make standard input the terminal that this process is controlled by: Ctrl+C there is its signal."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@contextmanager
def terminal(folder: Path, url: str, **own: str) -> Iterator[Terminal]:
    screen, theirs = pty.openpty()
    ends = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = subprocess.Popen(
        command(folder, url), **ends, env=environment(**own), start_new_session=True, preexec_fn=take_terminal
    )
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
        with terminal(tmp_path, f"http://127.0.0.1:{relay.port}/v1") as seen:
            seen.until("> ")
            relay.hold(6)
            seen.type("one\n")
            wait_for(lambda: relay.is_holding)
            seen.type("\x03")
            seen.until("(stopped)")
            relay.release()
            seen.until("> ", 2)
            seen.type("/new\n")
            seen.until("> ", 3)
            seen.type("two\n")
            seen.until("> ", 4)
            seen.type("\x03")
            if not seen.ends_within(10):  # readline may show a prompt twice: then the answer was stopped
                seen.type("\x03")
            assert seen.end() == 0
            last = json.loads(seen.seen.splitlines()[-1])
    finally:
        relay.close()
    assert (last["ended_by"], last["answers"] + last["stopped"]) == ("interrupted", 2)
    assert last["stopped"] >= 1
    assert "\x1b[33m" in seen.seen, "the model's own tokens have their colour"


def test_a_terminal_is_kept_from_control_characters_and_from_colours_that_are_off(
    foreign: Foreign, tmp_path: Path
) -> None:
    foreign.pieces = ["\x1b]0;title\x07", "\x9b31m", "fine"]
    with terminal(tmp_path, f"{foreign.url}/v1", NO_COLOR="1") as seen:
        seen.until("> ")
        seen.type("hi\n")
        seen.until("fine")
        seen.until("> ", 2)
        seen.type("/quit\n")
        assert seen.end() == 0
    assert "?]0;title??31mfine" in seen.seen
    assert "\x1b[3" not in seen.seen


def test_ctrl_c_in_a_pipe_ends_the_command(server: Role, tmp_path: Path) -> None:
    relay = Relay(server.port)
    relay.hold(6)
    words = command(tmp_path, f"http://127.0.0.1:{relay.port}/v1")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen(words, **pipes, text=True, env=environment())
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
