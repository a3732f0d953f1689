import math
import random
from collections.abc import Sequence
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from lab.learning.examples import IGNORED, Batch, Example, batches, collate
from lab.learning.training import (
    Diverged,
    Proximal,
    StepFigures,
    accumulate_gradients,
    adamw,
    autocast,
    batch_loss,
    clip_gradients,
    derive_seed,
    evaluate,
    learning_rate_at,
    seed_everything,
    token_cross_entropy,
    train_steps,
    trainable_parameters,
)
from lab.settings import OptimizationSettings

VOCABULARY = 61
torch.set_num_threads(1)


def small_model(dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).to(dtype)


def some_examples(count: int, seed: int = 0) -> list[Example]:
    """Of different lengths, with different shares of counted tokens."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        length = int(generator.integers(4, 24))
        counted = generator.random(length) < generator.random()
        counted[-1] = True
        found.append(Example(generator.integers(0, VOCABULARY, length).astype(np.int32), counted))
    return found


def optimization(**changes: Any) -> OptimizationSettings:
    values: dict[str, Any] = {
        "learning_rate": 1e-3,
        "final_learning_rate_fraction": 0.1,
        "warmup_steps": 2,
        "weight_decay": 0.0,
        "beta1": 0.9,
        "beta2": 0.999,
        "max_gradient_norm": 0.0,
        "batch_size": 4,
        "accumulation": 1,
    }
    return OptimizationSettings(**(values | changes))


def gradients(model: torch.nn.Module, micro_batches: Sequence[Batch]) -> list[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    accumulate_gradients(model, micro_batches)
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def largest_difference(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> float:
    return max(float((a - b).detach().abs().max()) for a, b in zip(left, right, strict=True))


# --- the loss


def loss_oracle(logits_BTV: np.ndarray, labels_BT: np.ndarray) -> tuple[float, int]:
    """Token by token, in float64."""
    total, count = 0.0, 0
    for logits_TV, labels_T in zip(logits_BTV.astype(np.float64), labels_BT):
        for before, label in zip(logits_TV[:-1], labels_T[1:]):
            if label != IGNORED:
                total += float(np.log(np.exp(before - before.max()).sum()) + before.max() - before[label])
                count += 1
    return total, count


@given(st.integers(1, 4), st.integers(2, 700), st.integers(0, 2**32 - 1), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_the_loss_is_that_of_a_float64_oracle(rows: int, length: int, seed: int, share: float) -> None:
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 5, (rows, length, 11))
    labels = np.where(generator.random((rows, length)) < share, generator.integers(0, 11, (rows, length)), IGNORED)
    expected, count = loss_oracle(logits, labels)
    loss, counted = token_cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels))
    assert counted == count
    assert loss.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert loss.dtype == torch.float64
    single, _ = token_cross_entropy(torch.from_numpy(logits).float(), torch.from_numpy(labels))
    assert single.item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_the_oracle_notices_labels_that_are_not_shifted() -> None:
    """Control: comparing position t with label t is another loss."""
    logits, labels = np.random.default_rng(0).normal(0, 5, (1, 20, 11)), np.arange(20)[None] % 11
    unshifted = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits[0]), torch.from_numpy(labels[0]), reduction="sum"
    )
    assert unshifted.item() != pytest.approx(loss_oracle(logits, labels)[0], rel=1e-2)


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits = torch.randn(2, 2000, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.randint(0, 7, (2, 2000), generator=torch.Generator().manual_seed(1))
    loss, _ = token_cross_entropy(logits, labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(loss_oracle(logits.double().numpy(), labels.numpy())[0], rel=1e-5)


def test_only_counted_tokens_have_a_gradient() -> None:
    logits = torch.randn(1, 6, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[0, IGNORED, 2, IGNORED, 4, 1]])
    token_cross_entropy(logits, labels)[0].backward()
    assert logits.grad is not None
    assert [bool(row.any()) for row in logits.grad[0]] == [False, True, False, True, True, False]


def test_padding_changes_nothing() -> None:
    model, found = small_model(), some_examples(5)
    together = batch_loss(model, collate(found)).item()
    alone = sum(batch_loss(model, collate([example])).item() for example in found)
    assert together == pytest.approx(alone, rel=1e-12)


def test_padding_that_is_attended_to_from_the_left_would_change_it() -> None:
    """Control: the attention mask reaches the model."""
    model, batch = small_model(), collate(some_examples(2))
    blind = Batch(batch.ids_BT, batch.attention_BT.clone(), batch.labels_BT, batch.targets)
    blind.attention_BT[:, 0] = 0
    assert batch_loss(model, blind).item() != pytest.approx(batch_loss(model, batch).item(), rel=1e-6)


# --- gradients


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_micro_batches_give_the_gradient_of_one_big_batch(sizes: list[int], seed: int) -> None:
    model, found = small_model(), some_examples(sum(sizes), seed)
    whole = gradients(model, [collate(found)])
    rest = iter(found)
    cut = [collate([next(rest) for _ in range(size)]) for size in sizes]
    assert largest_difference(gradients(model, cut), whole) < 1e-12


def test_a_mean_of_means_is_another_gradient() -> None:
    """Control: averaging each micro-batch's own mean, as is often done, fails the comparison above."""
    model, found = small_model(), some_examples(6)
    cut = [collate(found[:1]), collate(found[1:])]
    means = [gradients(model, [batch]) for batch in cut]
    mean_of_means = [(first + second) / 2 for first, second in zip(*means)]
    assert largest_difference(mean_of_means, gradients(model, cut)) > 1e-4


def test_the_loss_that_is_reported_is_the_one_that_is_differentiated() -> None:
    model, cut = small_model(), [collate(some_examples(3)), collate(some_examples(2, seed=1))]
    loss, tokens = accumulate_gradients(model, cut)
    assert tokens == sum(batch.targets for batch in cut)
    assert loss == pytest.approx(sum(batch_loss(model, batch).item() for batch in cut) / tokens)


def test_fedprox_adds_mu_times_the_distance() -> None:
    model, batch, mu = small_model(), collate(some_examples(3)), 0.3
    parameters = trainable_parameters(model)
    proximal = Proximal.around(model, mu)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter))
    plain = gradients(model, [batch])
    proximal.add_gradient(parameters)
    added = [parameter.grad for parameter in parameters]

    model.zero_grad()  # the oracle: autograd through the term as the paper writes it
    distance = sum(((p - a) ** 2).sum() for p, a in zip(parameters, proximal.anchors))
    (batch_loss(model, batch) / batch.targets + mu / 2 * distance).backward()
    oracle = [parameter.grad for parameter in parameters]
    assert largest_difference(added, oracle) < 1e-12  # type: ignore[arg-type]
    assert largest_difference(plain, oracle) > 0.1, "control: without the term it is another gradient"  # type: ignore[arg-type]


def test_fedprox_keeps_the_weights_near() -> None:
    def distance(mu: float) -> float:
        model = small_model()
        proximal = Proximal.around(model, mu)
        # Plain gradient descent: Adam would rescale the term away.
        descent = torch.optim.SGD(model.parameters())
        run(model, steps=20, optimizer=descent, proximal=proximal, learning_rate=0.1)
        return sum(float(((p.detach() - a) ** 2).sum()) for p, a in zip(model.parameters(), proximal.anchors))

    assert distance(5.0) < 0.5 * distance(0.0)


@pytest.mark.parametrize(("limit", "expected"), [(0.0, 5.0), (10.0, 5.0), (1.0, 1.0)])
def test_clipping_keeps_the_direction_and_says_the_norm_before(limit: float, expected: float) -> None:
    weights = [torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))]
    for weight, value in zip(weights, (3.0, 4.0)):
        weight.grad = torch.tensor([value])
    assert clip_gradients(weights, limit) == pytest.approx(5.0)
    left = [float(weight.grad) for weight in weights if weight.grad is not None]
    assert math.hypot(*left) == pytest.approx(expected, rel=1e-5)
    assert left[0] / left[1] == pytest.approx(0.75)


# --- the schedule


def test_the_schedule_by_hand() -> None:
    values = [learning_rate_at(step, 7, optimization(learning_rate=1.0)) for step in range(7)]
    half_way = 0.1 + 0.9 / 2
    quarter = 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2
    assert values == pytest.approx([1 / 3, 2 / 3, 1.0, quarter, half_way, 1.1 - quarter, 0.1])


@given(st.integers(1, 200), st.integers(0, 50), st.floats(0, 1))
def test_the_schedule_rises_to_the_peak_and_falls_to_the_fraction(total: int, warmup: int, final: float) -> None:
    settings_ = optimization(learning_rate=2.0, warmup_steps=warmup, final_learning_rate_fraction=final)
    values = [learning_rate_at(step, total, settings_) for step in range(total)]
    assert all(0 <= value <= 2.0 for value in values)
    assert values[:warmup] == sorted(values[:warmup])
    assert values[warmup:] == sorted(values[warmup:], reverse=True)
    if total > warmup:
        assert values[warmup] == pytest.approx(2.0)
    if total > warmup + 1:
        assert values[-1] == pytest.approx(2.0 * final)


# --- seeds


def test_derived_seeds_differ_by_every_part_and_fit_63_bits() -> None:
    seeds = {derive_seed(s, name, r, p) for s in range(5) for name in ("a", "b") for r in range(10) for p in range(10)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 23) != derive_seed(12, 3) != derive_seed(1, "23")


def test_a_derived_seed_is_the_same_in_every_process_and_version() -> None:
    assert derive_seed(7, "order", 3, 1) == 4251883894474443244


def test_seeding_covers_torch_numpy_and_random() -> None:
    def draw() -> tuple[float, float, float]:
        return float(torch.rand(1)), float(np.random.rand()), random.random()

    assert seed_everything(3, "x") == derive_seed(3, "x")
    first = draw()
    other = draw()
    seed_everything(3, "x")
    assert draw() == first != other


# --- the loop


def run(model: torch.nn.Module, steps: int = 6, **changes: Any) -> list[StepFigures]:
    """`steps` steps over sixteen examples, one after the other."""
    taken: list[StepFigures] = []
    arguments: dict[str, Any] = {"first_step": 0, "total_steps": steps, "steps": steps, "seed": 1}
    arguments["on_step"] = taken.append
    own = {key: changes.pop(key) for key in list(changes) if key in OptimizationSettings.__dataclass_fields__}
    stream = changes.pop("stream", None) or batches(some_examples(16), 4, seed=9)
    train_steps(model, stream, optimization(**own), **(arguments | changes))
    return taken


def test_training_lowers_the_loss_of_held_out_examples_of_the_same_kind() -> None:
    model = small_model()
    repeating = [Example(np.arange(20, dtype=np.int32) + start, np.ones(20, dtype=np.bool_)) for start in range(30)]
    before = evaluate(model, repeating[20:], 4)
    run(model, steps=40, learning_rate=1e-2, stream=batches(repeating[:20], 4, seed=0))
    assert evaluate(model, repeating[20:], 4) < 0.7 * before


def test_figures_of_a_run_are_token_weighted() -> None:
    model = small_model()
    taken: list[StepFigures] = []
    total = train_steps(
        model,
        batches(some_examples(16), 3, seed=2),
        optimization(accumulation=2),
        first_step=4,
        total_steps=10,
        steps=3,
        seed=0,
        on_step=taken.append,
    )
    assert [step.step for step in taken] == [4, 5, 6]
    assert [step.learning_rate for step in taken] == [learning_rate_at(s, 10, optimization()) for s in (4, 5, 6)]
    assert total.steps == 3
    assert total.tokens == sum(step.tokens for step in taken)
    assert total.loss == pytest.approx(np.average([s.loss for s in taken], weights=[s.tokens for s in taken]))
    assert total.gradient_norm == pytest.approx(np.mean([s.gradient_norm for s in taken]))
    assert total.seconds > 0


def test_steps_are_adamw_steps_on_the_clipped_gradients_of_all_their_batches() -> None:
    found = [collate(some_examples(3, seed=s)) for s in range(4)]
    ours, oracle = small_model(), small_model()
    own = optimization(accumulation=2, max_gradient_norm=0.05, warmup_steps=0, weight_decay=0.01)
    train_steps(ours, iter(found), own, first_step=0, total_steps=2, steps=2, seed=0)

    stepper = torch.optim.AdamW(oracle.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01)
    for pair, learning_rate in ((found[:2], 1e-3), (found[2:], 1e-4)):
        oracle.zero_grad()
        loss = torch.stack([batch_loss(oracle, batch) for batch in pair]).sum()
        (loss / sum(batch.targets for batch in pair)).backward()
        torch.nn.utils.clip_grad_norm_(oracle.parameters(), 0.05)
        stepper.param_groups[0]["lr"] = learning_rate
        stepper.step()
    assert largest_difference(list(ours.parameters()), list(oracle.parameters())) < 1e-12


def test_an_optimizer_that_is_handed_on_continues_and_a_fresh_one_does_not() -> None:
    def weights(kept: bool) -> list[torch.Tensor]:
        model, stream = small_model(), batches(some_examples(16), 4, seed=9)
        optimizer = adamw(model, optimization()) if kept else None
        for first in (0, 3):
            train_steps(
                model, stream, optimization(), first_step=first, total_steps=6, steps=3, seed=1, optimizer=optimizer
            )
        return list(model.parameters())

    model = small_model()
    run(model, steps=6)
    assert largest_difference(weights(kept=True), list(model.parameters())) == 0
    assert largest_difference(weights(kept=False), list(model.parameters())) > 0


def test_frozen_parameters_stay() -> None:
    model = small_model()
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    run(model)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {"lm_head.weight"}


class WithDropout(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(VOCABULARY, 16)
        self.dropout = torch.nn.Dropout(0.5)
        self.head = torch.nn.Linear(16, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.dropout(self.embedding(input_ids))))


def test_dropout_follows_the_seed_and_is_off_in_evaluation() -> None:
    def losses(seed: int) -> list[float]:
        torch.rand(seed + 1)  # whatever was drawn before
        return [step.loss for step in run(WithDropout(), seed=seed)]

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)
    model = WithDropout()
    model.eval()
    run(model)
    assert not model.training, "left as it was found"
    assert evaluate(model.train(), some_examples(4), 2) == evaluate(model, some_examples(4), 2)
    assert model.training


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_the_step_and_leaves_the_weights(value: float) -> None:
    model = WithDropout()
    stream = cycle([collate(some_examples(4))])
    calls = iter([0.0, 0.0, value])
    model.register_forward_hook(lambda module, inputs, output: SimpleNamespace(logits=output.logits + next(calls)))
    snapshots: list[torch.Tensor] = []
    with pytest.raises(Diverged, match=r"loss must be finite, got nan at step 7 \(learning rate"):
        run(
            model,
            stream=stream,
            first_step=5,
            total_steps=20,
            on_step=lambda taken: snapshots.append(model.head.weight.detach().clone()),
        )
    assert len(snapshots) == 2
    assert torch.equal(model.head.weight, snapshots[-1])


def test_a_gradient_that_is_not_finite_names_the_step() -> None:
    model = WithDropout()
    model.head.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(Diverged, match=r"gradient norm must be finite, got (nan|inf) at step 0"):
        run(model)


# --- evaluation


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 100])
def test_evaluation_does_not_depend_on_the_batch_size(batch_size: int) -> None:
    model, found = small_model(), some_examples(11)
    losses = [batch_loss(model, collate([example])).item() for example in found]
    mean = sum(losses) / sum(example.targets for example in found)
    assert evaluate(model, found, batch_size) == pytest.approx(mean, rel=1e-12)


def test_a_mean_over_batches_would_depend_on_it() -> None:
    """Control: what is often reported, the mean of the batches' means, is another number for another batch size."""
    model, found = small_model(), some_examples(11)

    def mean_of_means(size: int) -> float:
        cut = [collate(found[start : start + size]) for start in range(0, len(found), size)]
        return float(np.mean([batch_loss(model, batch).item() / batch.targets for batch in cut]))

    assert mean_of_means(1) != pytest.approx(mean_of_means(4), rel=1e-4)


# --- 4-bit layers


class WithNF4(torch.nn.Module):
    """A trainable layer below a frozen 4-bit one: its gradient has to come through."""

    def __init__(self) -> None:
        super().__init__()
        import bitsandbytes

        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(VOCABULARY, 64)
        weight = torch.nn.Linear(64, 64, bias=False).weight.data
        self.frozen = bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        self.frozen.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to("cpu")
        self.head = torch.nn.Linear(64, VOCABULARY).requires_grad_(False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.frozen(self.embedding(input_ids))))


def evaluate_unguarded(model: torch.nn.Module) -> None:
    """What everybody does between two rounds."""
    batch = collate(some_examples(4))
    with torch.no_grad():
        batch_loss(model.eval(), batch)
    model.train()


def test_evaluation_leaves_4_bit_layers_their_gradient() -> None:
    model, batch = WithNF4(), collate(some_examples(4))
    before = gradients(model, [batch])
    loss = batch_loss(model, batch).item() / batch.targets
    assert evaluate(model, some_examples(4), 4) == pytest.approx(loss, rel=1e-5)
    after = gradients(model, [batch])
    assert float(before[0].abs().max()) > 0
    assert largest_difference(after, before) == 0


def test_a_4_bit_layer_that_was_repacked_for_inference_is_refused() -> None:
    """Control: without the guard there is no gradient any more, on CPUs where bitsandbytes repacks."""
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("bitsandbytes repacks on CPUs with AVX512-BF16 only")
    model = WithNF4()
    evaluate_unguarded(model)
    loss = batch_loss(model, collate(some_examples(4)))
    assert not loss.requires_grad or torch.autograd.grad(loss, model.embedding.weight, allow_unused=True)[0] is None
    with pytest.raises(RuntimeError, match=r"frozen\.weight was repacked for inference and has no gradient"):
        run(model)


# --- precision


@pytest.mark.parametrize(
    ("dtype", "computes_in"),
    [(torch.float32, torch.float32), (torch.float64, torch.float64), (torch.bfloat16, torch.bfloat16)],
)
def test_on_a_cpu_only_a_bfloat16_model_computes_in_bfloat16(dtype: torch.dtype, computes_in: torch.dtype) -> None:
    frozen = torch.nn.Linear(2, 2).to(dtype).requires_grad_(False)
    adapter = torch.nn.Linear(2, 2).to(torch.promote_types(dtype, torch.float32))
    with autocast(torch.nn.Sequential(adapter, frozen)):
        assert adapter(torch.ones(1, 2, dtype=adapter.weight.dtype)).dtype == computes_in


def test_a_bfloat16_model_trains_its_float32_adapter() -> None:
    model = small_model(torch.bfloat16)
    model.requires_grad_(False)
    model.lm_head = torch.nn.Linear(32, VOCABULARY, bias=False)
    taken = run(model, steps=3)
    assert all(math.isfinite(step.loss) for step in taken)
    assert model.lm_head.weight.dtype == torch.float32
