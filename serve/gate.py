"""Who may come in: the key, the names of this machine, pages of other sites; and a number for each request."""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from serve.faults import RETRY_SECONDS, RequestFault
from serve.replies import as_json

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = ("/", "/health")
"""Served without a key: a page that asks for the key, and whether the server is ready."""
_NUMBER = re.compile(rb"[!-~]{1,128}\Z")
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


class Gate:
    """ASGI middleware around the app.

    Args:
        app: What is behind it.
        key: The shared key; empty: none is asked for, and only names of this machine are served, so that a page of
            another site cannot reach a server on loopback by a name of its own (DNS rebinding).
        host: The interface that the server listens on.
        origins: Web pages that may call it.
        most: Most requests at a time.
    """

    def __init__(self, app: App, *, key: bytes, host: str, origins: Sequence[str], most: int) -> None:
        self._app, self._key, self._origins = app, key, frozenset(origins)
        self._most, self._count = most, 0
        self.is_loading = True
        """Whether there is no model yet."""
        self._names = {*LOOPBACK_NAMES, host.strip("[]").lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", b"")
        own_number = given if _NUMBER.match(given) else secrets.token_hex(8).encode()
        origin = headers.get(b"origin", b"").decode("latin-1")
        asked = headers.get(b"access-control-request-headers", b"")
        added = [(b"x-request-id", own_number), *self._for_page(origin, asked)]

        async def send_more(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            await send(message)

        if scope["method"] == "OPTIONS" and origin in self._origins:
            await _answer(send_more, 204, [], b"")
            return
        fault = self._refusal(str(scope["path"]), str(scope["method"]), headers, origin)
        if fault is not None:
            named = [(name.lower().encode(), value.encode()) for name, value in fault.headers.items()]
            document = as_json(fault.body).encode()
            await _answer(send_more, fault.status, [(b"content-type", b"application/json"), *named], document)
            return
        self._count += 1
        try:
            await self._app(scope, receive, send_more)
        finally:
            self._count -= 1

    def _refusal(self, path: str, method: str, headers: dict[bytes, bytes], origin: str) -> RequestFault | None:
        if not self._key:
            name = _host_name(headers.get(b"host", b"").decode("latin-1"))
            if name not in self._names:
                rule = "Host must be a name of this machine for a server without a key"
                return RequestFault(403, f"{rule}, got {name[:100]!r}")
        elif path not in OPEN_PATHS:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._key):
                return RequestFault(401, "Authorization must be `Bearer` and this server's key", code="invalid_api_key")
        own = f"://{headers.get(b'host', b'').decode('latin-1')}"
        is_ours = not origin or origin.endswith(own) or origin in self._origins
        if method == "POST" and not is_ours:  # a page of another site needs no answer to do harm
            return RequestFault(403, f"Origin must be in project.cors_origins, got {origin[:100]!r}")
        if self.is_loading and path != "/":
            return RequestFault(503, "Loading model", retry_after=RETRY_SECONDS)
        if self._count >= self._most:
            rule = f"requests must be at most {self._most} at a time (project.max_connections)"
            return RequestFault(503, f"{rule}: try again later", retry_after=RETRY_SECONDS)
        return None

    def _for_page(self, origin: str, asked: bytes) -> list[tuple[bytes, bytes]]:
        if origin not in self._origins:
            return []
        return [
            (b"access-control-allow-origin", origin.encode("latin-1")),
            (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
            (b"access-control-allow-headers", asked or b"*"),  # clients send headers of their own, such as X-Stainless
            (b"access-control-expose-headers", b"retry-after, x-request-id"),
            (b"vary", b"origin"),
        ]


def _host_name(host: str) -> str:
    """The name in a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


async def _answer(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})
