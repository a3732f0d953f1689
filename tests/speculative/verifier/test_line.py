"""Who gets room next: clients have the same share of it, and so have the users of one client."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

from speculative.verifier.line import in_turn


@dataclass(eq=False)
class Text:
    client: str
    user: str = ""


def admitted(line: list[Text], places: int) -> list[Text]:
    """The texts that get room, one after the other, while none ends."""
    waiting, running = list(line), []
    for _ in range(places):
        running.append(in_turn(waiting, running)[0])
        waiting.remove(running[-1])
    return running


def test_a_new_user_in_each_request_gains_nothing() -> None:
    greedy = [Text("greedy", str(number)) for number in range(8)]
    modest = [Text("modest") for _ in range(4)]
    found = Counter(text.client for text in admitted([*greedy, *modest], 8))
    assert found == {"greedy": 4, "modest": 4}
    assert in_turn([greedy[0], modest[0]], greedy[1:3] + modest[1:2])[0] is modest[0]


def test_users_share_what_their_client_gets() -> None:
    busy = [Text("proxy", "busy") for _ in range(8)]
    late = [Text("proxy", "late") for _ in range(2)]
    other = [Text("other") for _ in range(4)]
    found = Counter((text.client, text.user) for text in admitted([*busy, *late, *other], 8))
    assert found == {("proxy", "busy"): 2, ("proxy", "late"): 2, ("other", ""): 4}


def test_equals_come_in_the_order_of_arrival() -> None:
    line = [Text(str(number)) for number in range(5)]
    assert in_turn(line, []) == line
    line = [Text("one", "same") for _ in range(5)]
    assert in_turn(line, []) == line


def test_the_whole_line_is_in_the_order_in_which_its_texts_get_room() -> None:
    chosen = random.Random(1)
    for _ in range(200):
        texts = [Text(chosen.choice("abc"), chosen.choice("xyz")) for _ in range(12)]
        running = texts[:4]
        one_by_one, waiting = list(running), texts[4:]
        while waiting:
            one_by_one.append(in_turn(waiting, one_by_one)[0])
            waiting.remove(one_by_one[-1])
        assert in_turn(texts[4:], running) == one_by_one[4:]
