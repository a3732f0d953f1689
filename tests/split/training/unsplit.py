"""Training runs of small models for the tests: cut into shards in this process, and not cut at all."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lab.device import TORCH_DTYPES
from lab.learning.examples import Batch, Example, batches
from lab.learning.training import StepFigures, accumulate_gradients, adamw, train_steps
from lab.models.lora import add_lora, fresh_adapter
from lab.models.sources import quantization_config
from lab.settings import Dtype, LoraSettings, ModelSettings, OptimizationSettings
from split.training.checkpoint import Manifest
from split.training.messages import Apply, Recipe, Start
from split.training.schedule import Schedule
from split.training.settings import Train
from split.training.shard import TrainingShard
from split.training.stage import InitialWeight, TrainingStage
from split.training.trainer import Backward, DistributedTrainer, ExplicitBackward, Shards, split_batch
from split.training.weights import initial_weight, load_training_shard
from split.transport.base import Transport
from split.transport.inproc import InProcess
from tests.split.chains import VOCABULARY, saved_model

CPU = torch.device("cpu")
BANDS = {Dtype.float32: 1e-6, Dtype.float64: 1e-12}
"""The largest `worst` where operations are not the same."""
RUN = "0123456789abcdef"
LORA = LoraSettings(rank=4, alpha=8.0, dropout=0.0)
OPTIMIZATION = OptimizationSettings(
    learning_rate=3e-3, final_learning_rate_fraction=0.1, warmup_steps=2, weight_decay=0.01, beta1=0.9, beta2=0.99,
    max_gradient_norm=0.0, batch_size=4, accumulation=1,
)  # fmt: skip
EVERYTHING = Recipe(
    train=Train.everything, lora_rank=1, lora_alpha=1.0, lora_dropout=0.0, lora_targets=[], weight_decay=0.01,
    beta1=0.9, beta2=0.99, activation_checkpointing=False, seed=5,
)  # fmt: skip
ADAPTER = Recipe(
    train=Train.lora, lora_rank=4, lora_alpha=8.0, lora_dropout=0.0, lora_targets=["q_proj", "down_proj"],
    weight_decay=0.01, beta1=0.9, beta2=0.99, activation_checkpointing=False, seed=5,
)  # fmt: skip


def model_settings(folder: Path, dtype: Dtype = Dtype.float32, tied: bool = False) -> ModelSettings:
    """A Llama of four layers, written in float32."""
    settings = saved_model("llama", folder, tie_word_embeddings=tied)
    return replace(settings, dtype=dtype, lora_targets=["q_proj", "down_proj"])


def some_examples(count: int = 24, equal: bool = False) -> list[Example]:
    """Of different lengths unless equal; some positions do not count."""
    generator = np.random.default_rng(3)
    found = []
    for index in range(count):
        length = 20 if equal else int(generator.integers(8, 20))
        counted = np.ones(length, dtype=np.bool_)
        counted[: 0 if equal else index % 4] = False
        found.append(Example(generator.integers(0, VOCABULARY, length).astype(np.int32), counted))
    return found


def all_batches(examples: Sequence[Example], batch_size: int) -> Iterator[Batch]:
    return batches(examples, batch_size, 11)


Load = Callable[[ModelSettings, range, Recipe], TrainingShard]


_LOADING = threading.Lock()
"""Models are made without memory by patching torch, for all threads at once; a process of its own needs no lock."""


def load_plain(settings: ModelSettings, layers: range, recipe: Recipe) -> TrainingShard:
    with _LOADING:
        return load_training_shard(settings, CPU, layers, recipe)


def ranges(cuts: Sequence[int]) -> list[range]:
    return [range(first, last) for first, last in itertools.pairwise(cuts)]


def stage(settings: ModelSettings, layers: range, checkpoints: Path, load: Load = load_plain) -> TrainingStage:
    def make(start: Start) -> tuple[TrainingShard, InitialWeight]:
        shard = load(settings, layers, start.recipe)
        with _LOADING:
            return shard, initial_weight(settings, start.recipe, layers)

    return TrainingStage(layers, make, checkpoints)


def in_process(settings: ModelSettings, cuts: Sequence[int], checkpoints: Path, load: Load = load_plain) -> InProcess:
    return InProcess([stage(settings, layers, checkpoints, load) for layers in ranges(cuts)])


def trainer(
    transport: Transport,
    checkpoints: Path,
    *,
    recipe: Recipe = EVERYTHING,
    optimization: OptimizationSettings = OPTIMIZATION,
    micro_batches: int = 1,
    schedule: Schedule = Schedule.gpipe,
    total_steps: int = 8,
    examples: Sequence[Example] | None = None,
    backward: Callable[[Shards], Backward] = ExplicitBackward,
    recovery_seconds: float = 20.0,
    manifest: Manifest | None = None,
) -> DistributedTrainer:
    layers = transport.layers
    shards = Shards(transport)
    return DistributedTrainer(
        shards,
        backward(shards),
        batches=lambda: all_batches(examples or some_examples(), optimization.batch_size),
        optimization=optimization,
        schedule=schedule,
        manifest=manifest
        or Manifest(
            run=RUN, step=0, model="tests", dtype="float32", cuts=[0, *(part.stop for part in layers)], digests=[],
            recipe=recipe, optimization={}, data={}, total_steps=total_steps, micro_batches=micro_batches, seed=11,
            loss_by_step=[],
        ),
        checkpoints=checkpoints,
        recovery_seconds=recovery_seconds,
    )  # fmt: skip


def gradients_of(made: DistributedTrainer, stages: Sequence[TrainingStage]) -> dict[str, Tensor]:
    """Of the next step; the optimizer's step that would use them is not taken."""
    found: dict[str, Tensor] = {}

    def keep(step: int, apply: Apply) -> None:
        for stage in stages:
            for name, weight in stage.shard.weights.items():
                assert weight.grad is not None, name
                found[name] = weight.grad.clone()

    made._backward.apply = keep  # type: ignore[method-assign]
    made.train_step()
    return found


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest max |dg| / max |g| of all tensors."""
    assert found.keys() - {"lm_head.weight"} == expected.keys() - {"lm_head.weight"}
    return max(float((found[name] - g).abs().max() / g.abs().max()) for name, g in expected.items())


def _in_file(name: str) -> str:
    """An adapter's weight as PEFT's files name it; others as the model does."""
    return f"base_model.model.{name.replace('.default.', '.')}" if ".lora_" in name else name


class Unsplit:
    """The whole model, trained by lab.learning.training: what a split run is compared with."""

    def __init__(
        self,
        settings: ModelSettings,
        *,
        recipe: Recipe = EVERYTHING,
        optimization: OptimizationSettings = OPTIMIZATION,
        micro_batches: int = 1,
        examples: Sequence[Example] | None = None,
    ) -> None:
        dtype = TORCH_DTYPES[settings.dtype]
        quantization = quantization_config(settings, CPU, dtype)
        placement: Any = {"quantization_config": quantization, "device_map": {"": CPU}} if quantization else {}
        self.model: Any = AutoModelForCausalLM.from_pretrained(settings.path, dtype=dtype, **placement)
        self.model.requires_grad_(False)
        self._optimization = replace(optimization, accumulation=optimization.accumulation * micro_batches)
        if settings.adapter is not None:
            self.model = peft.PeftModel.from_pretrained(self.model, settings.adapter, is_trainable=True)
        elif recipe.train is Train.lora:
            lora = LoraSettings(rank=recipe.lora_rank, alpha=recipe.lora_alpha, dropout=recipe.lora_dropout)
            add_lora(self.model, recipe.lora_targets, lora)
            fresh = fresh_adapter(settings, lora, recipe.seed)
            with torch.no_grad():
                for name, weight in self.weights().items():
                    weight.copy_(fresh[name])
        else:
            self.model.requires_grad_(True)
        self._optimizer: torch.optim.Optimizer | None = None
        whole = all_batches(examples or some_examples(), optimization.batch_size)
        self._batches = (part for batch in whole for part in split_batch(batch, micro_batches))

    def weights(self) -> dict[str, torch.nn.Parameter]:
        if not isinstance(self.model, peft.PeftModel):
            return {_in_file(name): p for name, p in self.model.named_parameters() if p.requires_grad}
        state = self.model.state_dict(keep_vars=True)
        stored = peft.get_peft_model_state_dict(self.model, state_dict=state, save_embedding_layers=False)
        return {name: weight for name, weight in stored.items() if weight.requires_grad}

    def gradients(self, after: int = 0) -> dict[str, Tensor]:
        """Of the step after so many."""
        if after:
            self.train(after, 8)
        self.model.train().zero_grad()
        accumulate_gradients(self.model, list(itertools.islice(self._batches, self._optimization.accumulation)))
        return {name: weight.grad for name, weight in self.weights().items() if weight.grad is not None}

    def train(self, steps: int, total_steps: int, first_step: int = 0) -> list[StepFigures]:
        found: list[StepFigures] = []
        if self._optimizer is None:
            self._optimizer = adamw(self.model, self._optimization)
        train_steps(
            self.model, self._batches, self._optimization, first_step=first_step, total_steps=total_steps, steps=steps,
            seed=0, optimizer=self._optimizer, on_step=found.append,
        )  # fmt: skip
        return found
