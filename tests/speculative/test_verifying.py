"""The verifier's core, tick by tick, at a clock of our own: epochs, late guesses, room, limits, texts that are left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from lab.engine import SyntheticEngine
from lab.sampling import Sampling
from lab.words import Words
from speculative.drafting import Desync, OwnText
from speculative.drafts import RandomDrafts
from speculative.messages import Reason
from speculative.settings import Mode
from speculative.text import Ended, Outcome, TextRequest, Verdict, Waiting, prefix_hash
from speculative.verifying import Terms, Verifier
from tests.speculative.in_process import TERMS, request

ASYNC = Mode["async"]
PROMPT = [1, 2, 3]
OWNER, STRANGER = bytes(16), bytes(15) + b"x"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Core:
    """A verifier on a synthetic target, and what its texts alone would be."""

    def __init__(self, sessions: int = 4, **terms: Any) -> None:
        self.clock = Clock()
        self.ended: list[Ended] = []
        changed: Terms = replace(TERMS, **terms)
        engine = SyntheticEngine(
            vocabulary_size=50, context=400, sessions=sessions, step_seconds=0, row_seconds=0, agreement=1.0
        )
        self.verifier = Verifier(
            engine, end_ids=[], terms=changed, closed=lambda text, ended: self.ended.append(ended), clock=self.clock
        )

    def open(self, key: int, count: int = 40, mode: Mode = ASYNC, client: object = "client", **name: Any) -> None:
        assert self.verifier.open(key, asked(count, mode), client=client, **name) == []

    def offer(self, key: int, epoch: int, position: int, guesses: Sequence[int]) -> list[Outcome]:
        return self.verifier.offer(key, epoch, position, guesses, self.clock.now)

    def verdict(self) -> Verdict:
        """Of the one text there is."""
        [outcome] = self.verifier.tick()
        assert isinstance(outcome, Verdict)
        return outcome


def asked(count: int = 40, mode: Mode = ASYNC) -> TextRequest:
    return request(PROMPT, count, Sampling.greedy(), mode, length=8)


def own_text(count: int = 40) -> list[int]:
    core = Core()
    core.open(0, count, Mode.target_only)
    ids: list[int] = []
    while len(ids) < count:
        for outcome in core.verifier.tick():
            if isinstance(outcome, Verdict):
                ids += outcome.ids
    return ids


TEXT = own_text()


def test_a_verifier_goes_on_alone_while_no_guess_has_come() -> None:
    core = Core()
    core.open(1)
    for index in range(3):
        verdict = core.verdict()
        assert (verdict.position, verdict.accepted, verdict.ids) == (3 + index, 0, [TEXT[index]])
        assert verdict.prefix == prefix_hash([*PROMPT, *TEXT[: index + 1]])


def test_guesses_wait_in_order_and_are_taken_in_passes() -> None:
    core = Core(longest_check=4)
    core.open(1)
    core.offer(1, 0, 3, TEXT[:4])
    core.offer(1, 0, 7, TEXT[4:7])  # a second frame, under way at the same time
    first = core.verdict()  # the prompt's last row: its token is the first guess
    assert (first.position, first.accepted, first.ids, first.epoch) == (3, 1, [], 0)
    second = core.verdict()
    assert (second.position, second.accepted, second.ids) == (4, 5, [])  # four checked, and the fifth agrees
    third = core.verdict()
    assert (third.position, third.accepted, third.ids) == (9, 1, [TEXT[7]])


def test_late_guesses_that_agree_are_as_good_as_ever() -> None:
    core = Core()
    core.open(1)
    for _ in range(3):
        core.verdict()
    assert core.offer(1, 0, 3, TEXT[:6]) == []  # three of six have been decided meanwhile
    verdict = core.verdict()
    assert (verdict.epoch, verdict.position, verdict.accepted, verdict.ids) == (0, 6, 3, [TEXT[6]])


def test_a_late_guess_that_differs_ends_the_epoch() -> None:
    core = Core()
    core.open(1)
    for _ in range(3):
        core.verdict()
    wrong = [TEXT[0], (TEXT[1] + 1) % 50]
    core.offer(1, 0, 3, [*wrong, *TEXT[2:9]])
    core.offer(1, 0, 12, TEXT[9:12])  # of the epoch that is over
    verdict = core.verdict()
    assert (verdict.epoch, verdict.accepted, verdict.ids) == (1, 0, [TEXT[3]])
    core.offer(1, 1, 6, TEXT[3:6])  # the drafter knows of the third token only
    assert core.verdict().accepted == 2


def test_an_answer_to_a_late_wrong_guess_is_timed_from_the_verdict_that_told_of_it() -> None:
    """The guess had come in the middle of the pass, and was looked at behind it."""
    core = Core()
    core.open(1)
    core.clock.now += 0.04
    core.verdict()
    core.verifier.offer(1, 0, 3, [(TEXT[0] + 1) % 50], core.clock.now - 0.035)
    core.verifier.offer(1, 1, 4, [TEXT[1]], core.clock.now + 0.005)
    pacing = core.verifier._running[1]._pacing
    assert pacing._answer.value == pytest.approx(0.005)


def test_a_wrong_guess_in_a_pass_ends_the_epoch_and_what_waits_behind_it() -> None:
    core = Core()
    core.open(1)
    core.verdict()
    core.offer(1, 0, 4, [TEXT[1], (TEXT[2] + 1) % 50, *TEXT[3:8]])
    verdict = core.verdict()
    assert (verdict.epoch, verdict.accepted, verdict.ids) == (1, 1, [TEXT[2]])
    assert core.verdict().accepted == 0


@pytest.mark.parametrize(
    ("epoch", "position", "guesses"),
    [(1, 3, [1]), (0, 2, [1]), (0, 5, [1]), (0, 3, [1] * 65)],
    ids=["epoch", "before", "gap", "window"],
)
def test_guesses_that_have_no_place_close_the_text(epoch: int, position: int, guesses: list[int]) -> None:
    core = Core()
    core.open(1)
    [ended] = core.offer(1, epoch, position, guesses)
    assert isinstance(ended, Ended)
    assert ended.reason is Reason.failed


def test_texts_wait_in_line_and_clients_with_fewer_running_come_first() -> None:
    core = Core(sessions=2)
    core.open(1, 3, client="greedy")
    core.open(2, 9, client="greedy")
    assert core.verifier.open(3, asked(9), client="greedy") == [Waiting(3, 1)]
    assert core.verifier.open(4, asked(9), client="modest") == [Waiting(4, 1)]
    keys = [{outcome.key for outcome in core.verifier.tick() if isinstance(outcome, Verdict)} for _ in range(4)]
    assert keys == [{1, 2}, {1, 2}, {1, 2}, {2, 4}]


def test_a_text_that_is_left_rests_and_gives_its_room_away() -> None:
    core = Core(sessions=1)
    core.open(1, name=7, owner=OWNER)
    core.verdict()
    core.verifier.leave(1)
    assert core.verifier.patience() > 1
    assert core.verifier.tick() == [], "nobody reads it"
    core.open(2, 2)
    assert {outcome.key for outcome in core.verifier.tick()} == {2}
    [told, waiting] = core.verifier.resume(3, asked(), client="client", name=7, owner=OWNER)
    assert isinstance(told, Verdict)
    assert told.ids == TEXT[:1]
    assert waiting == Waiting(3, 1)
    assert {outcome.key for outcome in core.verifier.tick()} == {2}
    assert core.verdict().ids == [TEXT[1]]


def test_a_text_that_is_resumed_before_anybody_wants_its_room_still_has_it() -> None:
    core = Core(sessions=1)
    core.open(1, name=7, owner=OWNER)
    core.verdict()
    session = core.verifier._running[1].session
    core.verifier.leave(1)
    core.verifier.resume(2, asked(), client="client", name=7, owner=OWNER)
    assert core.verifier._running[2].session is session
    assert core.verdict().ids == [TEXT[1]]


def test_a_text_that_is_left_is_forgotten_after_a_while() -> None:
    core = Core(keep_seconds=5.0)
    core.open(1, name=7, owner=OWNER)
    core.verifier.leave(1)
    core.clock.now += 4.9
    core.verifier.tick()
    assert core.ended == []
    core.clock.now += 0.2
    core.verifier.tick()
    assert [ended.reason for ended in core.ended] == [Reason.left]
    assert core.verifier.patience() == float("inf")


def test_a_finished_text_is_told_again_to_its_owner_until_it_has_arrived() -> None:
    core = Core()
    core.open(1, 2, name=7, owner=OWNER)
    core.verifier.tick()
    core.verifier.tick()
    told, ended = core.verifier.resume(2, asked(2), client="client", name=7, owner=OWNER)
    assert isinstance(told, Verdict)
    assert (told.position, told.ids) == (3, TEXT[:2])
    assert isinstance(ended, Ended)
    assert (ended.key, ended.reason) == (2, Reason.length)
    core.verifier.close(2)  # it has arrived
    [told] = core.verifier.resume(3, asked(2), client="client", name=7, owner=OWNER)
    assert isinstance(told, Verdict)
    assert told.ids == [], "it was begun anew"


def test_a_text_is_resumed_by_its_owner_only_and_as_it_is() -> None:
    core = Core()
    core.open(1, name=7, owner=OWNER)
    core.verdict()

    def refusal(owner: bytes, changed: TextRequest) -> str:
        [ended] = core.verifier.resume(2, changed, client="other", name=7, owner=owner)
        assert isinstance(ended, Ended)
        assert ended.reason is Reason.refused
        return ended.text

    assert refusal(STRANGER, asked()) == "text 0000000000000007 must be resumed by who opened it"
    for changed in (
        replace(asked(), max_new_tokens=41),
        replace(asked(), sampling=Sampling(seed=1, temperature=1, top_k=0, top_p=1)),
        replace(asked(), sampling=replace(asked().sampling, words=Words(prompt_tokens=3, presence_penalty=1.0))),
        replace(asked(), prompt_ids=[1, 2, 4]),
        replace(asked(), new_ids=[(TEXT[0] + 1) % 50]),
    ):
        assert refusal(OWNER, changed) == "text 0000000000000007 must be resumed with its own prompt and settings"
    assert core.verdict().ids == [TEXT[1]], "its owner was disturbed"


def test_resume_takes_a_text_over_from_a_connection_that_still_seems_to_live() -> None:
    core = Core()
    core.open(1, name=7, owner=OWNER)
    core.offer(1, 0, 3, [(TEXT[0] + 1) % 50])
    core.verdict()
    left, told = core.verifier.resume(2, replace(asked(), new_ids=TEXT[:1]), client="client", name=7, owner=OWNER)
    assert (left.key, isinstance(left, Ended)) == (1, True)
    assert isinstance(told, Verdict)
    assert (told.key, told.epoch, told.position, told.ids) == (2, 0, 4, [])
    assert core.offer(1, 1, 4, [1]) == [], "the old connection has no text any more"
    core.offer(2, 0, 4, TEXT[1:3])
    verdict = core.verdict()
    assert (verdict.key, verdict.epoch, verdict.accepted, verdict.ids) == (2, 0, 2, [TEXT[3]])


def test_a_verifier_that_was_started_anew_gets_the_text_from_its_drafter() -> None:
    core = Core()
    [told] = core.verifier.resume(1, replace(asked(), new_ids=TEXT[:5]), client="client", name=7, owner=OWNER)
    assert isinstance(told, Verdict)
    assert (told.position, told.ids) == (8, [])
    ids = list(TEXT[:5])
    while len(ids) < 40:
        ids += [token for outcome in core.verifier.tick() if isinstance(outcome, Verdict) for token in outcome.ids]
    assert ids == TEXT


def test_what_a_client_may_take() -> None:
    core = Core(client_texts=2, client_cache_bytes=1000, bytes_per_token=10)
    core.open(1, 40)
    core.open(2, 40)
    [ended] = core.verifier.open(3, asked(2), client="client")
    assert isinstance(ended, Ended)
    assert ended.text == "a client may have 2 texts at once (the verifier's project.client.texts)"
    core.verifier.close(2)
    [ended] = core.verifier.open(4, asked(60), client="client")
    assert isinstance(ended, Ended)
    assert ended.text == (
        "project.max_new_tokens must be at most 54 here for a prompt of 3 tokens (a client's texts may need 1000 bytes "
        "of keys and values, its project.client.cache_bytes, and 43 tokens are taken), got 60"
    )
    core.open(5, 60, client="another")


def test_a_text_of_mode_sync_that_gets_no_draft_is_evicted() -> None:
    core = Core(idle_seconds=30.0)
    core.open(1, mode=Mode.sync)
    core.verifier.tick()
    assert core.verifier.patience() == pytest.approx(30.0)
    core.clock.now += 29
    core.offer(1, 0, 3, [])
    core.verdict()
    core.clock.now += 29
    assert core.verifier.tick() == []
    core.clock.now += 2
    [ended] = core.verifier.tick()
    assert isinstance(ended, Ended)
    assert (ended.reason, ended.text) == (Reason.evicted, "no DRAFT came for 30 s")


def test_a_drafter_that_holds_another_text_notices() -> None:
    text = OwnText(asked(), RandomDrafts(0, 50))
    right = Verdict(1, 0, 3, 0, TEXT[:1], prefix_hash([*PROMPT, TEXT[0]]), [], [])
    text.take(right)
    with pytest.raises(Desync, match="position 5"):
        text.take(replace(right, position=4, ids=TEXT[1:2], prefix=right.prefix))
    assert text.new_ids == TEXT[:1], "it took none of what it does not believe"
    with pytest.raises(Desync, match="for position 3"):
        OwnText(replace(asked(), new_ids=TEXT[:1]), RandomDrafts(0, 50)).take(right)


def test_own_guesses_fill_in_and_change_nothing() -> None:
    engine_text = [4, 5, 6, 7]
    core = Core(lookup=(3, 1))
    prompt = [*engine_text, *TEXT, *engine_text]  # what follows stands in the prompt only by chance
    assert core.verifier.open(1, replace(asked(), prompt_ids=prompt), client="client") == []
    alone = Core()
    assert alone.verifier.open(1, replace(asked(), prompt_ids=prompt), client="client") == []

    def whole(verifier: Verifier) -> list[int]:
        ids: list[int] = []
        while len(ids) < 40:
            ids += [token for outcome in verifier.tick() if isinstance(outcome, Verdict) for token in outcome.ids]
        return ids

    assert whole(core.verifier) == whole(alone.verifier)
