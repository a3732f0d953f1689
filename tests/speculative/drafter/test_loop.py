"""The drafter's loop: rounds as transformers' own, refusals, flips."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.candidate_generator import AssistedCandidateGenerator

from lab.engine.sampling import Sampling
from lab.engine.synthetic import SyntheticEngine
from speculative.drafter.check import find_flips
from speculative.drafter.loop import RequestRefused, Round, speculate
from speculative.drafter.sources import EngineDrafts, add_noise_to_head
from speculative.drafts import NoDrafts, RandomDrafts
from speculative.messages import Reason
from speculative.request import Verdict, Waiting
from speculative.settings import Mode
from tests.random_models import VOCABULARY, random_model
from tests.speculative.in_process import InProcess, bench, local_engine, request, speculated, tokens

GREEDY = Sampling.greedy()
PROMPT = [5, 17, 80, 3, 3, 41, 9]


pytestmark = pytest.mark.usefixtures("one_thread")


def _pair() -> tuple[Any, Any]:
    drafter: Any = random_model("llama", torch.float64)
    add_noise_to_head(drafter, 0.3, 1)
    return random_model("llama", torch.float64), drafter


def _rounds_of_transformers(
    target: Any, drafter: Any, length: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[int], list[int]]:
    """Accepted guesses of each round, and the text, of transformers' assisted generation with fixed k."""
    accepted: list[int] = []
    update = AssistedCandidateGenerator.update_candidate_strategy

    def note(self: Any, input_ids: Any, scores: Any, num_matches: int) -> None:
        accepted.append(int(num_matches))
        update(self, input_ids, scores, num_matches)

    monkeypatch.setattr(AssistedCandidateGenerator, "update_candidate_strategy", note)
    drafter.generation_config = GenerationConfig(
        num_assistant_tokens=length, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    # No padding token: transformers would mask every id in the text that equals it.
    text = target.generate(torch.tensor([PROMPT]), assistant_model=drafter, do_sample=False, max_new_tokens=count)
    return accepted, text[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("length", [1, 3, 5, 8])
def test_accepted_length_of_each_round_is_that_of_transformers(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    target, drafter = _pair()
    theirs, text = _rounds_of_transformers(target, drafter, length, 60, monkeypatch)
    target, drafter = _pair()
    with bench(local_engine(target)) as verifiers:
        drafts = EngineDrafts(local_engine(drafter, sessions=1), GREEDY, VOCABULARY)
        rounds = speculated(InProcess(verifiers), drafts, request(PROMPT, 60, GREEDY, length=length))
    assert tokens(rounds) == text
    ours = [done.accepted for done in rounds]
    assert ours[: len(theirs)] == theirs
    assert all(not done.draft_ids for done in rounds[len(theirs) :]), "only a last token without guesses may follow"
    assert 0 < sum(ours) < length * len(ours), "all or nothing was accepted: nothing was compared"


def test_another_draft_length_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    target, drafter = _pair()
    theirs, _ = _rounds_of_transformers(target, drafter, 5, 60, monkeypatch)
    others, _ = _rounds_of_transformers(*_pair(), 4, 60, monkeypatch)
    assert theirs != others


def _synthetic(agreement: float = 1.0, sessions: int = 4) -> SyntheticEngine:
    return SyntheticEngine(
        vocabulary_size=50,
        context=400,
        sessions=sessions,
        step_seconds=0,
        row_seconds=0,
        agreement=agreement,
    )


def test_a_text_ends_with_the_first_end_token_wherever_it_stands_in_a_draft() -> None:
    with bench(_synthetic()) as free:
        whole = tokens(speculated(InProcess(free), NoDrafts(), request([1], 60, GREEDY)))
    end = whole[7]
    first = whole.index(end)
    for length in range(1, 12):
        with bench(_synthetic(), [end]) as verifiers:
            drafts = EngineDrafts(_synthetic(), GREEDY, 50)
            rounds = speculated(InProcess(verifiers), drafts, request([1], 60, GREEDY, length=length), [end])
        assert tokens(rounds) == whole[: first + 1]
        assert verifiers.ended[0][1].reason is Reason.end_token


def test_a_text_has_the_length_that_was_asked_for() -> None:
    for count in range(1, 12):
        with bench(_synthetic()) as verifiers:
            drafts = EngineDrafts(_synthetic(), GREEDY, 50)
            rounds = speculated(InProcess(verifiers), drafts, request([1, 2], count, GREEDY))
            assert len(tokens(rounds)) == count
        assert verifiers.ended[0][1].reason is Reason.length


def test_what_cannot_be_served_is_refused_in_one_line() -> None:
    with bench(_synthetic(sessions=1)) as verifiers:
        with pytest.raises(
            RequestRefused, match=r"must be at most 5 here for a prompt of 395 tokens \(.*, its context\), got 6$"
        ):
            speculated(InProcess(verifiers), NoDrafts(), request([1] * 395, 6, GREEDY))
        with pytest.raises(RequestRefused, match="prompt must hold at least one token"):
            speculated(InProcess(verifiers), NoDrafts(), request([], 6, GREEDY))


def test_a_text_waits_for_room_in_the_engine() -> None:
    with bench(_synthetic(sessions=1)) as verifiers:
        rounds = speculate(InProcess(verifiers, "holds the slot"), NoDrafts(), request([1], 9, GREEDY), [])
        next(rounds)
        second = InProcess(verifiers, "second")
        second.open(request([1], 6, GREEDY, Mode.target_only))
        next(rounds)
        assert second.next() == Waiting(("second", 1), 1)
        assert not second.has_news()
        rounds.close()  # type: ignore[attr-defined]  # a generator: leaving it gives the slot back
        assert isinstance(second.next(), Verdict)


def test_two_sides_that_differ_on_the_text_are_told() -> None:
    with bench(_synthetic()) as verifiers:
        target = InProcess(verifiers)
        target.open(request([1, 2, 3], 9, GREEDY))
        target.draft(0, 4, [1])
        ended = target.next()
        assert ended.reason is Reason.failed  # type: ignore[union-attr]
        assert "position 3" in ended.text  # type: ignore[union-attr]


def test_guesses_of_an_older_epoch_are_dropped() -> None:
    with bench(_synthetic()) as verifiers:
        target = InProcess(verifiers)
        target.open(request([1], 30, GREEDY))
        wrong = (tokens(speculated(InProcess(verifiers, "same"), NoDrafts(), request([1], 1, GREEDY)))[0] + 1) % 50
        target.draft(0, 1, [wrong])
        verdict = target.next()
        assert (verdict.epoch, verdict.accepted) == (1, 0)  # type: ignore[union-attr]
        target.draft(0, 2, [wrong, wrong])  # was under way when the verdict came
        target.draft(1, 2, [])
        assert target.next().position == 2  # type: ignore[union-attr]
        target.leave()
    assert next(text for text, _ in verifiers.ended if text.key[0] == "text").figures.drafts_stale == 1  # type: ignore[index]


def test_a_text_that_will_never_fit_is_told_at_once_what_would() -> None:
    model: Any = random_model("llama", torch.float64)
    per_position = local_engine(model).cache.bytes_per_position
    engine = local_engine(model, sessions=2, limit_bytes=per_position * 70)  # two buckets of one text, or one of two
    with bench(engine) as verifiers:
        short = InProcess(verifiers, "short")
        rounds = speculate(short, NoDrafts(), replace(request([1], 31, GREEDY), mode=Mode.sync), [])
        first = next(rounds)
        with pytest.raises(
            RequestRefused, match=r"max_new_tokens must be at most 63 here for a prompt of 1 tokens .*got 64"
        ):
            speculated(InProcess(verifiers, "long"), NoDrafts(), request([1], 64, GREEDY))
        with pytest.raises(
            RequestRefused, match=r"prompt must be at most 63 tokens here .*cache_limit_bytes.*, got 64"
        ):
            speculated(InProcess(verifiers, "longer"), NoDrafts(), request([1] * 64, 1, GREEDY))
        assert len(tokens([first, *rounds])) == 31


def test_rule_cross_entropy_takes_more_and_says_what_each_guess_costs() -> None:
    model = random_model("llama", torch.float64)

    def run(threshold: float | None) -> tuple[list[Round], list[float]]:
        with bench(local_engine(model)) as verifiers:
            drafts = RandomDrafts(1, VOCABULARY)
            asked = request(PROMPT, 60, GREEDY, threshold=threshold, length=4)
            rounds = speculated(InProcess(verifiers), drafts, asked)
        return rounds, [value for done in rounds for value in done.draft_nll]

    exact, costs = run(None)
    limit = sorted(costs)[len(costs) // 2]
    lossy, _ = run(limit)
    assert sum(done.accepted for done in lossy) > sum(done.accepted for done in exact)
    assert tokens(lossy) != tokens(exact)
    for done in lossy:
        assert all(value <= limit for value in done.draft_nll[: done.accepted])
        assert all(value > limit for value in done.draft_nll[done.accepted :])


def test_cross_entropy_of_each_guess_is_that_of_the_model() -> None:
    model: Any = random_model("llama", torch.float64)
    with bench(local_engine(model)) as verifiers:
        rounds = speculated(InProcess(verifiers), RandomDrafts(1, VOCABULARY), request(PROMPT, 12, GREEDY))
    text = list(PROMPT)
    for done in rounds:
        ids = torch.tensor([[*text, *done.draft_ids]])
        with torch.inference_mode():
            logits_TV = model(ids).logits[0, len(text) - 1 : -1]
        follow = torch.tensor(done.draft_ids, dtype=torch.long)
        losses: list[float] = torch.nn.functional.cross_entropy(logits_TV, follow, reduction="none").tolist()
        assert done.draft_nll == pytest.approx(losses[: len(done.draft_nll)], abs=1e-9)
        text += done.tokens


def test_flips_are_found_with_their_margins() -> None:
    model = random_model("llama", torch.float64)
    asked = request(PROMPT, 40, GREEDY)
    with bench(local_engine(model)) as verifiers:
        own = tokens(speculated(InProcess(verifiers), NoDrafts(), replace(asked, mode=Mode.target_only)))
        assert find_flips(InProcess(verifiers, "check"), asked, own, []) == []
        changed = [*own]
        changed[9] = (own[9] + 1) % VOCABULARY
        [first, *_] = find_flips(InProcess(verifiers, "changed"), asked, changed, [])
    assert (first.index, first.token, first.alone) == (9, changed[9], own[9])
    assert first.margin > 0
