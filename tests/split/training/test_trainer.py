"""A model that is cut learns as the whole one does: the same gradients, the same losses, the same weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lab.settings import Dtype, ModelSettings, Quantization, UserError
from split.training.messages import Recipe
from split.training.schedule import Schedule, even_bubble, replay
from split.training.settings import Train
from split.training.shard import MicroBatch, TrainingShard
from split.training.trainer import clip_scale
from split.training.weights import load_training_shard
from split.transport.inproc import InProcess
from tests.split.training.unsplit import (
    ADAPTER,
    BANDS,
    CPU,
    EVERYTHING,
    OPTIMIZATION,
    Unsplit,
    gradients_of,
    in_process,
    load_plain,
    model_settings,
    some_examples,
    trainer,
    worst,
)

CUTS = [(0, 2, 4), (0, 1, 3, 4), (0, 4)]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Detached(TrainingShard):
    """The mistake that "the loss goes down" does not notice: nothing comes back over the boundary."""

    def compute(self, micro_batch: MicroBatch) -> Tensor:
        if not self.is_first:
            micro_batch = micro_batch._replace(states=micro_batch.states.detach() + 0 * micro_batch.states)
        return super().compute(micro_batch)


def load_detached(settings: ModelSettings, layers: range, recipe: Recipe) -> TrainingShard:
    shard = load_training_shard(settings, CPU, layers, recipe)
    shard.__class__ = Detached
    return shard


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("dtype", BANDS)
@pytest.mark.parametrize("recipe", [EVERYTHING, ADAPTER], ids=lambda recipe: recipe.train.name)
def test_gradients_are_those_of_the_whole_model(
    cuts: Sequence[int], dtype: Dtype, recipe: Recipe, tmp_path: Path
) -> None:
    """One micro-batch does the same operations: to the bit. In the second step, where all of a fresh adapter's are
    there: those of A are zero as long as B is."""
    settings = model_settings(tmp_path, dtype)
    transport = in_process(settings, cuts, tmp_path)
    made = trainer(transport, tmp_path, recipe=recipe)
    made.train_step()
    assert worst(gradients_of(made, transport._stages), Unsplit(settings, recipe=recipe).gradients(after=1)) == 0.0


@pytest.mark.parametrize("schedule", Schedule)
@pytest.mark.parametrize("dtype", BANDS)
def test_micro_batches_add_up_to_the_same_gradients(schedule: Schedule, dtype: Dtype, tmp_path: Path) -> None:
    settings = model_settings(tmp_path, dtype)
    transport = in_process(settings, (0, 1, 3, 4), tmp_path)
    found = gradients_of(trainer(transport, tmp_path, micro_batches=4, schedule=schedule), transport._stages)
    assert worst(found, Unsplit(settings, micro_batches=4).gradients()) <= BANDS[dtype]


def test_a_detached_boundary_is_noticed(tmp_path: Path) -> None:
    """The control of the two above: the last shard alone would lower the loss."""
    settings = model_settings(tmp_path)
    transport = in_process(settings, (0, 2, 4), tmp_path, load_detached)
    found = gradients_of(trainer(transport, tmp_path), transport._stages)
    expected = Unsplit(settings).gradients()
    assert worst(found, expected) > 0.5
    made = trainer(in_process(settings, (0, 2, 4), tmp_path, load_detached), tmp_path, total_steps=12)
    losses = [made.train_step().loss for _ in range(12)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("dtype", BANDS)
def test_both_copies_of_a_tied_embedding_get_the_sum_and_stay_equal(dtype: Dtype, tmp_path: Path) -> None:
    settings = model_settings(tmp_path, dtype, tied=True)
    transport = in_process(settings, (0, 1, 3, 4), tmp_path)
    found = gradients_of(trainer(transport, tmp_path), transport._stages)
    expected = Unsplit(settings).gradients()
    assert torch.equal(found["model.embed_tokens.weight"], found["lm_head.weight"])
    assert worst(found, expected) <= BANDS[dtype]
    transport = in_process(settings, (0, 1, 3, 4), tmp_path)
    optimization = replace(OPTIMIZATION, max_gradient_norm=1.0)
    made = trainer(transport, tmp_path, optimization=optimization)
    ours = [made.train_step() for _ in range(4)]
    theirs = Unsplit(settings, optimization=optimization).train(4, 8)
    first, last = transport._stages[0].shard, transport._stages[-1].shard
    assert torch.equal(first.weights["model.embed_tokens.weight"], last.weights["lm_head.weight"])
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-6)
        assert mine.loss == pytest.approx(other.loss, rel=BANDS[dtype] * 10)


def test_200_steps_are_those_of_the_whole_model_to_the_bit(tmp_path: Path) -> None:
    """One micro-batch, float32, one thread. The first shard's weights move as there."""
    settings = model_settings(tmp_path)
    transport = in_process(settings, (0, 2, 4), tmp_path)
    made = trainer(transport, tmp_path, total_steps=200)
    before = {name: weight.detach().clone() for name, weight in first_shard(transport).items()}
    losses = [made.train_step().loss for _ in range(200)]
    whole = Unsplit(settings)
    assert losses == [figures.loss for figures in whole.train(200, 200)]
    assert losses[-1] < losses[0]
    weights = whole.weights()
    for name, weight in first_shard(transport).items():
        assert torch.equal(weight, weights[name])
        assert not torch.equal(weight, before[name])


def first_shard(transport: InProcess) -> dict[str, torch.nn.Parameter]:
    return transport._stages[0].shard.weights


def test_200_steps_of_4_micro_batches_with_clipping(tmp_path: Path) -> None:
    settings = model_settings(tmp_path, Dtype.float64)
    optimization = replace(OPTIMIZATION, max_gradient_norm=0.5)
    theirs = Unsplit(settings, optimization=optimization, micro_batches=4).train(200, 200)
    assert any(figures.gradient_norm > 0.5 for figures in theirs), "nothing was clipped"
    for schedule in Schedule:
        made = trainer(
            in_process(settings, (0, 2, 4), tmp_path), tmp_path, optimization=optimization, micro_batches=4,
            schedule=schedule, total_steps=200,
        )  # fmt: skip
        for other in theirs:
            mine = made.train_step()
            assert abs(mine.loss - other.loss) <= 1e-9, schedule
            assert mine.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-6), schedule
            assert mine.learning_rate == other.learning_rate, schedule


def test_accumulation_and_checkpointed_activations_change_nothing(tmp_path: Path) -> None:
    settings = model_settings(tmp_path, Dtype.float64)
    optimization = replace(OPTIMIZATION, accumulation=3)
    plain = Unsplit(settings, optimization=optimization, micro_batches=2).train(4, 8)
    for checkpointing in (False, True):
        recipe = Recipe(**{**_fields(EVERYTHING), "activation_checkpointing": checkpointing})
        made = trainer(
            in_process(settings, (0, 2, 4), tmp_path), tmp_path, optimization=optimization, micro_batches=2,
            recipe=recipe, schedule=Schedule.one_f_one_b,
        )  # fmt: skip
        for other in plain:
            assert made.train_step().loss == pytest.approx(other.loss, rel=1e-12)


def test_checkpointed_activations_are_not_kept(tmp_path: Path) -> None:
    settings = model_settings(tmp_path)
    checkpointed = Recipe(**{**_fields(EVERYTHING), "activation_checkpointing": True})
    assert kept_bytes(settings, checkpointed) < kept_bytes(settings, EVERYTHING) / 4


def kept_bytes(settings: ModelSettings, recipe: Recipe) -> int:
    """What autograd keeps of a micro-batch between its forward and its backward, weights apart."""
    shard = load_training_shard(settings, CPU, range(1, 3), recipe)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        shard.forward(MicroBatch(0, 0, torch.randn(4, 20, shard.hidden_size), [20] * 4, None, 80))
    weights = {weight.data_ptr() for weight in shard.weights.values()}
    return sum(size for place, size in kept.items() if place not in weights)


def _fields(recipe: Recipe) -> dict[str, object]:
    return {name: getattr(recipe, name) for name in recipe.__struct_fields__}


def test_16_bits_learn_on_float32_masters(tmp_path: Path) -> None:
    """Steps far smaller than a bfloat16's last bit add up in the masters; without them the weights would not move."""
    settings = model_settings(tmp_path, Dtype.bfloat16)
    optimization = replace(OPTIMIZATION, learning_rate=1e-5, warmup_steps=0, weight_decay=0.0)
    transport = in_process(settings, (0, 2, 4), tmp_path)
    made = trainer(transport, tmp_path, optimization=optimization, total_steps=40)
    before = {name: weight.detach().clone() for name, weight in first_shard(transport).items()}
    losses = [made.train_step().loss for _ in range(40)]
    assert all(map(math.isfinite, losses))
    assert all(weight.dtype == torch.bfloat16 for weight in first_shard(transport).values())
    optimizer = transport._stages[0].shard.optimizer
    assert optimizer is not None
    for name, parameter, master in zip(before, optimizer.parameters, optimizer.masters, strict=True):
        assert master.dtype == torch.float32
        assert torch.equal(master.bfloat16(), parameter)
        moved = (master.detach() - before[name].float()).abs()
        assert 0 < moved.max() < 40 * 2e-5
        large = moved[before[name].abs() > 0.1]  # one step is a hundredth of their last bit
        assert large.numel() == 0 or large.max() > 3e-5, "steps add up"
    name = "model.layers.0.self_attn.q_proj.weight"
    changed = int((first_shard(transport)[name] != before[name]).sum())
    assert 0 < changed < before[name].numel(), "some have crossed a bfloat16's last bit, others not yet"


@pytest.mark.parametrize("schedule", Schedule)
def test_what_a_shard_holds(schedule: Schedule, tmp_path: Path) -> None:
    made = trainer(
        in_process(model_settings(tmp_path), (0, 1, 3, 4), tmp_path), tmp_path, micro_batches=4, schedule=schedule
    )
    assert made.train_step().held == ([4, 4, 4] if schedule is Schedule.gpipe else [3, 2, 1])


def test_what_crosses_is_activations_and_gradients(tmp_path: Path) -> None:
    settings = model_settings(tmp_path)
    made = trainer(
        in_process(settings, (0, 1, 4), tmp_path), tmp_path, micro_batches=2, examples=some_examples(equal=True)
    )
    assert made.train_step().boundary_bytes == 2 * 4 * 20 * 32 * 4  # both ways, B x T x H in float32


def test_the_timeline_is_the_schedule_in_order(tmp_path: Path) -> None:
    made = trainer(in_process(model_settings(tmp_path), (0, 2, 4), tmp_path), tmp_path, micro_batches=4)
    figures = made.train_step()
    assert figures.timeline is not None
    orders = [[span.operation for span in shard] for shard in figures.timeline.shards]
    assert replay(orders, [1.0, 1.0], [1.0, 1.0]).bubble_fraction == pytest.approx(even_bubble(2, 4))
    assert figures.bubble_fraction >= 0.5, "in one process only one shard works at a time"


def test_clipping_is_torchs() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    optimization = replace(OPTIMIZATION, max_gradient_norm=2.0)
    norm = float(torch.nn.utils.clip_grad_norm_([weight], 2.0))
    assert torch.equal(weight.grad, torch.tensor([3.0, 4.0]) * clip_scale(norm, optimization))
    assert clip_scale(norm, OPTIMIZATION) == clip_scale(1.0, optimization) == 1.0


def test_nan_stops_the_run_and_names_step_shard_and_what_is_kept(tmp_path: Path) -> None:
    def load_poisoned(settings: ModelSettings, layers: range, recipe: Recipe) -> TrainingShard:
        shard = load_plain(settings, layers, recipe)
        forward = shard.forward

        def poisoned(micro_batch: MicroBatch) -> Tensor | None:
            hidden = forward(micro_batch)
            return hidden * math.nan if hidden is not None and micro_batch.step == 3 and layers.start == 1 else hidden

        shard.forward = poisoned  # type: ignore[method-assign]
        return shard

    made = trainer(in_process(model_settings(tmp_path), (0, 1, 3, 4), tmp_path, load_poisoned), tmp_path)
    for step in range(3):
        made.train_step()
        if step == 1:
            made.save()
    with pytest.raises(ValueError, match=r"nan.* at step 3, first at shard 2 \(layers 1:3\); step 2 is kept in .*"):
        made.train_step()


def test_a_gradient_that_is_not_finite_stops_the_run_too(tmp_path: Path) -> None:
    """The loss was: the backward of shard 2 went wrong, and what it sent to shard 1."""

    def load_poisoned(settings: ModelSettings, layers: range, recipe: Recipe) -> TrainingShard:
        shard = load_plain(settings, layers, recipe)
        backward = shard.backward

        def poisoned(micro_batch: int, gradient_BTH: Tensor | None) -> Tensor | None:
            is_second = layers.start == 1 and gradient_BTH is not None
            return backward(micro_batch, gradient_BTH * math.inf if is_second else gradient_BTH)

        shard.backward = poisoned  # type: ignore[method-assign]
        return shard

    made = trainer(in_process(model_settings(tmp_path), (0, 1, 3, 4), tmp_path, load_poisoned), tmp_path)
    rule = r"got loss \d\S* and gradient norm nan at step 0, first at shard 2 \(layers 1:3\); no step was saved yet"
    with pytest.raises(UserError, match=rule):
        made.train_step()


def test_lora_trains_the_adapter_only(tmp_path: Path) -> None:
    settings = model_settings(tmp_path)
    transport = in_process(settings, (0, 2, 4), tmp_path)
    made = trainer(transport, tmp_path, recipe=ADAPTER, micro_batches=2, total_steps=30)
    losses = [made.train_step().loss for _ in range(30)]
    theirs = Unsplit(settings, recipe=ADAPTER, micro_batches=2).train(30, 30)
    assert losses == pytest.approx([figures.loss for figures in theirs], abs=1e-4)
    assert all(".lora_" in name for name in first_shard(transport))
    assert made.trainable == [made.trainable[0]] * 2
    assert ADAPTER.train is Train.lora


def test_an_adapter_learns_on_a_base_in_4_bits(tmp_path: Path) -> None:
    """NF4 on every shard, in the blocks of the whole model; gradients go through all of it."""
    settings = replace(model_settings(tmp_path), quantization=Quantization.nf4)
    transport = in_process(settings, (0, 1, 3, 4), tmp_path)
    made = trainer(transport, tmp_path, recipe=ADAPTER, total_steps=5)
    theirs = Unsplit(settings, recipe=ADAPTER).train(5, 5)
    assert [made.train_step().loss for _ in range(5)] == [figures.loss for figures in theirs]
    plain = Unsplit(replace(settings, quantization=Quantization.none), recipe=ADAPTER).train(1, 5)
    assert abs(plain[0].loss - theirs[0].loss) > 1e-3, "the control: 4 bits are not 32"
    assert all(weight.abs().sum() > 0 for weight in first_shard(transport).values()), "B has left zero everywhere"


def test_a_part_of_a_base_in_4_bits_cannot_be_trained(tmp_path: Path) -> None:
    settings = replace(model_settings(tmp_path), quantization=Quantization.nf4)
    with pytest.raises(UserError, match=r"nothing would be trained; got everything with model\.quantization=nf4"):
        trainer(in_process(settings, (0, 2, 4), tmp_path), tmp_path)
