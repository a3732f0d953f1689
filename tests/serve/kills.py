"""The whole chain behind one door, killed at random: adapter, two shards, verifier, slow link, drafter, HTTP.

A process that is killed is started again at its own port. A client whose server was killed comes back with the id of
its stream and the position of its last event. Every text must be that of the whole model with the adapter.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx

from lab.link import Link, LinkSettings, OneWay
from tests.serve.servers import Event, events, said

START_SECONDS = 180.0
TEXT_SECONDS = 300.0
TOKENS = 120
PROMPT = "One two three one two three one two "
MODEL = ("model=random", "model.dtype=float64", "tracking=none", "project.context=512", "device.threads=1")


@dataclass
class Killed:
    """What came of the kills."""

    kills: dict[str, int] = field(default_factory=dict)
    texts: int = 0
    differing: int = 0
    returns: int = 0
    """Times that a client came back to a server that had been killed."""
    longest_pause_seconds: float = 0.0


class Process:
    """One role at one port, for as many lives as it is given."""

    def __init__(self, folder: Path, module: str, *words: str) -> None:
        self._command = [sys.executable, "-m", module, *MODEL, *words]
        self._folder, self._lives = folder, 0
        self.port = free_port()
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> Self:
        """Begin a life, and wait until it listens."""
        self._lives += 1
        place = f"hydra.run.dir={self._folder}/life-{self._lives}"
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "stderr").open("a") as errors:
            self._process = subprocess.Popen(
                [*self._command, f"network.port={self.port}", place],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        watchdog = threading.Timer(START_SECONDS, self._process.kill)
        watchdog.start()
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        watchdog.cancel()
        assert line, (self._folder / "stderr").read_text()[-2000:]
        assert json.loads(line)["status"] == "listening"
        return self

    def kill(self) -> None:
        """End its life at once."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass
class Chain:
    """All processes by name."""

    processes: Mapping[str, Process]
    alone: Process
    """A server with the whole model and the adapter."""

    @property
    def base(self) -> str:
        """Where the door is."""
        return f"http://127.0.0.1:{self.processes['server'].port}"

    def harm(self, name: str) -> None:
        """Kill a process, and start it again."""
        self.processes[name].kill()
        self.processes[name].start()


@contextmanager
def chain(folder: Path, adapter: Path, rtt_seconds: float) -> Iterator[Chain]:
    """The chain until the end of the block."""
    own = [f"model.adapter='{adapter}'"]
    last = Process(folder / "last", "split.serve", *own, "project.layers=2:4")
    first = Process(folder / "first", "split.serve", *own, "project.layers=0:2")
    shards = f"project.split.shards=[127.0.0.1:{first.port},127.0.0.1:{last.port}]"
    verifier = Process(folder / "verifier", "speculative.verifier", *own, "project.engine=split", shards)
    alone = Process(folder / "alone", "serve", *own, f"project.journal={folder}/alone")
    processes = {"first": first, "last": last, "verifier": verifier, "alone": alone}
    way = OneWay(delay_seconds=rtt_seconds / 2, jitter_seconds=0.0, bytes_per_second=0.0)
    settings = LinkSettings(up=way, down=way, buffer_bytes=2**20, seed=1)
    link = Link(("127.0.0.1", verifier.port), settings, host="127.0.0.1", port=0)
    try:
        starting = [threading.Thread(target=one.start) for one in (first, last, alone)]
        for thread in starting:
            thread.start()
        for thread in starting:
            thread.join()
        verifier.start()
        with link:
            words = ["project.engine=speculative", f"project.verifier.port={link.port}"]
            server = Process(folder / "server", "serve", *own, *words, f"project.journal={folder}/journal")
            processes["server"] = server
            server.start()
            named = {name: process for name, process in processes.items() if name != "alone"}
            yield Chain(named, alone)
    finally:
        for process in processes.values():
            process.kill()


def kill_at_random(behind: Chain, kinds: list[str], seed: int) -> Killed:
    """One text after the other; in the middle of each, a process of the next kind is killed."""
    came, generator = Killed(), random.Random(seed)
    for number, kind in enumerate(kinds):
        body = {"prompt": PROMPT + str(number), "max_tokens": TOKENS, "seed": number, "temperature": 0.8}
        body |= {"logit_bias": {"256": -100, "257": -100}}  # a text that does not end by itself
        alone = httpx.post(
            f"http://127.0.0.1:{behind.alone.port}/v1/completions", json=body, timeout=TEXT_SECONDS
        ).json()["choices"][0]["text"]
        text = _text(behind, body, kind, generator.randrange(1, TOKENS // 2), came)
        came.kills[kind] = came.kills.get(kind, 0) + 1
        came.texts += 1
        came.differing += text != alone
    return came


def _text(behind: Chain, body: Mapping[str, Any], kind: str, place: int, came: Killed) -> str:
    """One text, during which a process is killed after so many events."""
    found: list[Event] = []
    mending: list[threading.Thread] = []
    path, headers = "/v1/completions", dict[str, str]()
    deadline = time.monotonic() + TEXT_SECONDS
    while True:
        try:
            method = "GET" if found else "POST"
            options: dict[str, Any] = {"headers": headers} if found else {"json": {**body, "stream": True}}
            with httpx.stream(method, behind.base + path, timeout=TEXT_SECONDS, **options) as reply:
                assert reply.status_code == 200, reply.read()
                came.returns += bool(found)
                heard = time.monotonic()
                for one in events(reply):
                    came.longest_pause_seconds = max(came.longest_pause_seconds, time.monotonic() - heard)
                    heard = time.monotonic()
                    found.append(one)
                    if len(found) == place and not mending:
                        mending.append(threading.Thread(target=behind.harm, args=(kind,)))
                        mending[0].start()
            break
        except (httpx.TransportError, AssertionError):  # the connection ended without [DONE]
            assert kind == "server", "a process behind the door must cost no more than a pause"
            assert time.monotonic() < deadline
            if found:
                path, headers = f"/v1/streams/{found[0].data['id']}", {"Last-Event-ID": found[-1].id}
            time.sleep(0.2)
    for thread in mending:
        thread.join(START_SECONDS)
    return said(found)
