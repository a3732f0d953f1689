"""The order in which sequences that wait get room: every client has the same share of it, and so has every user of one
client.

A client is known by what it cannot choose anew with each request, such as its connection or its address. A user is a
name that the client gives: new names get the client no more room.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Protocol, TypeVar


class Member(Protocol):
    """A sequence that waits or runs."""

    client: Hashable
    user: str
    """Whose it is within the client; empty: not said."""


Waiting = TypeVar("Waiting", bound=Member)


def in_turn(line: Sequence[Waiting], running: Iterable[Member]) -> list[Waiting]:
    """The line in the order in which room is given.

    A client's next sequence is its user's with the fewest sequences that run or come before; the next client is the one
    with the fewest. The order of arrival decides between equals.
    """
    running = list(running)
    by_user = _by_turns(line, line, running, lambda one: (one.client, one.user))
    return _by_turns(by_user, line, running, lambda one: one.client)


def _by_turns(
    counted: Sequence[Waiting],
    line: Sequence[Waiting],
    running: Sequence[Member],
    group: Callable[[Member], Hashable],
) -> list[Waiting]:
    """The line sorted by how many sequences of the same group run or come before in `counted`."""
    ahead = Counter(map(group, running))
    turns: dict[int, int] = {}
    for one in counted:
        turns[id(one)] = ahead[group(one)]
        ahead[group(one)] += 1
    return sorted(line, key=lambda one: turns[id(one)])
