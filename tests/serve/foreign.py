"""Servers that are not ours: one that speaks the bare protocol, and a connection that is held or broken midway."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[2] / "serve" / "page.html"


@dataclass
class Foreign:
    """What a foreign server answers, and what it was asked."""

    url: str = ""
    pieces: list[str] = field(default_factory=lambda: ["Hello", " there"])
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)


@contextmanager
def foreign_server() -> Iterator[Foreign]:
    """A server with chat completions as streams, without anything that only ours has; it also serves our page."""
    about = Foreign()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/":
                self._answer("text/html", PAGE.read_bytes())
            elif self.path == "/v1/models":
                self._answer("application/json", b'{"object": "list", "data": [{"id": "theirs", "object": "model"}]}')
            else:
                self.send_error(404)

        def do_POST(self) -> None:
            about.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            about.keys.append(self.headers["Authorization"])
            deltas = [{"delta": {"content": piece}, "finish_reason": None} for piece in about.pieces]
            choices = [*deltas, {"delta": {}, "finish_reason": "stop"}]
            chunks = [{"id": "x", "model": "theirs", "choices": [{"index": 0, **one}]} for one in choices]
            lines = [f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n" for chunk in chunks]
            self._answer("text/event-stream", "".join([*lines, "data: [DONE]\n\n"]).encode())

        def _answer(self, kind: str, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    about.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield about
    finally:
        server.shutdown()
        server.server_close()


class Relay:
    """A relay before a server. Of a stream of events it passes on so many, then waits for `release` or `cut`."""

    def __init__(self, port: int) -> None:
        self._to = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._go = threading.Event()
        self._most: int | None = None
        self._open: list[socket.socket] = []
        self.streams = 0
        """Streams that were begun through it."""
        self.is_holding = False
        threading.Thread(target=self._accept, daemon=True).start()

    def hold(self, events: int) -> None:
        """Hold the next stream after so many events."""
        self._go.clear()
        self._most = events

    def release(self) -> None:
        """Pass on all that was held."""
        self._most = None
        self._go.set()

    def cut(self) -> None:
        """End all connections. Later ones are passed on."""
        self._most = None
        held, self._open = self._open, []
        for one in held:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self._go.set()

    def close(self) -> None:
        self.cut()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self._listener.accept()[0]
                server = socket.create_connection(self._to)
                self._open += [client, server]
                self._start(client, server, lambda data: data)
                self._start(server, client, self._counting())

    def _start(self, source: socket.socket, to: socket.socket, pass_on: Callable[[bytes], bytes]) -> None:
        def work() -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(2**16):
                    to.sendall(pass_on(data))
            for one in (source, to):
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

        threading.Thread(target=work, daemon=True).start()

    def _counting(self) -> Callable[[bytes], bytes]:
        count = 0

        def pass_on(data: bytes) -> bytes:
            nonlocal count
            if data.startswith(b"HTTP/1.1 "):  # connections are kept for further requests
                self.streams += b"text/event-stream" in data
                count = 0
            count += data.count(b"data: {")
            if self._most is not None and count >= self._most:
                self.is_holding = True
                self._go.wait(60)
                self.is_holding = False
            return data

        return pass_on
