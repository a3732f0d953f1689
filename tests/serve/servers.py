"""Real servers for tests, and what a client reads from them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.speculative.processes import Role, role

SMALL = ("model=random", "model.dtype=float64", "tracking=none", "network.port=0", "project.context=512")
SECONDS = 60.0


@dataclass(frozen=True)
class Event:
    """One event of a stream."""

    id: str
    data: dict[str, Any]


class Client:
    """Speaks plain HTTP to one server."""

    def __init__(self, role: Role) -> None:
        self.role = role
        self.base = f"http://127.0.0.1:{role.port}"
        self._http = httpx.Client(base_url=self.base, timeout=SECONDS)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self._http.get(path, **options)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self._http.post(path, json=body)

    def complete(self, **body: Any) -> dict[str, Any]:
        """A completion that must be served."""
        reply = self.post("/v1/completions", **body)
        assert reply.status_code == 200, reply.text
        found: dict[str, Any] = reply.json()
        return found

    def text(self, **body: Any) -> str:
        """The text of a completion's first choice."""
        return str(self.complete(**body)["choices"][0]["text"])

    @contextmanager
    def streaming(self, path: str = "/v1/completions", **body: Any) -> Iterator[Iterator[Event]]:
        """The events of a stream, up to its end or the block's."""
        with self._http.stream("POST", path, json={"stream": True, **body}) as reply:
            assert reply.status_code == 200, reply.read()
            yield events(reply)

    def continued(self, name: str, after: str) -> list[Event]:
        """The rest of a stream."""
        headers = {"Last-Event-ID": after} if after else {}
        with self._http.stream("GET", f"/v1/streams/{name}", headers=headers) as reply:
            assert reply.status_code == 200, reply.read()
            return list(events(reply))


def events(reply: httpx.Response) -> Iterator[Event]:
    """The events of a stream; AssertionError if it ends without [DONE]."""
    position = ""
    for line in reply.iter_lines():
        if line.startswith("id: "):
            position = line.removeprefix("id: ")
        elif line == "data: [DONE]":
            return
        elif line.startswith("data: "):
            yield Event(position, json.loads(line.removeprefix("data: ")))
    raise AssertionError("the stream ended without [DONE]")


def said(found: Sequence[Event], choice: int = 0) -> str:
    """The text of one choice of a stream."""
    pieces = []
    for one in found:
        assert "error" not in one.data, one.data
        for part in one.data["choices"]:
            if part["index"] == choice:
                pieces.append(part["text"] if "text" in part else part["delta"].get("content", ""))
    return "".join(pieces)


@contextmanager
def serving(journal: Path, *words: str, environment: Mapping[str, str] | None = None) -> Iterator[Client]:
    """A server until the end of the block."""
    own = {"OMP_NUM_THREADS": "1"} | dict(environment or {})
    with role("serve", *SMALL, f"project.journal={journal}", *words, environment=os.environ | own) as server:
        yield Client(server)


@contextmanager
def shards(stack_words: Sequence[str], cuts: Sequence[str]) -> Iterator[list[str]]:
    """Shards with these layers, first to last; yields their addresses. They are started last to first."""
    with ExitStack() as stack:
        addresses: list[str] = []
        following = "null"
        for layers in reversed(cuts):
            shard = stack.enter_context(
                role("split.serve", *stack_words, f"project.layers={layers}", f"project.next={following}")
            )
            following = f"127.0.0.1:{shard.port}"
            addresses.insert(0, following)
        yield addresses
