"""Engines: LocalEngine against plain transformers, exact shapes bit by bit, SyntheticEngine against its own promise.

Shapes: T positions, V vocabulary.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from lab.engine import kv as kv_module
from lab.engine import local as engine_module
from lab.engine.base import Engine, LogitRows, Request, Session, TargetStep, Want
from lab.engine.kinds import open_split_engine
from lab.engine.kv import CacheFull, SlotCache
from lab.engine.local import LocalEngine, ShapeDependence
from lab.engine.sampling import Sampling
from lab.engine.synthetic import SyntheticEngine
from split.inference.open import join_shards
from tests.random_models import ARCHITECTURES, VOCABULARY, WINDOW, random_model

SAMPLED = Sampling(seed=21, temperature=0.8, top_k=40, top_p=0.95)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def float64_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' eager attention (Gemma2) rounds its softmax to float32: not in these tests."""
    softmax = torch.nn.functional.softmax

    def unrounded(scores: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        return softmax(scores, dim=dim, dtype=None if scores.dtype == torch.float64 else dtype)

    monkeypatch.setattr(torch.nn.functional, "softmax", unrounded)


def _local(model: Any, *, sessions: int = 4, exact_rows: int | None = None, **options: int) -> LocalEngine:
    values: dict[str, int] = {
        "context": 200,
        "bucket": 16,
        "kv_limit_bytes": 10**8,
        "prefill_chunk": 7,
        **options,
    }
    return LocalEngine(model, sessions=sessions, exact_rows=exact_rows, **values)


def _ids(count: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(VOCABULARY) for _ in range(count)]


def _generate(engine: Engine, prompt: Sequence[int], sampling: Sampling, count: int) -> list[int]:
    with engine.open(prompt, sampling) as session:
        assert session.step is not None
        text = list(session.step.next_ids)
        while len(text) < count:
            text += engine.extend([(session, text[-1:])], "last")[0].next_ids
    return text


# LocalEngine against transformers


def _worst_error(model: Any, monkeypatch: pytest.MonkeyPatch) -> float:
    """Largest difference in any logit between LocalEngine and the model run on the whole text at once.

    Three sessions of different lengths, extended together and apart by 1 to 40 tokens (several chunks, far beyond the
    window), rewound at random; one is closed on the way and its slot taken by another text.
    """
    seen: list[tuple[list[int], Tensor]] = []
    texts: dict[int, list[int]] = {}
    read_steps = engine_module.read_steps

    def recording(blocks: Sequence[LogitRows], want: Want) -> list[TargetStep]:
        for block in blocks:
            prefix = texts[block.sampling.seed][: block.position + len(block.ids)]
            seen.append((prefix, block.logits_KV.clone()))
        return read_steps(blocks, want)

    monkeypatch.setattr(engine_module, "read_steps", recording)
    engine = _local(model)
    generator = random.Random(1)
    sessions: list[Session] = []
    for number in range(4):
        if number == 3:
            sessions.pop(1).close()
        texts[number] = _ids(5 + 13 * number, number)
        sampling = Sampling(seed=number, temperature=0.0, top_k=0, top_p=1.0)
        sessions.append(engine.open(texts[number], sampling))
        for _ in range(4):
            requests = []
            for session in generator.sample(sessions, generator.randint(1, len(sessions))):
                text = texts[session.sampling.seed]
                if generator.random() < 0.5:
                    session.position = generator.randint(max(0, session.position - 20), session.position)
                    del text[session.position :]
                new = _ids(generator.choice([1, 1, 2, 6, 40]), generator.randrange(10**6))
                text += new
                requests.append((session, new))
            wants: list[Want] = ["all", "all", "last"]
            engine.extend(requests, generator.choice(wants))
    assert max(len(prefix) for prefix, _ in seen) > 5 * WINDOW
    with torch.inference_mode():
        return max(
            float((model(torch.tensor([prefix])).logits[0, -len(logits_KV) :] - logits_KV).abs().max())
            for prefix, logits_KV in seen
        )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.usefixtures("float64_softmax")
def test_logits_are_those_of_transformers(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _worst_error(random_model(architecture, torch.float64), monkeypatch) <= 1e-10


@pytest.mark.usefixtures("float64_softmax")
def test_logits_are_those_of_transformers_with_tied_embeddings_and_other_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(
        "gemma3", torch.float64, tie_word_embeddings=True, num_attention_heads=8, num_key_value_heads=1, head_dim=8
    )
    assert _worst_error(model, monkeypatch) <= 1e-10


def _shifted(mask: Callable[..., Any], by: int) -> Callable[..., Any]:
    """A mask of queries that stand so many positions further on."""

    def shifted(**options: Any) -> Any:
        positions = options["q_offset"]
        if isinstance(positions, kv_module._Positions):
            later = kv_module._Positions(positions)
            later.ids_BT = positions.ids_BT + by
            options["q_offset"] = later
        return mask(**options)

    return shifted


def _wider(mask: Callable[..., Any]) -> Callable[..., Any]:
    """A mask that shows what stood one position further back, too."""

    def wider(**options: Any) -> Any:
        rule = options.get("mask_function", causal_mask_function)
        options["mask_function"] = lambda b, h, q, k: (rule(b, h, q, k) | rule(b, h, q - 1, k)) & (k <= q)
        return mask(**options)

    return wider


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("fault", ["sees one too many", "sees one too few", "window one too wide", "writes one early"])
@pytest.mark.usefixtures("float64_softmax")
def test_a_cache_that_is_off_by_one_fails_the_same_check(
    architecture: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(architecture, torch.float64)
    faulty: Callable[..., Any] | None
    if fault == "window one too wide":
        if architecture in ("llama", "qwen3"):
            pytest.skip("has no window")
        faulty = _wider
    elif fault == "writes one early":
        monkeypatch.setattr(SlotCache, "_positions", _early_positions(SlotCache._positions))
        faulty = None
    else:
        faulty = functools.partial(_shifted, by=1 if "many" in fault else -1)
    if faulty is not None:
        kind = model.config._attn_implementation
        monkeypatch.setitem(
            AttentionMaskInterface._global_mapping, kind, _in_our_passes(faulty, kv_module._MASKS[kind])
        )
    assert not _worst_error(model, monkeypatch) <= 1e-10  # also when it is not a number


def _in_our_passes(faulty: Callable[..., Any], mask: Callable[..., Any]) -> Callable[..., Any]:
    """The faulty mask where a `SlotCache` asks; transformers' own, which it is compared with, stays right."""

    def either(**options: Any) -> Any:
        return (faulty(mask) if isinstance(options.get("q_offset"), kv_module._Positions) else mask)(**options)

    return either


def _early_positions(positions: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, batch, counts: (positions(self, batch, counts) - 1).clamp(min=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.usefixtures("float64_softmax")
def test_greedy_text_is_that_of_generate(architecture: str) -> None:
    model: Any = random_model(architecture, torch.float64)
    prompt = _ids(19, 7)
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False)[0, len(prompt) :].tolist()
    assert len(set(expected)) > 5, "a text that repeats itself proves little"
    assert _generate(_local(model), prompt, Sampling.greedy(), 60) == expected


@pytest.mark.parametrize("sampling", [Sampling.greedy(), SAMPLED])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_four_sessions_together_write_their_solo_texts(architecture: str, sampling: Sampling) -> None:
    model = random_model(architecture, torch.float64)
    prompts = [_ids(3 + 11 * number, number) for number in range(4)]
    solo = [_generate(_local(model), prompt, sampling, 50) for prompt in prompts]
    engine = _local(model)
    sessions = [engine.open(prompt, sampling) for prompt in prompts]
    texts = [list(session.step.next_ids) for session in sessions if session.step]
    generator = random.Random(4)
    while min(len(text) for text in texts) < 50:
        chosen = generator.sample(range(4), generator.randint(1, 4))
        requests = []
        for number in chosen:  # some bring guesses, good and bad: the answer is the longest right prefix
            known = solo[number][len(texts[number]) :][: generator.randint(0, 3)]
            guesses = [*known, generator.randrange(VOCABULARY)]
            requests.append((sessions[number], [texts[number][-1], *guesses]))
        for number, (session, ids), step in zip(chosen, requests, engine.extend(requests, "all")):
            right = _accepted(ids, step)
            session.position -= len(ids) - 1 - right
            texts[number] += step.next_ids[: right + 1]
    assert [text[:50] for text in texts] == solo


def _accepted(ids: Sequence[int], step: TargetStep) -> int:
    right = 0
    while right < len(ids) - 1 and ids[right + 1] == step.next_ids[right]:
        right += 1
    return right


def test_steps_carry_cross_entropies_and_margins() -> None:
    model: Any = random_model("llama", torch.float64)
    text = _ids(30, 3)
    with torch.inference_mode():
        logits_TV = model(torch.tensor([text])).logits[0]
    expected = torch.nn.functional.cross_entropy(logits_TV[:-1], torch.tensor(text[1:]), reduction="none").tolist()
    engine = _local(model)
    with engine.open([], Sampling.greedy()) as session:
        [step] = engine.extend([(session, text)], "all")  # 30 tokens in chunks of 7
        assert math.isnan(step.nll[0])
        assert step.nll[1:] == pytest.approx(expected, abs=1e-10)
        best_two = logits_TV.topk(2).values
        assert step.margin == pytest.approx((best_two[:, 0] - best_two[:, 1]).tolist(), abs=1e-10)
        own = step.next_ids[19]
        session.position = 20
        [again] = engine.extend([(session, [own, 5])], "all")
        assert again.nll[0] == step.next_nll[19], "what the target put there itself is known"
        [other] = engine.extend([(session, [(again.next_ids[-1] + 1) % VOCABULARY])], "all")
        assert math.isnan(other.nll[0]), "and nothing else is"
        [last] = engine.extend([(session, [1, 2, 3])], "last")
        assert (len(last.next_ids), len(last.margin), last.nll) == (1, 1, [])
        assert session.position == 26


def test_a_long_prompt_is_run_in_chunks_and_costs_the_head_once() -> None:
    model: Any = random_model("llama", torch.float64)
    widths: list[int] = []
    heads: list[int] = []
    engine = _local(model)
    model.model.layers[0].register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    model.lm_head.register_forward_pre_hook(lambda module, args: heads.append(args[0].shape[1]))
    engine.open(_ids(30, 1), Sampling.greedy())
    assert (widths, heads) == ([7, 7, 7, 7, 2], [1])


def test_a_short_session_does_not_pay_for_a_long_prompt() -> None:
    model: Any = random_model("llama", torch.float64)
    engine = _local(model, prefill_chunk=64)
    sessions = [engine.open(_ids(count, count), Sampling.greedy()) for count in (3, 0, 4)]
    shapes: list[tuple[int, ...]] = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape[:2])))
    engine.extend([(sessions[0], [1]), (sessions[1], _ids(40, 9)), (sessions[2], [1, 2])], "last")
    assert shapes == [(1, 40), (2, 2)]


def test_sessions_come_and_go_without_a_trace() -> None:
    model = random_model("mistral", torch.float64)
    engine = _local(model, sessions=2)
    expected = _generate(_local(model, sessions=1), _ids(5, 1), SAMPLED, 20)
    for number in range(6):
        with engine.open(_ids(150, number), SAMPLED):
            assert _generate(engine, _ids(5, 1), SAMPLED, 20) == expected
    with engine.open([1], SAMPLED), engine.open([1], SAMPLED), pytest.raises(CacheFull):
        engine.open([1], SAMPLED)


def test_a_cache_without_room_leaves_every_session_where_it_was() -> None:
    model: Any = random_model("llama", torch.float64)
    per_position = _local(model).cache.bytes_per_position
    engine = _local(model, kv_limit_bytes=2 * 32 * per_position)
    assert (engine.context, engine.longest) == (200, 64)
    with pytest.raises(CacheFull, match="room for a sequence of 64 positions is left, got 200"):
        engine.open([1], Sampling.greedy())
    first, second = engine.open(_ids(20, 1), Sampling.greedy(), 32), engine.open(_ids(9, 2), Sampling.greedy(), 10)
    text = _generate(_local(model), _ids(20, 1), Sampling.greedy(), 5)
    with pytest.raises(ValueError, match=r"at most the 10 tokens that were promised, got 9 \+ 2"):
        engine.extend([(first, text[:1]), (second, [1, 2])], "all")
    assert (first.position, second.position) == (20, 9)
    [step] = engine.extend([(first, text[:4])], "all")
    assert step.next_ids == text[1:]
    with pytest.raises(CacheFull):
        engine.open([1], Sampling.greedy(), 16)
    second.close()
    engine.open(_ids(20, 5), Sampling.greedy(), 20).close()


# What every engine refuses


def _synthetic(**changes: Any) -> SyntheticEngine:
    options: dict[str, Any] = {
        "vocabulary_size": VOCABULARY,
        "context": 200,
        "sessions": 4,
        "step_seconds": 0.0,
        "row_seconds": 0.0,
        "agreement": 1.0,
    }
    return SyntheticEngine(**{**options, **changes})


@pytest.fixture(params=["local", "synthetic"])
def any_engine(request: pytest.FixtureRequest) -> Engine:
    return _local(random_model("llama", torch.float32)) if request.param == "local" else _synthetic()


def test_wrong_requests_are_refused(any_engine: Engine) -> None:
    session = any_engine.open(_ids(10, 1), Sampling.greedy())
    refused: list[tuple[list[Request], str]] = [
        ([(session, [3, VOCABULARY])], rf"ids must be in \[0, {VOCABULARY}\), got {VOCABULARY}"),
        ([(session, [-1])], rf"ids must be in \[0, {VOCABULARY}\), got -1"),
        ([(session, [])], "ids must not be empty"),
        ([(session, [1] * 191)], r"at most the 200 tokens that were promised, got 10 \+ 191"),
        ([(session, [1]), (session, [2])], "sessions must be different"),
    ]
    for requests, message in refused:
        with pytest.raises(ValueError, match=message):
            any_engine.extend(requests, "all")
    for position in (-1, 11):
        with pytest.raises(ValueError, match=rf"position must be in \[0, 10\], got {position}"):
            session.position = position
    with pytest.raises(ValueError, match="prompt must be at most the context of 200 tokens, got 201"):
        any_engine.open([1] * 201, Sampling.greedy())
    for most in (0, 9, 201):
        with pytest.raises(ValueError, match=rf"most_tokens must be in \[10, 200\], got {most}"):
            any_engine.open([1] * 10, Sampling.greedy(), most)
    assert len(any_engine.extend([(session, [1] * 190)], "all")[0].next_ids) == 190
    session.close()
    session.close()
    with pytest.raises(ValueError, match="session must be open"):
        any_engine.extend([(session, [1])], "all")
    sessions = [any_engine.open([1], Sampling.greedy()) for _ in range(4)]
    with pytest.raises(CacheFull):
        any_engine.open([1], Sampling.greedy())
    sessions[2].close()
    any_engine.open([1], Sampling.greedy())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"context": 257}, r"context must be in \[1, 256\], got 257"),
        ({"prefill_chunk": 0}, "prefill_chunk must be at least 1, got 0"),
        ({"exact_rows": 0}, "exact_rows must be at least 1, got 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(option: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _local(random_model("llama", torch.float32), **option)


# Exact shapes


def _verified(engine: Engine, prompt: Sequence[int], expected: TargetStep, wrong_every: int) -> TargetStep:
    """The text again, verified in passes of up to eight guesses, of which every so many is wrong."""
    with engine.open(prompt, SAMPLED) as session:
        assert session.step is not None
        seen = session.step
        while len(seen.next_ids) < len(expected.next_ids):
            done = len(seen.next_ids)
            guesses = expected.next_ids[done : done + 8]
            guesses = [
                (token + (done + at) % wrong_every // (wrong_every - 1)) % 97 for at, token in enumerate(guesses)
            ]
            ids = [seen.next_ids[-1], *guesses]
            [step] = engine.extend([(session, ids)], "all")
            right = _accepted(ids, step)
            session.position -= len(ids) - 1 - right
            seen = seen.then(
                TargetStep(step.next_ids[: right + 1], step.next_nll[: right + 1], step.margin[: right + 1], [])
            )
    return seen


def _decoded(engine: Engine, prompt: Sequence[int], count: int) -> TargetStep:
    with engine.open(prompt, SAMPLED) as session:
        assert session.step is not None
        seen = session.step
        while len(seen.next_ids) < count:
            seen = seen.then(engine.extend([(session, seen.next_ids[-1:])], "last")[0])
    return seen


def _same_bits(engine: Engine, count: int = 60) -> tuple[bool, bool]:
    """Whether decoding and verifying give the same ids, and the same bits of cross-entropy for each."""
    prompt = _ids(21, 6)
    one = _decoded(engine, prompt, count)
    other = _verified(engine, prompt, one, wrong_every=5)
    return one.next_ids == other.next_ids[:count], one.next_nll == other.next_nll[:count]


def _wide_model(architecture: str, dtype: torch.dtype) -> Any:
    """Large enough for the shape of a pass to show in the last bits of this dtype (bfloat16 hides more)."""
    size = 512 if dtype == torch.bfloat16 else 128
    return random_model(
        architecture,
        dtype,
        hidden_size=size,
        intermediate_size=size,
        num_hidden_layers=2,
        **{"layer_types": ["sliding_attention", "full_attention"]} if architecture != "llama" else {},
    )


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_exact_shapes_verify_and_decode_to_the_same_bits(architecture: str, dtype: torch.dtype) -> None:
    engine = _local(_wide_model(architecture, dtype), sessions=2, exact_rows=9)
    with engine.open(_ids(30, 2), SAMPLED):  # a neighbour that sits still
        assert _same_bits(engine) == (True, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # bfloat16's own units round every shape alike
def test_without_exact_shapes_the_same_check_sees_other_bits(dtype: torch.dtype) -> None:
    assert not _same_bits(_local(_wide_model("llama", dtype)))[1]


def test_the_probe_refuses_a_model_whose_rows_are_not_equal() -> None:
    for dim in (0, 1):  # the row in the batch, the position in the pass

        def uneven(module: Any, inputs: Any, output: Tensor, dim: int = dim) -> Tensor:
            place = torch.arange(output.shape[dim]).view(-1, *[1] * (output.dim() - dim - 1))
            return output + (place == 2) * 1e-4

        model: Any = random_model("llama", torch.float32)
        _local(model, exact_rows=4)
        model.model.layers[1].register_forward_hook(uneven)
        with pytest.raises(ShapeDependence, match="exact shapes do not hold on cpu"):
            _local(model, exact_rows=4)


def test_the_probe_sees_a_difference_that_only_a_full_cache_shows() -> None:
    model: Any = random_model("llama", torch.float32)
    _local(model, exact_rows=4)
    attend = torch.nn.functional.scaled_dot_product_attention

    def uneven(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        out: Tensor = attend(query, key, value, **options)
        out[:, :, 3:] += 1e-4 * value[:, :1, 50:100].mean()
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", uneven)
        with pytest.raises(ShapeDependence):
            _local(model, exact_rows=4)


def test_exact_shapes_want_one_thread() -> None:
    torch.set_num_threads(2)
    with pytest.raises(ValueError, match="torch threads must be 1 with exact shapes on a CPU, got 2"):
        _local(random_model("llama", torch.float32), exact_rows=4)


# SyntheticEngine


def test_synthetic_text_depends_on_seed_and_prefix_only() -> None:
    engine, other = _synthetic(), _synthetic(context=150, sessions=1)
    prompt = _ids(9, 1)
    text = _generate(engine, prompt, SAMPLED, 60)
    assert _generate(other, prompt, SAMPLED, 60) == text
    assert len(set(text)) > 30
    assert _generate(engine, prompt, Sampling.greedy(), 60) != text
    assert _generate(engine, [*prompt[:-1], prompt[-1] ^ 1], SAMPLED, 60) != text
    with engine.open(prompt, SAMPLED) as session:
        engine.extend([(session, [*text[:10], 1, 2, 3])], "all")
        session.position = len(prompt) + 10
        [step] = engine.extend([(session, text[10:20])], "all")
        assert step.next_ids == text[11:21]
        assert step.nll == [0.0] * 10
        [step] = engine.extend([(session, [text[20], (text[21] + 1) % VOCABULARY, 0])], "all")
        assert step.nll[:2] == [0.0, math.log(VOCABULARY)]


@pytest.mark.parametrize("agreement", [0.0, 0.3, 0.8, 1.0])
def test_a_synthetic_drafter_is_right_as_often_as_told_and_independently(agreement: float) -> None:
    target, drafter = _synthetic(context=5000), _synthetic(context=5000, agreement=agreement)
    text = _generate(target, [1, 2, 3], SAMPLED, 4000)
    with drafter.open([1, 2, 3], SAMPLED) as session:
        [step] = drafter.extend([(session, text)], "all")
    right = [guess == token for guess, token in zip(step.next_ids, text[1:])]
    error = 4 * math.sqrt(agreement * (1 - agreement) / len(right))
    assert sum(right) / len(right) == pytest.approx(agreement, abs=error + 1e-12)
    after_a_hit = [now for before, now in itertools.pairwise(right) if before]
    if after_a_hit:
        assert sum(after_a_hit) / len(after_a_hit) == pytest.approx(agreement, abs=2 * error + 1e-12)
    assert all(0 <= token < VOCABULARY for token in step.next_ids)


def test_a_synthetic_pass_takes_the_time_it_is_told() -> None:
    slept: list[float] = []
    engine = _synthetic(step_seconds=40.0, row_seconds=0.8, sleep=slept.append)
    sessions = [engine.open([], SAMPLED), engine.open([5], SAMPLED)]
    engine.extend([(sessions[0], [1] * 9)], "all")
    engine.extend([(sessions[0], [1]), (sessions[1], [1, 2])], "all")
    assert slept == pytest.approx([40.0, 40 * (1 + 0.02 * 8), 40 * (1 + 0.02 * 2)], abs=0.5)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"vocabulary_size": 1}, "vocabulary_size must be at least 2, got 1"),
        ({"agreement": 1.1}, r"agreement must be in \[0, 1\], got 1.1"),
        ({"step_seconds": -1.0}, "step_seconds and row_seconds must be at least 0"),
    ],
)
def test_synthetic_options_that_make_no_sense_are_refused(option: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _synthetic(**option)


# open_split_engine


def test_a_split_engine_is_found_by_name_and_takes_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, given = inspect.signature(join_shards).parameters, inspect.signature(open_split_engine).parameters
    assert [name for name in asked if name in given] == list(given)
    assert [parameter for name, parameter in asked.items() if name in given] == list(given.values())
    monkeypatch.setattr(join_shards.__module__ + ".join_shards", lambda **options: options)
    options: Any = {name: object() for name in given}
    assert open_split_engine(**options) == options
