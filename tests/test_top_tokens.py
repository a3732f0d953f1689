"""Log probabilities: the best tokens of each row, from an engine over shards and verdicts to a drafter's target.

Shapes: T positions, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lab.command.entry import compose_settings
from lab.engine.base import Engine, TargetStep
from lab.engine.sampling import Sampling, choose
from lab.engine.synthetic import SyntheticEngine
from lab.models.sources import load_tokenizer_only
from lab.settings import ModelSettings
from lab.text.logit_rules import LogitRules
from speculative.drafter.loop import Round, speculate
from speculative.drafter.target import RemoteTarget, join
from speculative.drafts import NoDrafts, RandomDrafts, RecordedDrafts
from speculative.messages import Reason, ScoresFrame
from speculative.request import Ending, GenerationRequest, Verdict
from speculative.scores import pack_scores, with_scores
from speculative.settings import Mode, SpeculativeSettings
from speculative.verifier.target import open_target
from speculative.vocabulary import token_texts
from tests.random_models import VOCABULARY, random_model
from tests.speculative.in_process import InProcess, bench, local_engine, request, speculated, tokens
from tests.speculative.serving_here import serving_here
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
    with pytest.raises(ValueError, match=r"^top_tokens must be 0 for a synthetic engine"):
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


# Verdicts


def numbers(rounds: Sequence[Round | Verdict]) -> list[tuple[float, list[tuple[int, float]]]]:
    """What was told of each new token."""
    assert all(len(one.nll) == len(one.top) for one in rounds)
    return [told for one in rounds for told in zip(one.nll, one.top, strict=True)]


PROMPT = [5, 9, 11, 4]
LOGGED = replace(
    request(PROMPT, 60, Sampling(seed=3, temperature=1.0, top_k=0, top_p=1.0, top_tokens=3), length=5), logprobs=True
)


@functools.cache
def alone() -> tuple[list[int], list[tuple[float, list[tuple[int, float]]]]]:
    """The text without drafts, and its numbers."""
    with bench(local_engine(random_model("llama", torch.float32), 2, 128, 8)) as verifiers:
        rounds = speculated(InProcess(verifiers), NoDrafts(), replace(LOGGED, mode=Mode.target_only))
    return tokens(rounds), numbers(rounds)


def test_verdicts_tell_what_raw_logits_say() -> None:
    ids, found = alone()
    model = random_model("llama", torch.float32).double()
    nll_TV = oracle(model, [*PROMPT, *ids])[len(PROMPT) - 1 :]
    assert len(found) == len(ids) == 60
    for place, (token, (nll, top)) in enumerate(zip(ids, found, strict=True)):
        assert nll == pytest.approx(float(nll_TV[place, token]), abs=NEAR)
        assert [one for one, _ in top] == best(nll_TV[place], 3)
        assert dict(top).get(token, nll) == nll


@pytest.mark.parametrize("mode", [Mode.sync, Mode["async"]])
def test_speculated_rows_are_those_of_single_passes(mode: Mode) -> None:
    """In exact shapes to the bit: accepted tokens, and those that follow them."""
    ids, found = alone()
    accepted = 0
    for agreement in (0.0, 0.6, 1.0):
        with bench(local_engine(random_model("llama", torch.float32), 2, 128, 8)) as verifiers:
            drafts = RecordedDrafts(ids, agreement, 1, VOCABULARY)
            rounds = speculated(InProcess(verifiers), drafts, replace(LOGGED, mode=mode))
        assert tokens(rounds) == ids
        assert numbers(rounds) == found
        accepted += sum(done.accepted for done in rounds)
    assert accepted > 20


def test_a_lossy_token_has_its_own_number() -> None:
    """Rule cross_entropy accepts what the target would not choose: its number is not that of the target's choice."""
    asked = replace(LOGGED, threshold=6.0, sampling=replace(Sampling.greedy(), top_tokens=3))
    model = random_model("llama", torch.float32)
    with bench(local_engine(model, 2, 128, 8)) as verifiers:
        rounds = speculated(InProcess(verifiers), RandomDrafts(2, VOCABULARY), asked)
    nll_TV = oracle(model.double(), [*PROMPT, *tokens(rounds)])[len(PROMPT) - 1 :]
    lossy = 0
    for place, (token, (nll, top)) in enumerate(zip(tokens(rounds), numbers(rounds), strict=True)):
        assert nll == pytest.approx(float(nll_TV[place, token]), abs=1e-4)
        assert [one for one, _ in top] == best(nll_TV[place], 3)
        lossy += token != top[0][0]
    assert lossy > 5


def test_nothing_is_told_unless_it_is_asked_for() -> None:
    with bench(local_engine(random_model("llama", torch.float32), 2, 128)) as verifiers:
        rounds = speculated(InProcess(verifiers), NoDrafts(), replace(LOGGED, logprobs=False, max_new_tokens=5))
        assert numbers(rounds) == []
        plain = replace(LOGGED, sampling=replace(LOGGED.sampling, top_tokens=0), max_new_tokens=5)
        rounds = speculated(InProcess(verifiers), NoDrafts(), plain)
    assert [len(one.nll) for one in rounds] == [len(one.tokens) for one in rounds]
    assert [one.top for one in rounds] == [[]] * len(rounds)


# Over the wire


VERDICTS = [
    Verdict(1, 0, 4, 1, [7], None, [0.5, 1.5], [1.0, math.inf], [0.1, 0.2], [[(1, 0.1)], [(2, 0.2)]]),
    Verdict(1, 0, 4, 0, [7], None, [], [1.0], [0.1], []),
    Verdict(1, 0, 4, 0, [7, 8], None, [], [], [], []),
]  # fmt: skip


@pytest.mark.parametrize("verdict", VERDICTS)
@pytest.mark.parametrize("report", [True, False])
def test_scores_travel_as_they_are(verdict: Verdict, report: bool) -> None:
    bare = replace(verdict, draft_nll=[], margins=[], nll=[], top=[])
    head, body = pack_scores(verdict, report=report)
    assert with_scores(bare, head, body) == (verdict if report else replace(verdict, draft_nll=[], margins=[]))
    for wrong in (replace_head(head, logprobs=head.logprobs + 1), replace_head(head, margins=2**32 - 1)):
        with pytest.raises(ValueError, match=r"^scores must be"):
            with_scores(bare, wrong, body)


def replace_head(head: ScoresFrame, **changes: int) -> ScoresFrame:
    return msgspec.structs.replace(head, **changes)


def test_a_remote_target_tells_the_same_numbers() -> None:
    words = (
        "model=random",
        "device.threads=1",
        "project.context=96",
        "project.exact_shapes=true",
        "project.sessions=2",
    )
    asked = replace(LOGGED, max_new_tokens=30, mode=Mode["async"])
    with serving_here(*words) as here:
        with bench(open_target(here.settings, torch.device("cpu")).engine) as verifiers:
            expected = speculated(InProcess(verifiers), NoDrafts(), replace(asked, mode=Mode.target_only))
        texts = token_texts(load_tokenizer_only(here.settings.model))
        drafter = f"model=random tracking=none network.port={here.port}"
        with join(compose_settings("spec_decoding", drafter, SpeculativeSettings), texts) as target:
            drafts = RecordedDrafts(tokens(expected), 0.6, 1, len(texts))
            rounds = list(speculate(target, drafts, asked, frozenset()))
            assert tokens(rounds) == tokens(expected)
            assert numbers(rounds) == numbers(expected)
            assert sum(one.accepted for one in rounds) > 0
            _resumed(target, replace(asked, mode=Mode.target_only), tokens(expected))


def _resumed(target: RemoteTarget, asked: GenerationRequest, text: list[int]) -> None:
    """The answer to a RESUME has tokens without numbers, and later verdicts have theirs."""
    target.open(asked)
    for _ in range(5):
        assert isinstance(target.next(), Verdict)
    target.resume(replace(asked, new_ids=text[:2]))
    verdicts: list[Verdict] = []
    while not isinstance(outcome := target.next(), Ending):
        assert isinstance(outcome, Verdict)
        verdicts.append(outcome)
    target.leave()
    [resumed, *later] = verdicts
    assert (resumed.position, resumed.nll, resumed.top) == (len(PROMPT) + 2, [], [])
    assert len(resumed.ids) >= 3
    assert all(len(one.nll) == len(one.top) == len(one.ids) for one in later)
    assert [token for one in verdicts for token in one.ids] == text[2:]
