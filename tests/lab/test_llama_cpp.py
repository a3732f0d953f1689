"""llama.cpp in a process of its own, with a stand-in for its wheel: what is asked, what is read, and its end."""

from __future__ import annotations

import os
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from lab import llama_cpp
from lab.command.processes import NotReady
from lab.llama_cpp import LlamaCpp

WHEEL = """
import json, threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

class CommonParams:
    def __init__(self):
        self.model, self.cpuparams, self.cpuparams_batch, self.speculative = (SimpleNamespace() for _ in range(4))

common_speculative_type = SimpleNamespace(COMMON_SPECULATIVE_TYPE_NGRAM_CACHE="n-grams")

class Server:
    def __init__(self, own):
        if own.model.path == "slow.gguf":
            threading.Event().wait()
        about = [own.model.path, own.cpuparams.n_threads, own.n_parallel, own.n_ctx, own.speculative.__dict__]

        class Answers(BaseHTTPRequestHandler):
            def do_POST(self):
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                body = json.dumps({"timings": {"prompt_per_second": 7.0, "about": about, "asked": asked}}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *ignored):
                pass

        listener = HTTPServer(("127.0.0.1", own.port), Answers)
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        self.listening_address = f"http://127.0.0.1:{listener.server_port}"
"""


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "xllamacpp.py").write_text(WHEEL, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path.cwd()}")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")


def _children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if llama_cpp.MODULE in child.cmdline()]


@pytest.mark.usefixtures("wheel")
def test_it_is_asked_for_greedy_text_and_ends_with_its_user() -> None:
    with closing(LlamaCpp(Path("a.gguf"), 1, 4, 100, "NGRAM_CACHE")) as peer:
        timings = peer.complete([1, 2, 3], 5, ignore_end=False)
        asked = {"prompt": [1, 2, 3], "n_predict": 5, "temperature": 0.0, "cache_prompt": False, "ignore_eos": False}
        assert timings["asked"] == asked
        assert timings["about"] == ["a.gguf", 1, 4, 400, {"types": ["n-grams"]}]
        assert peer.prompt_speed([1]) == 7.0
        assert len(_children()) == 1
    assert _children() == []


@pytest.mark.usefixtures("wheel")
def test_one_that_does_not_start_is_not_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[str]] = []
    start = llama_cpp.start

    def noting(*words: Any, **options: Any) -> subprocess.Popen[str]:
        started.append(start(*words, **options))
        return started[-1]

    monkeypatch.setattr(llama_cpp, "start", noting)
    monkeypatch.setattr(llama_cpp, "START_SECONDS", 0.5)
    with pytest.raises(NotReady):
        LlamaCpp(Path("slow.gguf"), 1, 1, 100)
    assert started[0].poll() is not None
