"""One HTTP connection: what arrives before a request is whole is bounded in bytes and in time."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from typing_extensions import override
from uvicorn.protocols.http.h11_impl import H11Protocol

from serve.faults import RequestFault
from serve.replies import as_json

_ARRIVING = (h11.IDLE, h11.SEND_BODY)
"""States of a client that owes the rest of a request."""


def connection_class(request_seconds: float) -> type[H11Protocol]:
    """The class of a server's connections, each request of which must arrive whole within `request_seconds`."""

    class Connection(_Connection):
        """A connection with this server's limit."""

        seconds = request_seconds

    return Connection


class _Connection(H11Protocol):
    """uvicorn's protocol, which gives a request all the time that it wants. h11 bounds its head to 64 KiB; the
    routes bound its body."""

    seconds: float
    _late: asyncio.TimerHandle | None = None

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._watch()

    @override
    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    @override
    def on_response_complete(self) -> None:
        self._unwatch()  # from now on uvicorn waits for the next request
        super().on_response_complete()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    @override
    def send_400_response(self, msg: str) -> None:
        self._refuse(RequestFault(400, "the request must be HTTP/1.1: it cannot be read as that"))

    def _watch(self) -> None:
        if self.conn.their_state not in _ARRIVING:
            self._unwatch()
        elif self._late is None:
            self._late = self.loop.call_later(self.seconds, self._end)

    def _unwatch(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _end(self) -> None:
        self._late = None
        if self.conn.their_state in _ARRIVING and not self.transport.is_closing():
            rule = f"a request must arrive whole within {self.seconds:g} s (project.request_seconds)"
            self._refuse(RequestFault(408, rule))

    def _refuse(self, fault: RequestFault) -> None:
        """Answer, unless an answer has begun, and close; a request that runs learns that its client is gone."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = as_json(fault.body).encode()
            headers = [
                ("Content-Type", "application/json"),
                ("Content-Length", str(len(body))),
                ("Connection", "close"),
            ]
            events: list[Any] = [
                h11.Response(status_code=fault.status, headers=headers),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ]
            for event in events:
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()
