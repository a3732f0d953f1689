"""Part of the benchmark with a chat of two turns."""

import time
from collections.abc import Sequence

from lab.bench import Row, Sample, judged, ratio
from lab.engine.sampling import Sampling
from lab.text.prompts import prompt_ids
from speculative.bench.rig import Case, Rig
from speculative.bench.rows import plain_row
from speculative.drafter.loop import speculate
from speculative.drafts import NoDrafts
from speculative.request import GenerationRequest
from speculative.settings import Mode

ANSWER_TOKENS = 8
QUESTION_TOKENS = 20
MOST_OVER_COLD = 0.15


def second_turn(rig: Rig) -> list[Row]:
    """Time to the first token of a chat's second turn, relative to the same prompt without a first turn before it.

    Chats differ in their first token, so that none finds another one's prompt.
    """
    bench = rig.settings.project.bench
    history = _history(rig, bench.history_tokens)
    warm, cold, cached = [], [], []
    for turn in range(bench.repeats):
        begun = [2 * turn, *history[1:]]
        answer = _answer(rig, begun)[0]
        following = [*begun, *answer, *history[:QUESTION_TOKENS]]
        _, seconds, held = _answer(rig, following)
        warm.append(seconds)
        cached.append(held)
        cold.append(_answer(rig, [2 * turn + 1, *following[1:]])[1])
    over = ratio(warm, cold)
    row = plain_row(rig, "second_turn", Case(mode=Mode.target_only, rtt_seconds=0.0)) | {
        "history_tokens": len(history),
        "prompt_tokens": len(history) + ANSWER_TOKENS + QUESTION_TOKENS,
        "cached_tokens": min(cached),
        "first_token_seconds": Sample.of(warm),
        "cold_first_token_seconds": Sample.of(cold),
        "over_cold": over,
        "n": bench.repeats,
    }
    return [judged("second turn", row, f"over_cold at most {MOST_OVER_COLD}", over.median <= MOST_OVER_COLD)]


def _history(rig: Rig, count: int) -> list[int]:
    """So many tokens of the benchmark's texts, repeated."""
    ids = [
        token for text in rig.settings.project.bench.texts for token in prompt_ids(rig.tokenizer, text.prompt, False)
    ]
    return (ids * (count // len(ids) + 1))[:count]


def _answer(rig: Rig, ids: Sequence[int]) -> tuple[list[int], float, int]:
    """The answer to a prompt, whatever the target would end it with; seconds until its first token; the tokens of the
    prompt that were kept."""
    request = GenerationRequest(
        prompt_ids=ids,
        sampling=Sampling.greedy(),
        max_new_tokens=ANSWER_TOKENS,
        mode=Mode.target_only,
        threshold=None,
    )
    target = rig.target(0.0)
    began = time.perf_counter()
    rounds = speculate(target, NoDrafts(), request, target.welcome.end_ids)
    first = next(rounds)
    seconds = time.perf_counter() - began
    answer = [*first.tokens, *(token for done in rounds for token in done.tokens)]
    return (answer + [0] * ANSWER_TOKENS)[:ANSWER_TOKENS], seconds, first.cached_tokens
