"""Round-trip time and liveness of one connection. Knows no clock and no socket: times are arguments."""

from lab.wire.endpoint import Deadlines
from lab.wire.frames import Ping

SMOOTHING = 1 / 8  # RFC 6298


class Heartbeat:
    """Times of PINGs, round trips, and the death of a peer. All times are in seconds of one monotonic clock."""

    def __init__(self, deadlines: Deadlines, now: float) -> None:
        self._deadlines = deadlines
        self._heard = now
        self._looked = now
        self._next_ping = now
        self._number = 0
        self._outstanding: dict[int, float] = {}
        self.rtt_seconds: float | None = None
        """Smoothed round-trip time; None before the first PONG."""

    def heard(self, now: float) -> None:
        """Note that bytes arrived, whatever they are: a peer that sends is alive."""
        self._heard = now

    def silent_seconds(self, now: float) -> float:
        """Return the time since the last byte."""
        return now - self._heard

    def is_dead(self, now: float) -> bool:
        """Return whether the peer has been silent for too long.

        Silence counts only while we listen: after a pause of ours (a laptop that slept) it starts again.
        """
        if now - self._looked > 2 * self._deadlines.ping_seconds:
            self._heard = now
        self._looked = now
        return self.silent_seconds(now) >= self._deadlines.dead_seconds

    def due(self, now: float) -> Ping | None:
        """Return the PING to send now, if any. It may be dropped when bytes for the peer are under way anyway."""
        if now < self._next_ping:
            return None
        self._next_ping = now + self._deadlines.ping_seconds
        self._number = (self._number + 1) % 2**32
        oldest = now - self._deadlines.dead_seconds
        self._outstanding = {number: sent for number, sent in self._outstanding.items() if sent > oldest}
        self._outstanding[self._number] = now
        return Ping(number=self._number)

    def pong(self, pong: Ping, now: float) -> None:
        """Take an answer. One that answers no outstanding PING is ignored: it would falsify the round-trip time."""
        sent = self._outstanding.pop(pong.number, None)
        if sent is None:
            return
        rtt = now - sent
        self.rtt_seconds = rtt if self.rtt_seconds is None else self.rtt_seconds + SMOOTHING * (rtt - self.rtt_seconds)

    def next_event(self) -> float:
        """Return the time of the next check: the next PING or the death of the peer."""
        return min(self._next_ping, self._heard + self._deadlines.dead_seconds)
