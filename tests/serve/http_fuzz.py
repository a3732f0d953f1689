"""Requests meant to break the HTTP server: random and mutated bodies for every endpoint, and bytes that are no HTTP.

A few hundred in the tests, 20,000 in the soak (`python -m tests.soak http_fuzzed`).
"""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.speculative.processes import Role

MOST_GROWTH_BYTES = 10 * 2**20
REQUEST_SECONDS = 5.0
"""`project.request_seconds` of the fuzzed server: on a loaded machine, seconds pass between the head and the body."""
IDLE_SECONDS = 5.0
"""`project.connection_idle_seconds` of the fuzzed server, for whose end the broken requests wait."""
ANSWER_SECONDS = 60.0
"""A deadline for a loaded machine, not an expectation."""
WARM_UP = 100
CLIENTS = 4
"""Senders of bodies at once: texts share passes, and a busy machine is used."""
CONNECTIONS = 16
"""Broken requests at once."""
WORDS = (
    "project.max_new_tokens=6",
    "project.max_choices=4",
    "project.prefix_tokens=1024",
    "project.keep_seconds=1",
    "project.max_body_bytes=1000000",
    f"project.request_seconds={REQUEST_SECONDS}",
    f"project.connection_idle_seconds={IDLE_SECONDS}",
)
"""Settings of a server to be fuzzed: short texts, and bounded caches, so that growth is a leak."""
LARGEST: dict[str, Any] = {"n": 4, "max_tokens": 6, "logprobs": 20}
"""Fields of the largest answers that those settings allow."""
KNOWN: dict[str, Any] = {"prompt": "What is left", "max_tokens": 24, "temperature": 0}

text = st.text(st.characters(), max_size=12)  # halves of surrogate pairs included
scalar = st.one_of(
    st.none(), st.booleans(), st.integers(), st.sampled_from([-(2**63), 2**63, 2**64, 10**400, -1, 0]),
    st.floats(), st.sampled_from([1e308, 5e-324, -0.0]), text,
)  # fmt: skip
anything = st.recursive(scalar, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4))
roles = st.sampled_from(["system", "developer", "user", "assistant", "tool", "function"])
part = st.fixed_dictionaries({"type": st.sampled_from(["text", "refusal", "image_url"])}, optional={"text": text})
message = st.fixed_dictionaries(
    {"role": roles},
    optional={
        "content": text | st.lists(part, max_size=3) | st.none(),
        "tool_calls": st.none() | st.lists(anything, max_size=1),
    },
)
ids = st.lists(st.integers(0, 260), min_size=1, max_size=8)
prompt = text | ids | st.lists(text | ids, max_size=4)
sampled: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from(["random-1M", "another", None]),
    "max_tokens": st.integers(-1, 8),
    "temperature": st.floats(0, 2) | st.sampled_from([0, 1e-300, 5e-324, 2]),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(-2, 300),
    "min_p": st.floats(0, 1),
    "n": st.integers(0, 5),
    "stop": text | st.lists(text, max_size=5),
    "seed": st.integers(-(2**64), 2**65),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.01, 100),
    "logit_bias": st.dictionaries(st.integers(-1, 260).map(str), st.floats(-100, 100), max_size=4),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({}, optional={"include_usage": st.booleans()}),
    "speculative": st.booleans(),
    "show_guesses": st.booleans(),
    "user": text,
}
chat = {
    "messages": st.lists(message, min_size=1, max_size=3),
    "logprobs": st.booleans(),
    "top_logprobs": st.integers(-1, 21),
    "max_completion_tokens": st.integers(-1, 8),
    "tools": st.just([]),
    "tool_choice": st.sampled_from(["auto", "none", "required"]),
    "function_call": st.sampled_from(["auto", "none"]) | st.just({"name": "look"}),
    "response_format": st.sampled_from([{"type": "text"}, {"type": "json_object"}, {"type": "x"}]),
}
completion = {
    "prompt": prompt,
    "logprobs": st.integers(-1, 21),
    "echo": st.booleans(),
    "best_of": st.integers(-1, 3),
    "suffix": text | st.none(),
}
flags = {"add_special_tokens": st.booleans(), "return_token_strs": st.booleans()}
ENDPOINTS: Mapping[str, tuple[str, Mapping[str, st.SearchStrategy[Any]]]] = {
    "/v1/chat/completions": ("messages", sampled | chat),
    "/v1/completions": ("prompt", sampled | completion),
    "/tokenize": ("prompt", {"prompt": text, "messages": chat["messages"], "model": sampled["model"], **flags}),
    "/detokenize": ("tokens", {"tokens": st.lists(st.integers(-1, 260), max_size=8), "model": sampled["model"]}),
}
"""Of each endpoint that takes a body, its required field, and all its fields with values near its rules."""


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, bytes]:
    """A path and a body: near the rules, with fields of any kind, or with bytes changed."""
    path = draw(st.sampled_from(sorted(ENDPOINTS)))
    required, near = ENDPOINTS[path]
    body: Any = draw(
        st.fixed_dictionaries(
            {required: near[required]}, optional={name: one for name, one in near.items() if name != required}
        )
    )
    for name in draw(st.lists(st.sampled_from([*near, "unknown"]), max_size=2)):
        body[name] = draw(anything)
    body = draw(st.just(body) | st.just(body) | st.just(body) | anything)
    written = bytearray(json.dumps(body).encode())
    for _ in range(draw(st.sampled_from([0, 0, 0, 0, 1, 2]))):
        place = draw(st.integers(0, len(written) - 1)) if written else 0
        if draw(st.booleans()):
            del written[place:]
        else:
            written[place : place + 1] = draw(st.binary(max_size=3))
    return path, bytes(written)


def _head(path: str, *lines: str, method: str = "POST", version: str = "HTTP/1.1") -> bytes:
    own = () if "Connection: " in " ".join(lines) else ("Connection: close",)
    named = ("Host: localhost", "Content-Type: application/json", *own, *lines)
    return "\r\n".join([f"{method} {path} {version}", *named, "", ""]).encode("latin-1")


def _post(body: bytes, path: str = "/v1/completions", *lines: str) -> bytes:
    return _head(path, f"Content-Length: {len(body)}", *lines) + body


KEPT = "Connection: keep-alive"
GOOD = b'{"prompt":"a","max_tokens":1}'
CHUNKED = _head("/v1/completions", "Transfer-Encoding: chunked")
BROKEN: Mapping[str, bytes] = {
    "nothing": b"",
    "one byte": b"P",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20,
    "text": b"hello, is anybody there?\r\n\r\n",
    "half a head": b"POST /v1/completions HTTP/1.1\r\nHost: loc",
    "no Host": b"GET /v1/models HTTP/1.1\r\n\r\n",
    "two Hosts": b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    "a Host of brackets": b"GET /v1/models HTTP/1.1\r\nHost: [::\r\n\r\n",
    "a header without a colon": b"GET /health HTTP/1.1\r\nHost: localhost\r\nbroken\r\n\r\n",
    "a header of bytes": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: \xff\xfe\x80\r\n\r\n",
    "a header with a zero": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n",
    "a huge header": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 2**21,
    "many headers": b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: a\r\n" * 200_000,
    "a huge path": b"GET /" + b"a" * 2**21,
    "a path of bytes": b"GET /v1/models/%ff%fe%00%ed%a0%80 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    "a path up": b"GET /v1/streams/..%2f..%2fetc%2fpasswd HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    "HTTP/1.0": b"GET /health HTTP/1.0\r\n\r\n",
    "HTTP/1.0 with a Host": b"GET /health HTTP/1.0\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    "HTTP/0.9": b"GET /health\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/9.9": _head("/health", method="GET", version="HTTP/9.9"),
    "an upgrade": _head("/", "Connection: Upgrade", "Upgrade: websocket", method="GET"),
    "a wrong method": _head("/v1/completions", method="DELETE"),
    "a made up method": _head("/v1/completions", method="BREW"),
    "a long method": _head("/", method="A" * 5000),
    "OPTIONS": _head("*", method="OPTIONS"),
    "CONNECT": _head("localhost:22", method="CONNECT"),
    "an absolute target": _head("http://localhost/health", method="GET"),
    "a negative length": _head("/v1/completions", "Content-Length: -5"),
    "a length that is no number": _head("/v1/completions", "Content-Length: five"),
    "two lengths": _head("/v1/completions", "Content-Length: 5", "Content-Length: 6") + b"abcdef",
    "a length and chunks": _head("/v1/completions", "Content-Length: 5", "Transfer-Encoding: chunked") + b"0\r\n\r\n",
    "no length": _head("/v1/completions") + GOOD,
    "half a body": _head("/v1/completions", "Content-Length: 100") + GOOD,
    "a body that is too large": _post(b"[" * 1_000_001),
    "ten million bytes": _post(b" " * 10_000_000),
    "a length of a terabyte": _head("/v1/completions", f"Content-Length: {2**40}") + b"x" * 1000,
    "chunks": CHUNKED + b"%x\r\n%s\r\n0\r\n\r\n" % (len(GOOD), GOOD),
    "a chunk of nonsense": CHUNKED + b"zz\r\nabc\r\n0\r\n\r\n",
    "a nonsense chunk after a refused body": CHUNKED + b"f4241\r\n" + b"[" * 1_000_001 + b"\r\nzz\r\n",
    "a huge chunk length": CHUNKED + b"f" * 100 + b"\r\n",
    "half a chunk": CHUNKED + b"ff\r\nabc",
    "trailers": CHUNKED + b"%x\r\n%s\r\n0\r\nX: y\r\n\r\n" % (len(GOOD), GOOD),
    "an unknown transfer": _head("/v1/completions", "Transfer-Encoding: gzip"),
    "100-continue": _post(GOOD, "/v1/completions", "Expect: 100-continue"),
    "pipelined": _post(GOOD, "/v1/completions", KEPT) * 3 + _head("/health", method="GET"),
    "pipelined nonsense": _post(GOOD, "/v1/completions", KEPT) + b"\x00\x01\x02 nonsense\r\n\r\n",
    "no JSON": _post(b"{" * 10),
    "JSON that is no object": _post(b"[1, 2]"),
    "an empty body": _post(b""),
    "no UTF-8": _post(b'{"prompt":"\xff\xfe"}'),
    "UTF-16": _post('{"prompt":"a"}'.encode("utf-16")),
    "a byte order mark": _post(b"\xef\xbb\xbf" + GOOD),
    "half a surrogate pair": _post(b'{"prompt":"\\ud800","model":"\\udfff"}'),
    "half a pair in a key": _post(b'{"prompt":"a","logit_bias":{"\\ud800":1},"\\udfff":1,"stream":true}'),
    "NaN": _post(b'{"prompt":"a","temperature":NaN}'),
    "infinity": _post(b'{"prompt":"a","temperature":1e999,"max_tokens":1e999}'),
    "infinity unread": _post(b'{"prompt":"a","x":1e999,"stream":true,"max_tokens":1}'),
    "a number of 10,000 digits": _post(b'{"prompt":"a","seed":' + b"9" * 10_000 + b"}"),
    "a number of 4,000 digits": _post(b'{"prompt":"a","top_k":' + b"9" * 4000 + b"}"),
    **{
        f"{kind} nested {levels} deep": _post(b'{"prompt":"a","stream":true,"%s":%s}' % (name, nested))
        for levels in (100, 127, 128, 129, *range(944, 952), 100_000)
        for kind, name in (("unread", b"x"), ("read", b"stop"))
        for nested in (b"[" * levels + b"]" * levels,)
    },
    "a wrong type": _head("/v1/completions", "Content-Length: 2").replace(b"application/json", b"text/plain") + b"{}",
    "a type of bytes": _head("/tokenize", "Content-Length: 2").replace(b"application/json", b"\xff/\xfe") + b"{}",
    "a key of bytes": _post(GOOD, "/v1/completions", "Authorization: Bearer \xff\xfe"),
    "a position of nonsense": _head("/v1/streams/cmpl-" + "0" * 32, "Last-Event-ID: \xff-9", method="GET"),
    "an origin of nonsense": _post(GOOD, "/v1/completions", "Origin: \xff://"),
}  # fmt: skip
"""Bytes that a client may send on a new connection, by what is wrong with them."""


@dataclass
class Fuzzed:
    """What became of the requests."""

    requests: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    """Replies that must not be: a 5xx other than 503, an error that is no error document, a broken stream."""
    growth_bytes: int = 0
    """Of the server's memory, after the warm-up."""
    traceback: str = ""
    """In its log."""
    is_same_after: bool = False
    """Whether the server gives the same text afterwards as before."""

    @property
    def is_harmless(self) -> bool:
        quiet = not self.faults and not self.traceback
        return quiet and self.is_same_after and self.growth_bytes <= MOST_GROWTH_BYTES


class Fuzzer:
    """Sends requests to one server, and notes what became of them."""

    def __init__(self, server: Role) -> None:
        self._server = server
        kept = httpx.Limits(keepalive_expiry=IDLE_SECONDS / 5)  # the server must not close one that is in use
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=ANSWER_SECONDS, limits=kept)
        self._process = psutil.Process(server.process.pid)
        self._judging = threading.Lock()
        self.found = Fuzzed()

    def fuzz(self, count: int, number: int) -> Fuzzed:
        """All broken requests, and `count` random bodies; the same ones for the same `number`, in any order."""
        before = self.known_text()
        self.largest()
        self.bodies(WARM_UP, number + 1)
        self.broken()
        warm = self._process.memory_info().rss
        self.bodies(count, number)
        self.broken()
        self.found.is_same_after = before == self.known_text()
        self.found.growth_bytes = max(0, self._process.memory_info().rss - warm)
        log = self._server.stderr()
        self.found.traceback = log[log.index("Traceback") :][:5000] if "Traceback" in log else ""
        return self.found

    def largest(self) -> None:
        """The largest requests from every sender at once: caches and buffers get the size that they keep."""
        chat = {"messages": [{"role": "user", "content": "y" * 200}], **LARGEST, "logprobs": True, "top_logprobs": 20}
        bodies = [
            ("/v1/completions", {"prompt": "x" * 200, "echo": True, **LARGEST}),
            ("/v1/chat/completions", chat),
            ("/v1/chat/completions", chat | {"response_format": {"type": "json_object"}}),
        ]
        with ThreadPoolExecutor(CLIENTS) as pool:
            for path, body in bodies:
                asked = [pool.submit(self._http.post, path, json=body | {"seed": seed}) for seed in range(3 * CLIENTS)]
                assert {one.result().status_code for one in asked} <= {200, 429}

    def known_text(self) -> str:
        reply = self._http.post("/v1/completions", json=KNOWN)
        assert reply.status_code == 200, reply.text
        return str(reply.json()["choices"][0]["text"])

    def bodies(self, count: int, number: int) -> None:
        """Random bodies for the endpoints, from several senders."""
        with ThreadPoolExecutor(CLIENTS) as pool:
            seeds = range(number * CLIENTS, (number + 1) * CLIENTS)
            list(pool.map(lambda one: self._bodies(count // CLIENTS, one), seeds))

    def _bodies(self, count: int, number: int) -> None:
        """Random bodies from one sender."""

        @seed(number)
        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(requests())
        def send(request: tuple[str, bytes]) -> None:
            path, body = request
            what = f"{path} {body[:300]!r}"
            try:
                reply = self._http.post(path, content=body, headers={"Content-Type": "application/json"})
            except httpx.TransportError as error:
                self.lost(f"{what}: {error!r}")
            else:
                self.judge(what, reply.status_code, reply.content)

        send()

    def lost(self, fault: str) -> None:
        """Note a request without a reply."""
        with self._judging:
            self.found.requests += 1
            self.found.faults.append(fault)

    def judge(self, what: str, status: int, body: bytes) -> None:
        """Note one reply."""
        with self._judging:
            self.found.requests += 1
            self.found.statuses[status] += 1
        if status >= 500 and status != 503:
            self.found.faults.append(f"{what}: {status}")
        elif status >= 400:
            if not _is_error(body):
                self.found.faults.append(f"{what}: {status} {body[:200]!r}")
        elif body.startswith((b"id:", b"data:", b":")):
            events = [line[6:] for line in body.split(b"\n") if line.startswith(b"data: ")]
            if not events or events[-1] != b"[DONE]" or any(_is_error(event) for event in events[:-1]):
                self.found.faults.append(f"{what}: the stream ended as {body[-300:]!r}")

    def broken(self) -> None:
        """Each of `BROKEN`, on a connection of its own, several concurrently."""
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            for name, reply in zip(BROKEN, pool.map(self.exchange, BROKEN.values()), strict=True):
                head, _, rest = reply.partition(b"\r\n\r\n")
                if head.startswith(b"HTTP/1.1 100"):
                    head, _, rest = rest.partition(b"\r\n\r\n")
                if not head:
                    self.found.requests += 1  # the connection was closed, or reset while it sent
                elif head.startswith(b"HTTP/1.1 2"):
                    self.judge(name, 200, b"")
                else:
                    length = re.search(rb"content-length: (\d+)", head.lower())
                    self.judge(name, int(head.split()[1]), rest[: int(length[1])] if length else rest)

    def exchange(self, data: bytes) -> bytes:
        """All that the server sends until it closes the connection, which it must."""
        with socket.create_connection(("127.0.0.1", self._server.port), timeout=ANSWER_SECONDS) as peer:
            found = b""
            try:
                peer.sendall(data)
                if data.endswith(b"}") or not data:
                    peer.shutdown(socket.SHUT_WR)
                while piece := peer.recv(2**16):
                    found += piece
            except (ConnectionResetError, BrokenPipeError):
                pass
            return found

    def drip(self, begun: bytes, rest: bytes, seconds: float) -> bool:
        """Send `begun`, then a byte now and then; whether the server closed the connection within `seconds`."""
        with socket.create_connection(("127.0.0.1", self._server.port), timeout=ANSWER_SECONDS) as peer:
            end = time.monotonic() + seconds
            try:
                peer.sendall(begun)
                for byte in rest:
                    if time.monotonic() > end:
                        return False
                    peer.sendall(bytes([byte]))
                    time.sleep(REQUEST_SECONDS / 20)
                return not peer.recv(1)
            except (ConnectionResetError, BrokenPipeError):
                return True


def _is_error(body: bytes) -> bool:
    """Whether it is an error as clients read them."""
    try:
        error = json.loads(body)["error"]
        return isinstance(error["message"], str) and error.keys() == {"message", "type", "param", "code"}
    except (ValueError, LookupError, TypeError):
        return False
