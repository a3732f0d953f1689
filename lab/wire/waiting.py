"""Waiting for one socket with a time limit, on every system. A closed socket counts as ready: using it raises."""

import select
import socket

_AT_MOST_SECONDS = 3600.0  # callers look at their deadline again; an infinite one is no number for the system


class ReadWaiter:
    """Waits for bytes, or the end, of one socket; for one thread that waits repeatedly."""

    def __init__(self, waited_for: socket.socket) -> None:
        self._socket = waited_for
        self._poll = _registered(waited_for, writing=False)

    def wait(self, timeout_seconds: float) -> bool:
        """Return whether there is something to read within the time."""
        if self._poll is None or self._socket.fileno() < 0:
            return _wait(self._socket, timeout_seconds, writing=False)
        return bool(self._poll.poll(min(timeout_seconds, _AT_MOST_SECONDS) * 1000))


_ENDED = getattr(select, "POLLRDHUP", 0)  # Linux


def has_ended(descriptor: int) -> bool:
    """Return whether the peer has closed its end or the connection is broken, even if unread bytes come first; False on
    systems that do not report it."""
    if not _ENDED:
        return False
    poll = select.poll()
    poll.register(descriptor, _ENDED)
    return bool(poll.poll(0))


def can_write(waited_for: socket.socket, timeout_seconds: float) -> bool:
    """Wait until the socket can be written to, or has ended; return whether it can."""
    return _wait(waited_for, timeout_seconds, writing=True)


def _wait(waited_for: socket.socket, timeout_seconds: float, *, writing: bool) -> bool:
    if waited_for.fileno() < 0:
        return True
    seconds = min(timeout_seconds, _AT_MOST_SECONDS)
    poll = _registered(waited_for, writing=writing)
    if poll is not None:
        return bool(poll.poll(seconds * 1000))
    lists = select.select([] if writing else [waited_for], [waited_for] if writing else [], [waited_for], seconds)
    return any(lists)


def _registered(waited_for: socket.socket, *, writing: bool) -> "select.poll | None":
    if not hasattr(select, "poll"):  # Windows
        return None
    poll = select.poll()
    poll.register(waited_for, select.POLLOUT if writing else select.POLLIN)
    return poll
