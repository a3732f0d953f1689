"""What words make of logits, against transformers' own processors; and that going back forgets."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lab.engine.history import History
from lab.engine.sampling import Sampling, choose
from lab.text.logit_rules import MAX_BIASES, LogitRules

VOCABULARY = 40
PROMPT = 5


def _words(**asked: object) -> LogitRules:
    return LogitRules(prompt_tokens=PROMPT, **asked)  # type: ignore[arg-type]  # the names are the point


def _text(seed: int, length: int = 30) -> list[int]:
    numbers = random.Random(seed)
    return [numbers.randrange(VOCABULARY) for _ in range(length)]


def _logits(seed: int, rows: int) -> Tensor:
    return 4 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _by_rows(words: LogitRules, ids: Sequence[int], logits_KV: Tensor, end: int) -> Tensor:
    history = History(words)
    history.hold(0, ids)
    return history.changed(logits_KV, end)


def _plain_penalty(ids: Sequence[int], scores_V: Tensor, presence: float, frequency: float) -> Tensor:
    """OpenAI's formula, word for word: mu[j] -= c[j] * frequency + (c[j] > 0) * presence."""
    scores_V = scores_V.clone()
    for token in range(VOCABULARY):
        count = ids[PROMPT:].count(token)
        scores_V[token] -= count * frequency + (count > 0) * presence
    return scores_V


@pytest.mark.parametrize("seed", range(3))
def test_every_row_is_what_transformers_makes_of_the_text_before_it(seed: int) -> None:
    ids, rows = _text(seed), 6
    logits_KV = _logits(seed, rows)
    bad = [[3], [ids[27], 7], [ids[25], ids[26], 9], [1, 2]]
    bias = {4: 3.5, 11: -100.0}
    words = _words(repetition_penalty=1.3, logit_bias=tuple(bias.items()), bad_words=tuple(map(tuple, bad)))
    found_KV = _by_rows(words, ids, logits_KV, len(ids))
    for row in range(rows):
        before = torch.tensor([ids[: len(ids) - rows + 1 + row]])
        expected = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])(
            before, logits_KV[row][None]
        )
        expected = NoBadWordsLogitsProcessor(bad)(before, expected)
        expected = RepetitionPenaltyLogitsProcessor(1.3)(before, expected)
        torch.testing.assert_close(found_KV[row], expected[0], rtol=0, atol=0)


@pytest.mark.parametrize(("presence", "frequency"), [(0.7, 0.0), (0.0, 0.4), (-0.5, 1.1)])
def test_presence_and_frequency_count_what_was_generated(presence: float, frequency: float) -> None:
    ids, logits_KV = _text(4), _logits(4, 5)
    found_KV = _by_rows(_words(presence_penalty=presence, frequency_penalty=frequency), ids, logits_KV, len(ids))
    for row in range(5):
        expected_V = _plain_penalty(ids[: len(ids) - 4 + row], logits_KV[row], presence, frequency)
        torch.testing.assert_close(found_KV[row], expected_V)


def test_going_back_forgets() -> None:
    """The same text by detours: guesses that were wrong, pieces of any length, rows read or not."""
    words = _words(repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.2, bad_words=((5, 6), (7,)))
    numbers, history, held = random.Random(1), History(words), list[int]()
    for step in range(60):
        at = numbers.randrange(max(0, len(held) - 6), len(held) + 1)
        new = [numbers.randrange(VOCABULARY) for _ in range(numbers.randrange(1, 7))]
        history.hold(at, new)
        held[at:] = new
        if numbers.random() < 0.6:
            rows = numbers.randrange(1, min(len(new), len(held)) + 1)
            logits_KV = _logits(step, rows)
            expected_KV = _by_rows(words, held, logits_KV, len(held))
            torch.testing.assert_close(history.changed(logits_KV, len(held)), expected_KV, rtol=0, atol=0)


def test_a_history_that_does_not_go_back_is_found_out() -> None:
    """The negative control: guesses that were taken back still count."""
    words = _words(frequency_penalty=0.5)
    logits_KV = _logits(0, 1)
    history = History(words)
    history.hold(0, [*range(PROMPT), 8, 8])
    history.changed(logits_KV, 7)
    history._ids[6:] = [9]
    wrong_KV = history.changed(logits_KV, 7)
    assert not torch.equal(wrong_KV, _by_rows(words, [*range(PROMPT), 8, 9], logits_KV, 7))


def test_where_everything_is_banned_nothing_is() -> None:
    words = _words(bad_words=tuple((token,) for token in range(VOCABULARY)))
    logits_KV = _logits(0, 2)
    assert torch.equal(_by_rows(words, _text(0), logits_KV, 30), logits_KV)
    by_the_last = _words(bad_words=(*((token,) for token in range(1, VOCABULARY)), (_text(0)[28], 0)))
    found_KV = _by_rows(by_the_last, _text(0), logits_KV, 30)
    assert torch.equal(found_KV[0], logits_KV[0]), "its last word is complete here"
    assert found_KV[1].isfinite().sum() == 1
    all_but_one = _words(bad_words=tuple((token,) for token in range(1, VOCABULARY)))
    found_KV = _by_rows(all_but_one, _text(0), logits_KV, 30)
    choice = choose(logits_KV, [Sampling.greedy()] * 2, [29, 30], [-1, -1], dict(enumerate(found_KV)))
    assert choice.ids == [0, 0]
    assert choice.margins == [math.inf, math.inf]
    assert choice.nll == pytest.approx((logits_KV.logsumexp(-1) - logits_KV[:, 0]).tolist()), "of the plain logits"


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"), [(0, 1.0, 1.0), (9, 1.0, 0.7), (0, 0.8, 1.5), (12, 0.9, 1.0)]
)
def test_min_p_leaves_what_transformers_leaves(top_k: int, top_p: float, temperature: float) -> None:
    logits_V, min_p = _logits(2, 1)[0], 0.08
    left = logits_V[None] / temperature
    left = TopKLogitsWarper(top_k)(None, left) if top_k else left  # type: ignore[arg-type]  # looks at scores only
    left = TopPLogitsWarper(top_p)(None, left)  # type: ignore[arg-type]
    left = MinPLogitsWarper(min_p)(None, left)[0]  # type: ignore[arg-type]
    rule = Sampling(seed=3, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    draws = 3000
    choice = choose(logits_V.expand(draws, -1), [rule] * draws, range(draws), [-1] * draws)
    probabilities = left.softmax(-1)
    assert set(choice.ids) <= set((probabilities > 0).nonzero()[:, 0].tolist())
    likely = (probabilities > 0.01).nonzero()[:, 0].tolist()
    assert set(likely) <= set(choice.ids)
    for token in likely:
        share = choice.ids.count(token) / draws
        assert share == pytest.approx(float(probabilities[token]), abs=5 * math.sqrt(0.25 / draws))


def test_a_row_is_the_same_whatever_stands_beside_it() -> None:
    words = _words(repetition_penalty=1.7, frequency_penalty=0.3)
    ids, logits_KV = _text(6), _logits(6, 8).float()
    whole_KV = _by_rows(words, ids, logits_KV, len(ids))
    for row in range(8):
        end = len(ids) - 7 + row
        assert torch.equal(_by_rows(words, ids[:end], logits_KV[row : row + 1], end)[0], whole_KV[row])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"repetition_penalty": 0.0}, "repetition_penalty must be in [0.01, 100], got 0.0"),
        ({"presence_penalty": 2.5}, "presence_penalty must be in [-2, 2], got 2.5"),
        ({"frequency_penalty": math.nan}, "frequency_penalty must be in [-2, 2], got nan"),
        ({"logit_bias": ((1, 101.0),)}, "logit_bias must be in [-100, 100], got 101.0 for token 1"),
        ({"logit_bias": ((1, 1.0), (1, 2.0))}, "logit_bias must name each token once, got one twice"),
        (
            {"logit_bias": tuple((token, 1.0) for token in range(MAX_BIASES + 1))},
            "logit_bias must be for at most 1024 tokens, got 1025",
        ),
        ({"bad_words": ((),)}, "bad_words must have at least one token each, got one without"),
        (
            {"bad_words": ((1,) * 5000,)},
            "bad_words must be at most 1024 of 4096 tokens together, got 1 of 5000",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(asked: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        _words(**asked)


def test_a_shorter_vocabulary_leaves_out_what_it_cannot_say() -> None:
    words = _words(logit_bias=((3, 1.0), (50, 1.0)), bad_words=((3, 50), (4,)))
    assert words.within(40) == _words(logit_bias=((3, 1.0),), bad_words=((4,),))
    with pytest.raises(ValueError, match=r"logit_bias and bad_words must name ids in \[0, 40\), got 50"):
        words.check_ids(40)
