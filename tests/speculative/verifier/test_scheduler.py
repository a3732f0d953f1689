"""The verifier's core, tick by tick, at a clock of our own: epochs, late guesses, room, limits, texts that are left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from lab.engine.base import Engine, Request, Session, TargetStep, Want
from lab.engine.kv import CacheFull
from lab.engine.sampling import Sampling
from lab.engine.synthetic import SyntheticEngine
from lab.text.logit_rules import LogitRules
from speculative.acceptance import prefix_hash
from speculative.drafter.loop import Desync, DraftedSequence
from speculative.drafts import RandomDrafts
from speculative.messages import Reason
from speculative.request import Ending, GenerationRequest, Outcome, Verdict, Waiting
from speculative.settings import Mode
from speculative.verifier.scheduler import EngineFailed, Scheduler, SchedulerLimits
from tests.random_models import random_model
from tests.speculative.in_process import LIMITS, local_engine, request

ASYNC = Mode["async"]
PROMPT = [1, 2, 3]
OWNER, STRANGER = bytes(16), bytes(15) + b"x"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Core:
    """A verifier on a synthetic target, and what its texts alone would be."""

    def __init__(
        self, sessions: int = 4, wrap: Callable[[Engine], Engine] = lambda engine: engine, **limits: Any
    ) -> None:
        self.clock = Clock()
        self.ended: list[Ending] = []
        changed: SchedulerLimits = replace(LIMITS, **limits)
        engine = SyntheticEngine(
            vocabulary_size=50, context=400, sessions=sessions, step_seconds=0, row_seconds=0, agreement=1.0
        )
        self.scheduler = Scheduler(
            wrap(engine),
            end_ids=[],
            limits=changed,
            closed=lambda text, ended: self.ended.append(ended),
            clock=self.clock,
        )

    def open(self, key: int, count: int = 40, mode: Mode = ASYNC, client: object = "client", **name: Any) -> None:
        assert self.scheduler.open(key, asked(count, mode), client=client, **name) == []

    def offer(self, key: int, epoch: int, position: int, guesses: Sequence[int]) -> list[Outcome]:
        return self.scheduler.offer(key, epoch, position, guesses, self.clock.now)

    def verdict(self) -> Verdict:
        """Of the one text there is."""
        [outcome] = self.scheduler.tick()
        assert isinstance(outcome, Verdict)
        return outcome


def asked(count: int = 40, mode: Mode = ASYNC) -> GenerationRequest:
    return request(PROMPT, count, Sampling.greedy(), mode, length=8)


def own_text(count: int = 40) -> list[int]:
    core = Core()
    core.open(0, count, Mode.target_only)
    ids: list[int] = []
    while len(ids) < count:
        for outcome in core.scheduler.tick():
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
    core.scheduler.offer(1, 0, 3, [(TEXT[0] + 1) % 50], core.clock.now - 0.035)
    core.scheduler.offer(1, 1, 4, [TEXT[1]], core.clock.now + 0.005)
    pacing = core.scheduler._sequences[1]._pacing
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
    assert isinstance(ended, Ending)
    assert ended.reason is Reason.failed


def test_texts_wait_in_line_and_clients_with_fewer_running_come_first() -> None:
    core = Core(sessions=2)
    core.open(1, 3, client="greedy")
    core.open(2, 9, client="greedy")
    assert core.scheduler.open(3, asked(9), client="greedy") == [Waiting(3, 1)]
    assert core.scheduler.open(4, asked(9), client="modest") == [Waiting(4, 1)]
    keys = [{outcome.key for outcome in core.scheduler.tick() if isinstance(outcome, Verdict)} for _ in range(4)]
    assert keys == [{1, 2}, {1, 2}, {1, 2}, {2, 4}]


def test_a_text_that_is_left_rests_and_gives_its_room_away() -> None:
    core = Core(sessions=1)
    core.open(1, name=7, owner=OWNER)
    core.verdict()
    core.scheduler.leave(1)
    assert core.scheduler.patience() > 1
    assert core.scheduler.tick() == [], "nobody reads it"
    core.open(2, 2)
    assert {outcome.key for outcome in core.scheduler.tick()} == {2}
    [told, waiting] = core.scheduler.resume(3, asked(), client="client", name=7, owner=OWNER)
    assert isinstance(told, Verdict)
    assert told.ids == TEXT[:1]
    assert waiting == Waiting(3, 1)
    assert {outcome.key for outcome in core.scheduler.tick()} == {2}
    assert core.verdict().ids == [TEXT[1]]


def test_a_text_that_is_resumed_before_anybody_wants_its_room_still_has_it() -> None:
    core = Core(sessions=1)
    core.open(1, name=7, owner=OWNER)
    core.verdict()
    session = core.scheduler._sequences[1].session
    core.scheduler.leave(1)
    core.scheduler.resume(2, asked(), client="client", name=7, owner=OWNER)
    assert core.scheduler._sequences[2].session is session
    assert core.verdict().ids == [TEXT[1]]


def test_a_text_that_is_left_is_forgotten_after_a_while() -> None:
    core = Core(keep_seconds=5.0)
    core.open(1, name=7, owner=OWNER)
    core.scheduler.leave(1)
    core.clock.now += 4.9
    core.scheduler.tick()
    assert core.ended == []
    core.clock.now += 0.2
    core.scheduler.tick()
    assert [ended.reason for ended in core.ended] == [Reason.left]
    assert core.scheduler.patience() == float("inf")


def test_a_finished_text_is_told_again_to_its_owner_until_it_has_arrived() -> None:
    core = Core()
    core.open(1, 2, name=7, owner=OWNER)
    core.scheduler.tick()
    core.scheduler.tick()
    told, ended = core.scheduler.resume(2, asked(2), client="client", name=7, owner=OWNER)
    assert isinstance(told, Verdict)
    assert (told.position, told.ids) == (3, TEXT[:2])
    assert isinstance(ended, Ending)
    assert (ended.key, ended.reason) == (2, Reason.length)
    core.scheduler.close(2)  # it has arrived
    [told] = core.scheduler.resume(3, asked(2), client="client", name=7, owner=OWNER)
    assert isinstance(told, Verdict)
    assert told.ids == [], "it was begun anew"


def test_a_text_is_resumed_by_its_owner_only_and_as_it_is() -> None:
    core = Core()
    core.open(1, name=7, owner=OWNER)
    core.verdict()

    def refusal(owner: bytes, changed: GenerationRequest) -> str:
        [ended] = core.scheduler.resume(2, changed, client="other", name=7, owner=owner)
        assert isinstance(ended, Ending)
        assert ended.reason is Reason.refused
        return ended.text

    assert refusal(STRANGER, asked()) == "request 0000000000000007 must be resumed by the client that opened it"
    for changed in (
        replace(asked(), max_new_tokens=41),
        replace(asked(), sampling=Sampling(seed=1, temperature=1, top_k=0, top_p=1)),
        replace(
            asked(), sampling=replace(asked().sampling, logit_rules=LogitRules(prompt_tokens=3, presence_penalty=1.0))
        ),
        replace(asked(), prompt_ids=[1, 2, 4]),
        replace(asked(), new_ids=[(TEXT[0] + 1) % 50]),
    ):
        assert refusal(OWNER, changed) == "request 0000000000000007 must be resumed with its own prompt and settings"
    assert core.verdict().ids == [TEXT[1]], "its owner was disturbed"


def test_resume_takes_a_text_over_from_a_connection_that_still_seems_to_live() -> None:
    core = Core()
    core.open(1, name=7, owner=OWNER)
    core.offer(1, 0, 3, [(TEXT[0] + 1) % 50])
    core.verdict()
    left, told = core.scheduler.resume(2, replace(asked(), new_ids=TEXT[:1]), client="client", name=7, owner=OWNER)
    assert (left.key, isinstance(left, Ending)) == (1, True)
    assert isinstance(told, Verdict)
    assert (told.key, told.epoch, told.position, told.ids) == (2, 0, 4, [])
    assert core.offer(1, 1, 4, [1]) == [], "the old connection has no text any more"
    core.offer(2, 0, 4, TEXT[1:3])
    verdict = core.verdict()
    assert (verdict.key, verdict.epoch, verdict.accepted, verdict.ids) == (2, 0, 2, [TEXT[3]])


def test_a_verifier_that_was_started_anew_gets_the_text_from_its_drafter() -> None:
    core = Core()
    [told] = core.scheduler.resume(1, replace(asked(), new_ids=TEXT[:5]), client="client", name=7, owner=OWNER)
    assert isinstance(told, Verdict)
    assert (told.position, told.ids) == (8, [])
    ids = list(TEXT[:5])
    while len(ids) < 40:
        ids += [token for outcome in core.scheduler.tick() if isinstance(outcome, Verdict) for token in outcome.ids]
    assert ids == TEXT


def test_what_a_client_may_take() -> None:
    core = Core(client_texts=2, client_cache_bytes=1000, bytes_per_token=10)
    core.open(1, 40)
    core.open(2, 40)
    [ended] = core.scheduler.open(3, asked(2), client="client")
    assert isinstance(ended, Ending)
    assert ended.text == "a client may have 2 requests at a time (the verifier's project.client.texts)"
    core.scheduler.close(2)
    [ended] = core.scheduler.open(4, asked(60), client="client")
    assert isinstance(ended, Ending)
    assert ended.text == (
        "project.max_new_tokens must be at most 54 here for a prompt of 3 tokens (a client's requests may need 1000 "
        "bytes of keys and values, its project.client.cache_bytes, and 43 tokens are taken), got 60"
    )
    core.open(5, 60, client="another")


def test_a_text_of_mode_sync_that_gets_no_draft_is_evicted() -> None:
    core = Core(idle_seconds=30.0)
    core.open(1, mode=Mode.sync)
    core.scheduler.tick()
    assert core.scheduler.patience() == pytest.approx(30.0)
    core.clock.now += 29
    core.offer(1, 0, 3, [])
    core.verdict()
    core.clock.now += 29
    assert core.scheduler.tick() == []
    core.clock.now += 2
    [ended] = core.scheduler.tick()
    assert isinstance(ended, Ending)
    assert (ended.reason, ended.text) == (Reason.evicted, "no DRAFT came for 30 s")


def test_a_drafter_that_holds_another_text_notices() -> None:
    text = DraftedSequence(asked(), RandomDrafts(0, 50))
    right = Verdict(1, 0, 3, 0, TEXT[:1], prefix_hash([*PROMPT, TEXT[0]]), [], [])
    text.extend(right)
    with pytest.raises(Desync, match="position 5"):
        text.extend(replace(right, position=4, ids=TEXT[1:2], prefix=right.prefix))
    assert text.new_ids == TEXT[:1], "it took none of what it does not believe"
    with pytest.raises(Desync, match="for position 3"):
        DraftedSequence(replace(asked(), new_ids=TEXT[:1]), RandomDrafts(0, 50)).extend(right)


def test_own_guesses_fill_in_and_change_nothing() -> None:
    engine_text = [4, 5, 6, 7]
    core = Core(lookup=(3, 1))
    prompt = [*engine_text, *TEXT, *engine_text]  # what follows stands in the prompt only by chance
    assert core.scheduler.open(1, replace(asked(), prompt_ids=prompt), client="client") == []
    alone = Core()
    assert alone.scheduler.open(1, replace(asked(), prompt_ids=prompt), client="client") == []

    def whole(scheduler: Scheduler) -> list[int]:
        ids: list[int] = []
        while len(ids) < 40:
            ids += [token for outcome in scheduler.tick() if isinstance(outcome, Verdict) for token in outcome.ids]
        return ids

    assert whole(core.scheduler) == whole(alone.scheduler)


# A fault has one owner


BAD = next(token for token in range(10, 50) if token not in TEXT)


class Stumbling:
    """An engine that fails in a pass with one id in it, where it may do half of the pass before."""

    def __init__(self, engine: Engine, error: Exception) -> None:
        self._engine, self.error = engine, error
        self.is_broken = False
        self.passes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def open(self, prompt_ids: Sequence[int], sampling: Sampling, most_tokens: int | None = None) -> Session:
        session = self._engine.open([], sampling, most_tokens)
        if prompt_ids:
            self.extend([(session, prompt_ids)], "last")
        return session

    def extend(self, requests: Sequence[Request], want: Want) -> list[TargetStep]:
        self.passes += 1
        steps: list[TargetStep] = []
        for one in requests:
            if self.is_broken or BAD in one[1]:
                raise self.error
            steps += self._engine.extend([one], want)
        return steps


FAULTS = [
    RuntimeError("CUDA out of memory.\nTried to allocate 20.00 MiB"),
    MemoryError(),
    ValueError("ids must be in [0, 49), got 49"),
    IndexError("index out of range in self"),
    CacheFull("the KV cache is full"),
    KeyError(7),
]


def whole_texts(core: Core) -> tuple[dict[object, list[int]], list[Ending]]:
    """Ticks until nothing is left to do: the new ids of each text, and how each ended."""
    texts: dict[object, list[int]] = {}
    ends: list[Ending] = []
    while core.scheduler.patience() <= 0:
        for outcome in core.scheduler.tick():
            if isinstance(outcome, Verdict):
                texts.setdefault(outcome.key, []).extend(outcome.ids)
            elif isinstance(outcome, Ending):
                ends.append(outcome)
    return texts, ends


@pytest.mark.parametrize("error", FAULTS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["prompt", "guess"])
def test_what_fails_in_a_pass_ends_its_own_text_only(error: Exception, where: str) -> None:
    core = Core(wrap=lambda engine: Stumbling(engine, error))  # type: ignore[arg-type, return-value]
    core.open(1, 20, Mode.target_only)
    core.open(2, 20, Mode.target_only)
    prompt = [4, BAD] if where == "prompt" else [4]
    assert core.scheduler.open(3, replace(asked(20), prompt_ids=prompt), client="client") == []
    if where == "guess":
        core.offer(3, 0, 1, [BAD])
    core.open(4, 20, Mode.target_only)
    texts, ends = whole_texts(core)
    assert {key: texts[key] for key in (1, 2, 4)} == dict.fromkeys((1, 2, 4), TEXT[:20])
    [failed] = [ended for ended in ends if ended.reason is not Reason.length]
    assert (failed.key, failed.reason) == (3, Reason.failed)
    assert failed.text.startswith(f"the target failed on it: {type(error).__name__}")
    assert "\n" not in failed.text


def test_an_engine_that_fails_whoever_asks_ends_the_verifier() -> None:
    stumbling: list[Stumbling] = []

    def wrap(engine: Engine) -> Engine:
        stumbling.append(Stumbling(engine, RuntimeError("no kernel\nfor this device")))
        return stumbling[0]  # type: ignore[return-value]

    core = Core(wrap=wrap)
    core.scheduler.prove()
    core.open(1, 20, Mode.target_only)
    core.verdict()
    stumbling[0].is_broken = True
    message = r"^the target cannot run a sequence of two tokens: RuntimeError: no kernel for this device$"
    with pytest.raises(EngineFailed, match=message):
        core.scheduler.tick()
    with pytest.raises(EngineFailed, match=message):
        core.scheduler.prove()


def test_an_engine_that_takes_no_text_is_found_out() -> None:
    class Refusing(Stumbling):
        def open(self, prompt_ids: Sequence[int], sampling: Sampling, most_tokens: int | None = None) -> Session:
            raise self.error

    core = Core(wrap=lambda engine: Refusing(engine, OSError("gone")))  # type: ignore[arg-type, return-value]
    [ended] = core.scheduler.open(1, asked(), client="client")
    assert isinstance(ended, Ending)
    assert ended.text == "the target did not take it: OSError: gone"
    assert core.scheduler.patience() == 0
    with pytest.raises(EngineFailed, match="OSError: gone"):
        core.scheduler.tick()


# Room


def test_the_line_has_an_end_and_tells_places() -> None:
    core = Core(sessions=1, most_waiting=2)
    core.open(1, 3)
    assert core.scheduler.open(2, asked(3), client="b") == [Waiting(2, 1)]
    assert core.scheduler.open(3, asked(3), client="c") == [Waiting(3, 2)]
    assert core.scheduler.open(4, asked(3), client="d") == [
        Ending(
            4,
            Reason.full,
            "the verifier has no room now, and 2 requests already wait in line (its project.max_waiting)",
        )
    ]
    assert core.scheduler.open(4, asked(3), client="d") != [], "it is not there"
    core.clock.now += 5
    told = [outcome for _ in range(4) for outcome in core.scheduler.tick() if isinstance(outcome, Waiting)]
    assert told == [], "the places are what they were, and then the first is in"
    core.clock.now += 1.1
    assert Waiting(3, 1) in core.scheduler.tick()
    texts, ends = whole_texts(core)
    assert [ended.key for ended in ends] == [2, 3]
    assert texts[3] == TEXT[:3]


def test_a_text_that_is_half_done_waits_however_long_the_line_is() -> None:
    """As after a verifier's restart: it does not know the text, and its other clients came first."""
    core = Core(sessions=1, most_waiting=1)
    core.open(1, 3)
    core.scheduler.open(2, asked(3), client="b")
    begun = replace(asked(3), new_ids=TEXT[:1])
    told = core.scheduler.resume(3, begun, client="c", name=3, owner=OWNER)
    assert [type(outcome) for outcome in told] == [Verdict, Waiting]
    [ended] = core.scheduler.resume(4, asked(3), client="d", name=4, owner=OWNER)
    assert isinstance(ended, Ending), "nothing of it is lost"
    texts, ends = whole_texts(core)
    assert [ended.key for ended in ends] == [1, 2, 3]
    assert texts[3] == TEXT[1:3]


def test_an_invented_token_buys_no_place_in_line() -> None:
    """A verifier that runs for longer than it keeps texts knows all that can be resumed."""
    core = Core(sessions=1, most_waiting=1, keep_seconds=5.0)
    core.open(1, 3)
    core.scheduler.open(2, asked(3), client="b")
    core.clock.now += 5.0
    [ended] = core.scheduler.resume(3, replace(asked(3), new_ids=[7]), client="c", name=3, owner=OWNER)
    assert isinstance(ended, Ending)
    assert "1 requests already wait in line" in ended.text


def test_who_leaves_the_line_makes_room_in_it() -> None:
    core = Core(sessions=1, most_waiting=2)
    core.open(1, 3)
    for key in (2, 3):
        core.scheduler.open(key, asked(3), client=key, name=key, owner=OWNER)
    core.scheduler.leave(2)
    assert core.scheduler.open(4, asked(3), client="d") == [Waiting(4, 2)]
    _, ends = whole_texts(core)
    assert [ended.key for ended in ends] == [1, 3, 4]
    told = core.scheduler.resume(5, asked(3), client=2, name=2, owner=OWNER)
    assert [type(outcome) for outcome in told] == [Verdict]
    assert whole_texts(core)[0][5] == TEXT[:3]


def test_a_long_text_is_not_overtaken_for_ever() -> None:
    """Room for 100 tokens: short texts that come one after the other leave none for a long one, unless they wait."""
    model: Any = random_model("llama", torch.float64)
    bytes_of_100 = local_engine(model).cache.bytes_per_position * 100
    core = Core(wrap=lambda _: local_engine(model, context=100, limit_bytes=bytes_of_100))
    core.open(1, 20)
    assert core.scheduler.open(2, asked(80), client="long") == [Waiting(2, 1)]
    assert core.scheduler.open(3, asked(20), client="short") == [Waiting(3, 2)]
    _, ends = whole_texts(core)
    assert [(ended.key, ended.reason) for ended in ends] == [(key, Reason.length) for key in (1, 2, 3)]
