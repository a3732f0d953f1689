"""Log probabilities: the best tokens of each row, from an engine over shards and verdicts to a drafter's target.

Shapes: T positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lab.engine.base import Engine, TargetStep
from lab.engine.sampling import Sampling, choose
from lab.engine.synthetic import SyntheticEngine
from lab.settings import ModelSettings
from lab.text.logit_rules import LogitRules
from speculative.messages import Reason
from speculative.request import Ending
from speculative.settings import Mode
from tests.speculative.in_process import bench, request
from tests.split.chains import CHUNK, inprocess, local, saved_model, some_ids

pytestmark = pytest.mark.usefixtures("one_thread")

RULES = LogitRules(
    prompt_tokens=5, repetition_penalty=1.4, presence_penalty=0.2, frequency_penalty=0.1,
    logit_bias=((7, 3.0),), bad_words=((9,), (3, 4)),
)  # fmt: skip
ASKED = Sampling(seed=4, temperature=0.8, top_k=40, top_p=0.95, min_p=0.01, top_tokens=5, logit_rules=RULES)

NEAR = 2e-5
"""What float32 may cost."""


def oracle(model: Any, ids: Sequence[int]) -> Tensor:
    """Cross-entropy of every token after every id, T x V, in float64."""
    with torch.inference_mode():
        logits_TV: Tensor = model(torch.tensor([list(ids)])).logits[0].double()
    return -logits_TV.log_softmax(-1)


def best(nll_V: Tensor, count: int) -> list[int]:
    """The plainest way: all tokens in order, equal ones by their ids."""
    return sorted(range(len(nll_V)), key=lambda token: (float(nll_V[token]), token))[:count]


# One row


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_top_tokens_are_the_best_ones_and_equal_ones_go_by_id(dtype: torch.dtype) -> None:
    """Logits of few different values: most of the places are decided by ids."""
    logits_RV = torch.randint(-3, 4, (6, 300), generator=torch.Generator().manual_seed(1)).to(dtype) / 4
    sampled = [
        Sampling(seed=1, temperature=1.0, top_k=0, top_p=1.0, top_tokens=count) for count in (0, 1, 2, 7, 20, 20)
    ]
    choice = choose(logits_RV, sampled, [3] * 6, [-1] * 6)
    wide_RV = logits_RV if dtype == torch.float64 else logits_RV.float()
    for row, sampling in enumerate(sampled):
        assert [token for token, _ in choice.top[row]] == best(-wide_RV[row], sampling.top_tokens)
        assert [nll for _, nll in choice.top[row]] == [
            choose(logits_RV[row : row + 1], sampled[:1], [3], [token]).follower_nll[0] for token, _ in choice.top[row]
        ]


def test_the_token_drawn_has_the_same_number_in_both_places() -> None:
    logits_RV = torch.randn(40, 500, generator=torch.Generator().manual_seed(2)) * 3
    choice = choose(logits_RV, [replace(Sampling.greedy(), top_tokens=20)] * 40, [0] * 40, [-1] * 40)
    assert [top[0] for top in choice.top] == list(zip(choice.ids, choice.nll, strict=True))


@pytest.mark.parametrize("count", [-1, 21])
def test_a_number_of_top_tokens_out_of_range_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=rf"^top_tokens must be in \[0, 20\], got {count}"):
        replace(Sampling.greedy(), top_tokens=count)


def test_an_engine_without_logits_refuses_them() -> None:
    engine = SyntheticEngine(vocabulary_size=50, context=40, sessions=1, step_seconds=0, row_seconds=0, agreement=1.0)
    with pytest.raises(ValueError, match="^top_tokens must be 0 for a synthetic engine"):
        engine.open([1], replace(Sampling.greedy(), top_tokens=3))
    with bench(engine) as verifiers:
        asked = replace(request([1, 2], 3, Sampling.greedy(), Mode.target_only), logprobs=True)
        assert verifiers.scheduler.open("text", asked, client="client") == [
            Ending("text", Reason.refused, "logprobs must be off for a synthetic engine, which has no logits")
        ]


# Engines


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> ModelSettings:
    return saved_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(settings: ModelSettings) -> Any:
    return AutoModelForCausalLM.from_pretrained(settings.path, dtype=torch.float64).eval()


def told(engine: Engine, sampling: Sampling = ASKED) -> tuple[list[int], TargetStep]:
    """A prompt of six chunks with want=all, five tokens one by one beside a neighbour that asks for nothing, and a
    rewound extend of some: the text, and the steps of each of its ids."""
    ids = some_ids(6 * CHUNK, seed=8)
    with engine.open([], sampling) as text, engine.open(some_ids(9, 1), Sampling.greedy()) as other:
        [step] = engine.extend([(text, ids)], "all")
        for _ in range(5):
            ids.append(step.next_ids[-1])
            later, beside = engine.extend([(text, ids[-1:]), (other, [5])], "last")
            assert beside.top == []
            step = step.then(replace(later, nll=step.next_nll[-1:]))
        text.position -= 3
        ids[-3:] = new = some_ids(10, seed=9)
        [again] = engine.extend([(text, new)], "all")
        kept = len(ids) - len(new)
        cut = TargetStep(
            step.next_ids[:kept], step.next_nll[:kept], step.margin[:kept], step.nll[:kept], "", step.top[:kept]
        )
        return ids, cut.then(again)


def check(ids: Sequence[int], step: TargetStep, nll_TV: Tensor, count: int) -> None:
    """Every number of a text against the oracle's, and against each other, to the bit."""
    assert len(step.top) == len(step.next_ids) == len(ids)
    for place, top in enumerate(step.top):
        assert [token for token, _ in top] == best(nll_TV[place], count)
        assert [nll for _, nll in top] == pytest.approx(nll_TV[place, [token for token, _ in top]].tolist(), abs=NEAR)
        known = dict(top)
        if step.next_ids[place] in known:
            assert known[step.next_ids[place]] == step.next_nll[place]
        if place + 1 < len(ids) and ids[place + 1] in known and not math.isnan(step.nll[place + 1]):
            assert known[ids[place + 1]] == step.nll[place + 1]


def test_the_whole_model_tells_what_its_logits_say(settings: ModelSettings, model: Any) -> None:
    ids, step = told(local(settings))
    nll_TV = oracle(model, ids)
    check(ids, step, nll_TV, 5)
    own = [float(nll_TV[place, token]) for place, token in enumerate(ids[1:])]
    assert math.isnan(step.nll[0])
    rewound = len(ids) - 10  # its first id was not predicted just before
    assert [one for place, one in enumerate(step.nll[1:], 1) if place != rewound] == pytest.approx(
        [one for place, one in enumerate(own, 1) if place != rewound], abs=NEAR
    )
    worse = [[(token, nll + 1e-3) for token, nll in top] for top in step.top]
    with pytest.raises(AssertionError):
        check(ids, replace(step, top=worse), nll_TV, 5)


@pytest.mark.parametrize("cuts", [(0, 2, 4), (0, 1, 3, 4), (0, 4)])
def test_shards_tell_what_the_whole_model_tells(settings: ModelSettings, cuts: Sequence[int]) -> None:
    ids, step = told(local(settings))
    split_ids, split = told(inprocess(settings, cuts))
    assert split_ids == ids
    assert split.top == step.top
    assert split.next_nll == step.next_nll


def test_asking_changes_no_other_number(settings: ModelSettings) -> None:
    ids, step = told(local(settings))
    plain_ids, plain = told(local(settings), replace(ASKED, top_tokens=0))
    assert plain.top == []
    assert (plain_ids, plain.next_ids, plain.next_nll, plain.margin) == (ids, step.next_ids, step.next_nll, step.margin)


def test_a_tie_across_chunks_is_a_tie(settings: ModelSettings) -> None:
    """The numbers of a chunk's first id come from another pass than those of the row before it."""
    for engine in (local(settings), inprocess(settings, (0, 2, 4))):
        greedy = replace(Sampling.greedy(), top_tokens=1)
        with engine.open([], greedy) as text:
            ids = some_ids(3, 1)
            while len(ids) < 4 * CHUNK:
                text.position = 0
                [step] = engine.extend([(text, ids)], "all")
                ids.append(step.next_ids[-1])
            assert step.nll[3:] == [top[0][1] for top in step.top[2:-1]]
