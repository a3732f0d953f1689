"""A client of one server: whole streams, each with the time at which its first characters came."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import httpx

Message = Mapping[str, str]


@dataclass(frozen=True)
class Answer:
    """One stream, up to its end."""

    text: str
    tokens: int
    """New tokens by the server's own count (`usage`); where it gives none, events with text."""
    cached_tokens: int
    """Tokens of the prompt that the server did not compute again; 0 where it does not say."""
    seconds: float
    first_seconds: float
    """Seconds until the first characters; those of the whole stream if it has none."""


class Client(AbstractContextManager["Client"]):
    """A client of an OpenAI-compatible server; its methods may be called from several threads.

    Args:
        address: Of the server, without `/v1`.
        model: Its id there.
        timeout_seconds: Longest time without a byte.
        connections: Most concurrent streams.
    """

    def __init__(self, address: str, model: str, timeout_seconds: float, connections: int = 1) -> None:
        self.address, self.model = address, model
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=0)  # some servers close idle ones
        self._http = httpx.Client(base_url=address, timeout=timeout_seconds, limits=limits)

    def __exit__(self, *exception: object) -> None:
        self._http.close()

    def complete(self, prompt: str, new_tokens: int, **fields: Any) -> Answer:
        """Continue a text greedily."""
        return self._stream("/v1/completions", {"prompt": prompt, "max_tokens": new_tokens, **fields})

    def chat(self, messages: Sequence[Message], new_tokens: int, **fields: Any) -> Answer:
        """Continue a chat greedily."""
        return self._stream("/v1/chat/completions", {"messages": messages, "max_tokens": new_tokens, **fields})

    def _stream(self, path: str, fields: Mapping[str, Any]) -> Answer:
        body = {"model": self.model, "temperature": 0.0, "stream": True, "stream_options": {"include_usage": True}}
        pieces: list[str] = []
        usage: Mapping[str, Any] = {}
        first = None
        began = time.perf_counter()
        with self._http.stream("POST", path, json={**body, **fields}) as reply:
            if reply.status_code != httpx.codes.OK:
                raise RuntimeError(f"{self.address}{path} answered {reply.status_code}: {reply.read().decode()[:500]}")
            for event in _events(reply):
                usage = event.get("usage") or usage
                if piece := "".join(map(_text, event.get("choices", ()))):
                    first = first or time.perf_counter()
                    pieces.append(piece)
        ended = time.perf_counter()
        return Answer(
            text="".join(pieces),
            tokens=usage.get("completion_tokens", len(pieces)),
            cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
            seconds=ended - began,
            first_seconds=(first or ended) - began,
        )


def _events(reply: httpx.Response) -> Iterator[dict[str, Any]]:
    """The events of a stream. RuntimeError for one that says that the stream failed."""
    for line in reply.iter_lines():
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event: dict[str, Any] = json.loads(line.removeprefix("data: "))
        if "error" in event:
            raise RuntimeError(f"{reply.url} ended its stream with {event['error']}")
        yield event


def _text(choice: Mapping[str, Any]) -> str:
    return choice.get("text") or (choice.get("delta") or {}).get("content") or ""
