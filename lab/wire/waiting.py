"""Waiting for one socket, for at most so long, on every system."""

import select
import socket


def can_read(waited_for: socket.socket, timeout_seconds: float) -> bool:
    """Wait until there is something to read (or an end to see); return whether there is."""
    return _wait(waited_for, timeout_seconds, writing=False)


def can_write(waited_for: socket.socket, timeout_seconds: float) -> bool:
    """Wait until something can be written (or an end be seen); return whether it can."""
    return _wait(waited_for, timeout_seconds, writing=True)


def _wait(waited_for: socket.socket, timeout_seconds: float, *, writing: bool) -> bool:
    seconds = min(
        timeout_seconds, 3600.0
    )  # callers look at their deadline again; an infinite one is no number to pass on
    if not hasattr(select, "poll"):  # Windows
        lists = select.select([] if writing else [waited_for], [waited_for] if writing else [], [waited_for], seconds)
        return any(lists)
    poll = select.poll()
    poll.register(waited_for, select.POLLOUT if writing else select.POLLIN)
    return bool(poll.poll(seconds * 1000))
