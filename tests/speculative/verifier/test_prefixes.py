"""Prompts that a verifier keeps: the next turn of a chat has the same text without computing its history again."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typing_extensions import override

from lab.engine.base import Engine, Request, TargetStep, Want
from lab.engine.local import LocalEngine
from lab.engine.sampling import Sampling
from lab.engine.synthetic import SyntheticEngine
from lab.models.sources import load_tokenizer_only
from speculative.drafter.loop import speculate
from speculative.drafter.target import join
from speculative.drafts import NoDrafts, RecordedDrafts
from speculative.messages import Reason
from speculative.request import GenerationRequest, Outcome, Verdict, Waiting
from speculative.settings import Mode
from speculative.verifier.prefixes import KeptPrefixes
from speculative.verifier.scheduler import Scheduler
from speculative.verifier.sequence import VerifiedSequence
from speculative.vocabulary import token_texts
from tests.poison import mark, poison
from tests.random_models import random_model
from tests.speculative.in_process import LIMITS, InProcess, bench, request, speculated, tokens
from tests.speculative.serving_here import serving_here
from tests.split.chains import inprocess, saved_model
from tests.test_reuse import losing

pytestmark = pytest.mark.usefixtures("one_thread")

CHUNK = 32
SAMPLED = Sampling(seed=3, temperature=1.0, top_k=60, top_p=0.98, top_tokens=2)


class Counting(LocalEngine):
    """Counts the rows that it computes."""

    rows = 0

    @override
    def extend(self, requests: Sequence[Request], want: Want) -> list[TargetStep]:
        self.rows += sum(len(ids) for _, ids in requests)
        return super().extend(requests, want)


def counting(sessions: int = 4, *, exact_rows: int | None = None, limit_bytes: int = 2**28, **other: Any) -> Counting:
    return Counting(
        other.get("model") or random_model("llama", torch.float32), sessions=sessions, context=256, bucket=32,
        kv_limit_bytes=limit_bytes, prefill_chunk=CHUNK, exact_rows=exact_rows,
    )  # fmt: skip


def synthetic(sessions: int) -> SyntheticEngine:
    return SyntheticEngine(
        vocabulary_size=264, context=256, sessions=sessions, step_seconds=0, row_seconds=0, agreement=1.0
    )


@dataclass
class Text:
    """What was told of one request."""

    ids: list[int]
    nll: list[float]
    top: list[Any]
    cached: int
    waited: bool
    ended: Reason | None = None


class Core:
    """A verifier without a thread."""

    def __init__(self, engine: Engine, prefix_tokens: int = 1000, **limits: Any) -> None:
        self.engine = engine
        self.closed: list[VerifiedSequence] = []
        self.texts: dict[object, Text] = {}
        self.scheduler = Scheduler(
            engine,
            end_ids=[],
            limits=replace(LIMITS, prefill_chunk=CHUNK, prefix_tokens=prefix_tokens, **limits),
            closed=lambda sequence, ended: self.closed.append(sequence),
        )

    @property
    def kept(self) -> list[int]:
        """Number of tokens of each kept prompt, oldest first."""
        return [len(kept.ids) for kept in self.scheduler._prefixes._kept]

    def open(self, key: object, asked: GenerationRequest, **name: Any) -> Text:
        self.texts[key] = Text([], [], [], 0, waited=False)
        self._take(self.scheduler.open(key, asked, client="client", **name))
        return self.texts[key]

    def tick(self) -> None:
        self._take(self.scheduler.tick())

    def run(self, *keys: object) -> None:
        ticks = 0
        while any(self.texts[key].ended is None for key in keys):
            self.tick()
            ticks += 1
            assert ticks < 1000, "a text waits for ever"

    def say(self, key: object, prompt: Sequence[int], count: int = 6, **changes: Any) -> Text:
        """One request from its beginning to its end."""
        text = self.open(key, asked(prompt, count, **changes))
        self.run(key)
        return text

    def _take(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            text = self.texts[outcome.key]
            if isinstance(outcome, Verdict):
                text.ids += outcome.ids
                text.nll += outcome.nll
                text.top += outcome.top
                text.cached = outcome.cached_tokens
            elif isinstance(outcome, Waiting):
                text.waited = True
            else:
                text.ended = outcome.reason


def asked(prompt: Sequence[int], count: int = 6, sampling: Sampling = SAMPLED, mode: str = "target_only") -> Any:
    return replace(request(prompt, count, sampling, Mode[mode]), logprobs=bool(sampling.top_tokens))


def some(count: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(3, 250) for _ in range(count)]


# The same text


ENGINES: dict[str, Callable[[Path], Engine]] = {
    "local": lambda folder: counting(),
    "exact shapes": lambda folder: counting(exact_rows=16),
    "two shards": lambda folder: _split(folder),
}


def _split(folder: Path) -> Engine:
    engine = inprocess(saved_model("llama", folder), (0, 2, 4))
    engine._chunk = CHUNK
    return engine


def chat(core: Core, turns: int = 4) -> list[Text]:
    """A chat: each prompt is the one before, its answer and a question."""
    prompt, said = some(2 * CHUNK + 9, 1), []
    for turn in range(turns):
        said.append(core.say(turn, prompt))
        prompt = [*prompt, *said[-1].ids, *some(CHUNK // 2 + 3 * turn, turn)]
    return said


CACHED = [0, 64, 64, 96]
"""Of the turns of `chat`: whole chunks of the prompt of the turn before, without its last token."""


@pytest.mark.parametrize("name", ENGINES)
def test_a_chat_says_the_same_with_and_without_kept_prompts(name: str, tmp_path: Path) -> None:
    without = chat(Core(ENGINES[name](tmp_path), prefix_tokens=0))
    core = Core(ENGINES[name](tmp_path))
    found = chat(core)
    assert [text.cached for text in without] == [0, 0, 0, 0]
    assert [text.cached for text in found] == CACHED
    assert [replace(text, cached=0) for text in found] == without
    assert core.kept == [128]
    assert [one.figures.row()["cached_tokens"] for one in core.closed] == CACHED


def test_what_was_kept_is_not_computed() -> None:
    rows = []
    for prefix_tokens in (0, 1000):
        engine = counting()
        chat(Core(engine, prefix_tokens))
        rows.append(engine.rows)
    assert rows[0] - rows[1] == sum(CACHED)


def test_other_cuts_are_seen_by_the_same_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shared token reused, whatever it was computed in."""
    without = chat(Core(counting(), prefix_tokens=0))
    monkeypatch.setattr(KeptPrefixes, "_whole", lambda self, count: count)
    found = chat(Core(counting()))
    assert found[1].cached > 64
    assert found[1].nll != without[1].nll


def test_chats_among_each_other_in_every_mode_say_the_same() -> None:
    """In exact shapes no company matters: texts of three chats, some left in the middle, on two slots or four."""
    expected = chats(Core(counting(4, exact_rows=16), prefix_tokens=0), random.Random(1))
    for sessions, prefix_tokens in ((4, 1000), (2, 1000), (1, 1000), (4, 150)):
        core = Core(counting(sessions, exact_rows=16), prefix_tokens)
        found = chats(core, random.Random(1))
        assert [replace(text, cached=0, waited=False) for text in found] == expected, (sessions, prefix_tokens)
        assert sum(core.kept) <= prefix_tokens
        # On fewer slots than chats each kept prompt gives way to the next chat.
        assert (sum(text.cached for text in found) > 0) == (sessions == 4)


def chats(core: Core, draw: random.Random) -> list[Text]:
    prompts = [some(40, seed) for seed in range(3)]
    said: list[Text] = []
    for turn in range(4):
        begun = []
        for number, prompt in enumerate(prompts):
            mode = draw.choice(["target_only", "async"])
            begun.append(core.open((turn, number), asked(prompt, 8 + number, replace(SAMPLED, seed=number), mode)))
        core.run(*((turn, number) for number in range(3)))
        for number, text in enumerate(begun):
            prompts[number] = [*prompts[number], *text.ids, *some(draw.randrange(5, 40), turn)]
        said += [replace(text, waited=False) for text in begun]
    return said


def test_drafts_are_checked_behind_a_kept_prompt() -> None:
    """The last token of the prompt is the only one that is not held: it shares a pass with the first draft tokens."""
    prompt = some(2 * CHUNK + 1, 5)
    with bench(counting(2, exact_rows=16), limits=replace(LIMITS, prefill_chunk=CHUNK, prefix_tokens=0)) as plain:
        expected = tokens(speculated(InProcess(plain), NoDrafts(), request(prompt, 30, SAMPLED)))
    for mode in (Mode.sync, Mode["async"]):
        with bench(counting(2, exact_rows=16), limits=replace(LIMITS, prefill_chunk=CHUNK)) as verifiers:
            target = InProcess(verifiers)
            for cached in (0, 2 * CHUNK):
                drafts = RecordedDrafts(expected, 0.7, 1, 250)
                rounds = speculated(target, drafts, request(prompt, 30, SAMPLED, mode))
                assert tokens(rounds) == expected
                assert {one.cached_tokens for one in rounds} == {cached}


# What is kept


@pytest.mark.parametrize(
    ("prompt_tokens", "next_tokens", "kept", "cached"),
    [
        (CHUNK, 100, [], 0),
        (CHUNK + 1, 100, [CHUNK], CHUNK),
        (2 * CHUNK, 100, [CHUNK], CHUNK),
        (3 * CHUNK + 1, CHUNK, [3 * CHUNK], 0),
        (3 * CHUNK + 1, 2 * CHUNK, [3 * CHUNK], 0),
        (3 * CHUNK + 1, 2 * CHUNK + 1, [3 * CHUNK], 2 * CHUNK),
        (3 * CHUNK + 1, 3 * CHUNK + 1, [3 * CHUNK], 3 * CHUNK),
    ],
)
def test_whole_chunks_before_the_last_token_of_both(
    prompt_tokens: int, next_tokens: int, kept: list[int], cached: int
) -> None:
    """And no session is taken for less than half of it."""
    core = Core(synthetic(4))
    text = some(200, 2)
    core.say(1, text[:prompt_tokens], sampling=Sampling.greedy())
    assert core.kept == kept
    found = core.say(2, text[:next_tokens], sampling=Sampling.greedy())
    assert found.cached == cached
    alone = Core(synthetic(4), prefix_tokens=0).say(2, text[:next_tokens], sampling=Sampling.greedy())
    assert found.ids == alone.ids


def test_the_longest_match_is_taken_and_the_first_of_two_requests_has_it() -> None:
    core = Core(counting())
    text = some(200, 2)
    core.say(1, text[: CHUNK + 5])
    core.say(2, [*text[:100], *some(40, 9)])
    assert core.kept == [128], "the second one took the first one's, and kept more"
    core.say(3, [*text[:60], *some(60, 8)])
    assert core.kept == [128, 96], "less than half of what is kept would have been used"
    first, second = (core.open(key, asked([*text[:100], *some(40, 9)])) for key in (4, 5))
    core.run(4, 5)
    assert (first.cached, second.cached) == (128, 0)
    alone = Core(counting(), prefix_tokens=0)
    assert first.ids == second.ids == alone.say(6, [*text[:100], *some(40, 9)]).ids


def test_a_client_that_leaves_early_keeps_what_was_computed() -> None:
    core = Core(counting())
    prompt = some(3 * CHUNK + 5, 2)
    core.open(1, asked(prompt, 50))
    core.tick()
    core.tick()
    core.scheduler.close(1)
    assert core.kept == [2 * CHUNK]
    assert core.say(2, prompt).cached == 2 * CHUNK


def test_texts_with_nan_and_those_that_failed_are_not_kept() -> None:
    model = random_model("llama", torch.float32)
    mark(model, 90)
    engine = counting(model=model)
    poison(engine._model.get_decoder().layers[2])
    core = Core(engine)
    spoilt = [90 if place == 70 else token for place, token in enumerate(some(100, 3)) if token != 90]
    found = core.say(1, spoilt)
    assert found.ended is Reason.failed
    core.open(2, asked(some(100, 4), 50))
    for _ in range(6):
        core.tick()
    core._take(core.scheduler.fail(2, RuntimeError("a fault of ours")))
    assert core.kept == []
    assert not any(engine.cache.lengths)


def test_no_more_tokens_are_kept_than_is_said_and_the_oldest_go_first() -> None:
    core = Core(counting(), prefix_tokens=5 * CHUNK)
    for number, length in enumerate((2, 1, 2)):
        core.say(number, some(length * CHUNK + 3, number))
    assert core.kept == [2 * CHUNK, CHUNK, 2 * CHUNK]
    core.say(3, some(CHUNK + 3, 9))
    assert core.kept == [CHUNK, 2 * CHUNK, CHUNK]
    core.say(4, some(6 * CHUNK + 3, 10))
    assert core.kept == [CHUNK, 2 * CHUNK, CHUNK], "one that alone is too long drives no other out"
    none = Core(counting(), prefix_tokens=0)
    none.say(1, some(100, 1))
    assert none.kept == []
    assert not any(none.engine.cache.lengths)  # type: ignore[attr-defined]


# Room


def test_kept_prompts_never_make_a_request_wait() -> None:
    """One slot, and no line: the next request would be refused."""
    core = Core(synthetic(1), most_waiting=0)
    for number in range(3):
        text = core.say(number, some(100, number), sampling=Sampling.greedy())
        assert (len(text.ids), text.waited) == (6, False)
        assert core.kept == [96]
    assert core.say(9, some(100, 2), sampling=Sampling.greedy()).cached == 96


def test_the_next_turn_needs_more_room_than_the_last_one_left() -> None:
    """Room for two sequences of 128 tokens, or one of 256: others that are kept go, and then its own slot moves."""
    bytes_per_token = counting().cache.bytes_per_position
    core = Core(counting(limit_bytes=256 * bytes_per_token), most_waiting=0)
    core.say(1, some(100, 1))
    core.say(2, some(100, 2))
    assert core.kept == [96, 96]
    text = core.say(3, [*some(100, 1), *some(40, 3)], count=100)
    assert (text.cached, len(text.ids), core.kept) == (96, 100, [128])
    core.say(4, some(40, 4))
    assert core.kept == [128, 32]
    text = core.say(5, [*some(40, 4), *some(20, 5)], count=180)
    assert (text.cached, len(text.ids), core.kept) == (0, 180, [32]), "in the second slot there was no room for it"


def test_kept_prompts_go_before_sequences_that_rest() -> None:
    core = Core(synthetic(2))
    core.say(1, some(100, 1), sampling=Sampling.greedy())
    assert core.kept == [96]
    core.open(2, asked(some(40, 2), 50, Sampling.greedy()), name=7, owner=bytes(16))
    for _ in range(5):
        core.tick()
    core.scheduler.leave(2)
    core.say(3, some(20, 3), sampling=Sampling.greedy())
    assert core.kept == []
    assert len(core.scheduler._resting) == 1


# Shards


def test_a_shard_that_dies_between_two_turns_costs_a_prefill(tmp_path: Path) -> None:
    without = chat(Core(_split(tmp_path), prefix_tokens=0))
    for lost_before in range(1, 4):
        engine, transport = losing(tmp_path)
        core = Core(engine)
        prompt, said = some(2 * CHUNK + 9, 1), []
        for turn in range(4):
            transport.is_lost = turn == lost_before
            said.append(core.say(turn, prompt))
            prompt = [*prompt, *said[-1].ids, *some(CHUNK // 2 + 3 * turn, turn)]
        assert [replace(text, cached=0) for text in said] == without
        expected = [0 if turn == lost_before else cached for turn, cached in enumerate(CACHED)]
        assert [text.cached for text in said] == expected
        assert transport.restored == 1


# Over the wire


def test_a_drafter_is_told_how_much_was_kept() -> None:
    words = ("model=random", "device.threads=1", "project.prefill_chunk=32", "project.prefix_tokens=500")
    prompt = some(100, 1)
    with serving_here(*words) as here:
        texts = token_texts(load_tokenizer_only(here.settings.model))
        network = replace(here.settings.network, port=here.port)
        with join(replace(here.settings, network=network), texts) as target:
            for cached in (0, 96):
                rounds = list(speculate(target, NoDrafts(), request(prompt, 5, SAMPLED, Mode.target_only), frozenset()))
                assert {one.cached_tokens for one in rounds} == {cached}
