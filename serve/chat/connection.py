"""A server that speaks the OpenAI API, as a chat uses it: its model, and answers as streams that survive a break."""

from __future__ import annotations

import contextlib
import json
import os
import ssl
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import httpx

from lab.faults import Fault, Lost
from lab.network import client_side_tls, shared_key
from lab.settings import UserError
from lab.wire.listener import is_loopback
from serve.chat.settings import ChatSettings

OURS = "distributed-llm-lab"
"""`owned_by` of this lab's models."""
FOREIGN_KEY = "OPENAI_API_KEY"
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.1, 2.0
"""Between two tries to go on with a stream; each wait is twice the one before."""
PASSING = (429, 502, 503, 504)
"""Statuses of a server that is busy, or starts again."""

Message = dict[str, str]


class Refused(Fault):
    """The server refuses one request; the chat may go on."""


@dataclass(frozen=True)
class Piece:
    """Characters of an answer."""

    text: str
    is_guess: bool | None
    """Whether they were draft tokens; None: the server does not say."""


@dataclass
class Stream:
    """One answer on its way."""

    name: str = ""
    """Its id; empty until the first event."""
    position: str = ""
    """Id of its last event; empty: the server's streams cannot be continued."""
    breaks: int = 0
    usage: dict[str, Any] = field(default_factory=dict)
    is_complete: bool = False


class Connection:
    """A context manager over one HTTP client.

    Args:
        settings: Of the chat.

    Raises:
        UserError: a key that cannot be read, or one that would travel in the clear.
        Lost: no server there.
        Fault: it lists no model, and none is named.
    """

    def __init__(self, settings: ChatSettings) -> None:
        self._project, self._seed = settings.project, settings.seed
        self._url = settings.project.base_url.rstrip("/")
        network = settings.network
        host = httpx.URL(self._url).host
        key = shared_key(network).decode() or os.environ.get(FOREIGN_KEY, "").strip()
        if key and self._url.startswith("http://") and not network.trusted_link and not is_loopback(host):
            rule = "network.trusted_link must be true to send a key without TLS"
            raise UserError(f"{rule} (base_url={self._url}), got False")
        tls: ssl.SSLContext | bool = client_side_tls(network) or True
        timeout = httpx.Timeout(network.request_timeout_seconds, connect=network.connect_timeout_seconds)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(
            headers=headers, verify=tls, timeout=timeout, trust_env=not is_loopback(host), follow_redirects=False
        )
        self.is_ours = False
        """Whether it is a server of this lab."""
        self.model = ""

    def __enter__(self) -> Self:
        try:
            self.model = self._find_model()
        except BaseException:
            self._http.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.close()

    def answer(self, messages: Sequence[Message], stream: Stream) -> Iterator[Piece]:
        """The pieces of the answer to the last message. `stream` is told where it stands.

        Raises:
            Refused: the server refuses the request, or ends the answer by a fault.
            Lost: the connection broke, and could not be made again in time.
        """
        body: dict[str, Any] = {
            "model": self.model,
            "messages": list(messages),
            "stream": True,
            "seed": self._seed,
            "temperature": self._project.temperature,
            "top_p": self._project.top_p,
            "max_tokens": self._project.max_tokens,
        }
        if self.is_ours:
            body |= {"show_guesses": True, "speculative": self._project.speculative}
            body["stream_options"] = {"include_usage": True}
        asked = {name: value for name, value in body.items() if value is not None}
        broken = ""
        try:
            with self._http.stream("POST", f"{self._url}/chat/completions", json=asked) as reply:
                yield from self._pieces(reply, stream)
        except httpx.TransportError as error:
            broken = _reason(error)
        while not stream.is_complete:
            stream.breaks += 1
            yield from self._go_on(stream, asked, broken)

    def _connect(self, stream: Stream, asked: dict[str, Any]) -> contextlib.AbstractContextManager[httpx.Response]:
        """The rest of a stream of which something has arrived; else the same request again, which has its seed."""
        if not stream.position:
            return self._http.stream("POST", f"{self._url}/chat/completions", json=asked)
        headers = {"Last-Event-ID": stream.position}
        return self._http.stream("GET", f"{self._url}/streams/{stream.name}", headers=headers)

    def _go_on(self, stream: Stream, asked: dict[str, Any], broken: str) -> Iterator[Piece]:
        """The pieces of one further connection, once there is one."""
        if not stream.position and not self.is_ours:
            raise Lost(f"the connection to {self._url} broke, and the answer cannot be continued there: {broken}")
        deadline, wait = time.monotonic() + self._project.reconnect_seconds, FIRST_WAIT_SECONDS
        before = stream.position
        while True:
            with contextlib.suppress(httpx.TransportError), self._connect(stream, asked) as reply:
                if reply.status_code not in PASSING:
                    yield from self._pieces(reply, stream)
                    return
            if stream.position != before:
                return  # it went on, and broke again
            if time.monotonic() + wait > deadline:
                seconds = self._project.reconnect_seconds
                raise Lost(f"the connection to {self._url} broke, and did not come back within {seconds:g} s")
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)

    def _pieces(self, reply: httpx.Response, stream: Stream) -> Iterator[Piece]:
        if reply.status_code != 200:
            raise self._refusal(reply)
        position = ""
        for line in _lines(reply):
            if line.startswith(b"id:"):
                position = line[3:].strip().decode("ascii", "replace")
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                stream.is_complete = True
                return
            document = _json(data)
            if document.get("error"):
                raise Refused(_message(document))
            stream.name = str(document.get("id", ""))
            stream.usage = document.get("usage") or stream.usage
            for choice in document.get("choices") or ():
                text = (choice.get("delta") or {}).get("content")
                if text:
                    yield Piece(text, choice.get("is_guess"))
            stream.position = position

    def _find_model(self) -> str:
        try:
            reply = self._http.get(f"{self._url}/models")
        except httpx.TransportError as error:
            raise Lost(f"no server answers at {self._url}: {_reason(error)}") from None
        if reply.status_code in (401, 403):
            raise self._refusal(reply)
        listed = _json(reply.content).get("data") if reply.status_code == 200 else None
        models = [one for one in listed or () if isinstance(one, dict) and isinstance(one.get("id"), str)]
        self.is_ours = any(one.get("owned_by") == OURS for one in models)
        names = [one["id"] for one in models]
        named = self._project.model_id
        if named is None and not names:
            raise UserError(f"project.model_id must be set: {self._url}/models lists no model, got None")
        if named is not None and names and named not in names:
            raise UserError(f"project.model_id must be one of {', '.join(names[:20])}, got {named!r}")
        return named or names[0]

    def _refusal(self, reply: httpx.Response) -> Exception:
        message = _message(_json(reply.read()))
        if reply.status_code in (401, 403):
            rule = f"network.key_file, LAB_KEY or {FOREIGN_KEY} must hold the key of {self._url}"
            return UserError(f"{rule}: the server says {message!r}")
        return Refused(f"the server refuses ({reply.status_code}): {message}")


def _lines(reply: httpx.Response) -> Iterator[bytes]:
    """The lines of a stream. Only a line feed ends one: texts hold other characters that Python takes for line ends."""
    rest = b""
    for data in reply.iter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        yield from lines


def _json(data: bytes) -> dict[str, Any]:
    """A JSON object; empty for anything else."""
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _message(document: dict[str, Any]) -> str:
    error = document.get("error")
    return str(error.get("message") if isinstance(error, dict) else error or "no reason given")


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
