"""Training in plain PyTorch: loss, schedule, clipping, seeds, and the loop that puts them together.

Knows nothing about where a model, its examples or its first weights come from.

Shapes: B examples, T positions, V vocabulary, N = B * T rows of logits.
"""

import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Self

import numpy as np
import torch
from torch.nn import functional

from lab.faults import Fault
from lab.learning.examples import IGNORED, Batch, Example, collate
from lab.settings import OptimizationSettings

ROWS_AT_ONCE = 512
"""Rows of logits whose cross-entropy is taken in one piece: a float32 copy of 512 x 49152 logits is 100 MB."""


class Diverged(Fault):
    """Loss or gradient is no longer a finite number; the text says at which step."""


@dataclass(frozen=True, kw_only=True)
class StepFigures:
    """One optimizer step."""

    step: int
    """Counted over the whole run, from 0."""
    loss: float
    """Mean cross-entropy per counted token, in nats, before the step; without the proximal term."""
    tokens: int
    """Tokens that the loss counted."""
    learning_rate: float
    gradient_norm: float
    """Global norm before clipping."""


@dataclass(frozen=True, kw_only=True)
class TrainFigures:
    """Some optimizer steps together."""

    steps: int
    loss: float
    """Mean cross-entropy per counted token over all steps, in nats."""
    tokens: int
    seconds: float
    gradient_norm: float
    """Mean over the steps, before clipping."""


@dataclass(frozen=True, eq=False)
class Proximal:
    """FedProx (arXiv 1812.06127): adds mu / 2 * |w - w_global|^2 over the trainable parameters to the loss."""

    mu: float
    anchors: list[torch.Tensor]
    """w_global: one tensor for each trainable parameter, in their order."""

    @classmethod
    def around(cls, model: torch.nn.Module, mu: float) -> Self:
        """The term that pulls towards the weights that `model` has now."""
        return cls(mu, [parameter.detach().clone() for parameter in trainable_parameters(model)])

    def add_gradient(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Adds mu * (w - w_global), the gradient of the term, to every gradient. No graph is needed for it."""
        for parameter, anchor in zip(parameters, self.anchors, strict=True):
            term = (parameter.detach() - anchor) * self.mu
            parameter.grad = term if parameter.grad is None else parameter.grad.add_(term)


def derive_seed(seed: int, *parts: int | str) -> int:
    """A seed in [0, 2**63) for one purpose, from a run's seed and the parts that identify the purpose (a name, round,
    ...).

    A hash, so that it is the same on every machine (Python's own differs between processes) and neighbours do not
    resemble each other.
    """
    text = json.dumps([seed, *parts])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def seed_everything(seed: int, *parts: int | str) -> int:
    """Seeds torch (every device), numpy and random with `derive_seed(seed, *parts)`, and returns it."""
    derived = derive_seed(seed, *parts)
    torch.manual_seed(derived)
    np.random.seed(derived % 2**32)
    random.seed(derived)
    return derived


def token_cross_entropy(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Sum of the cross-entropies of the counted tokens, in nats, and how many there are.

    logits[:, t] is compared with labels[:, t + 1]; IGNORED labels do not count. Computed in float32 (float64 for
    float64 logits). The sum and not the mean: sums add up over batches of different sizes, means do not.
    """
    targets_BT = torch.full_like(labels_BT, IGNORED)
    targets_BT[:, :-1] = labels_BT[:, 1:]  # the labels move, not the logits: those would be copied
    precision = torch.promote_types(logits_BTV.dtype, torch.float32)
    sums = [
        functional.cross_entropy(logits_NV.to(precision), targets_N, ignore_index=IGNORED, reduction="sum")
        for logits_NV, targets_N in zip(
            logits_BTV.flatten(0, 1).split(ROWS_AT_ONCE), targets_BT.flatten().split(ROWS_AT_ONCE)
        )
    ]
    return torch.stack(sums).sum(), int((targets_BT != IGNORED).sum())


def learning_rate_at(step: int, total_steps: int, optimization: OptimizationSettings) -> float:
    """Learning rate of `step` (from 0) in a run of `total_steps`: linear warm-up, then cosine decay (arXiv 1608.03983).

    With peak p, warm-up of w steps and final fraction f:
        step < w:   p * (step + 1) / (w + 1)
        else:       p * (f + (1 - f) * (1 + cos(pi * x)) / 2),  x = (step - w) / (total_steps - 1 - w)
    so step w has the peak and the last step p * f. A run of at most w + 1 steps never decays.
    """
    assert 0 <= step < total_steps, f"step {step} of {total_steps}"
    peak, warmup = optimization.learning_rate, optimization.warmup_steps
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total_steps - 1 - warmup)
    final = optimization.final_learning_rate_fraction
    return peak * (final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2)


def trainable_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Parameters that training changes, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def clip_gradients(parameters: Sequence[torch.nn.Parameter], max_norm: float) -> float:
    """Scales the gradients down to the global norm `max_norm` (0: leaves them); returns their norm before."""
    return float(torch.nn.utils.clip_grad_norm_(parameters, max_norm or math.inf))


def adamw(model: torch.nn.Module, optimization: OptimizationSettings) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over the trainable parameters; train_steps sets the learning rate of each step."""
    betas = (optimization.beta1, optimization.beta2)
    parameters = trainable_parameters(model)
    assert parameters, "nothing to train: every parameter is frozen"
    return torch.optim.AdamW(
        parameters, lr=optimization.learning_rate, betas=betas, weight_decay=optimization.weight_decay
    )


def autocast(model: torch.nn.Module) -> AbstractContextManager[object]:
    """bfloat16 autocast where it pays, else a context that does nothing.

    On CUDA with bf16 units for a model in bfloat16 or float32; elsewhere only for a model that is in bfloat16 itself
    (its float32 adapters then compute in bfloat16 too). Never for float64 and float16, which are used on request only.
    """
    device, dtype = _device(model), _compute_dtype(model)
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == torch.bfloat16 or (fast and dtype == torch.float32):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def keep_differentiable(model: torch.nn.Module) -> None:
    """Keeps 4-bit layers in the form that has a gradient; to be called before the first pass in evaluation mode.

    On a CPU with AVX512-BF16, bitsandbytes (seen in 0.50.2) repacks a 4-bit layer for good at its first pass in
    evaluation mode, and the kernel for that packing has no backward: a model that is evaluated and then trained
    would learn with gradients that stop at every 4-bit layer, and only a warning. The repacked layer also rounds to
    bfloat16, so that its loss would not be the one that is trained.
    """
    for module in model.modules():
        if hasattr(module, _MAY_REPACK):
            setattr(module, _MAY_REPACK, False)


_MAY_REPACK = "support_avx512bf16_for_cpu"


def _refuse_repacked(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if getattr(getattr(parameter, "quant_state", None), "packing_format_for_cpu", False):
            raise RuntimeError(
                f"{name} was repacked for inference and has no gradient: call keep_differentiable before the model's "
                "first pass in evaluation mode"
            )


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


def _compute_dtype(model: torch.nn.Module) -> torch.dtype:
    """Precision of the frozen weights (4-bit ones are stored as integers, adapters are kept in float32), if any."""
    floating = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    return next((p for p in floating if not p.requires_grad), floating[0]).dtype


def train_steps(
    model: torch.nn.Module,
    batches: Iterator[Batch],
    optimization: OptimizationSettings,
    *,
    first_step: int,
    total_steps: int,
    steps: int,
    seed: int,
    optimizer: torch.optim.Optimizer | None = None,
    proximal: Proximal | None = None,
    on_step: Callable[[StepFigures], None] | None = None,
) -> TrainFigures:
    """Takes `steps` optimizer steps, each over `optimization.accumulation` of `batches`.

    `first_step` and `total_steps` place them in the schedule of the whole run. `seed` is for dropout (the caller
    derives it, for example from round and partition); it seeds the whole process. Without `optimizer` the moments start
    at zero. Raises Diverged when loss or gradient is not finite; the weights are then those before that step.
    """
    assert steps >= 1, f"steps {steps}"
    keep_differentiable(model)
    _refuse_repacked(model)
    optimizer = optimizer or adamw(model, optimization)
    seed_everything(seed)
    started = time.perf_counter()
    figures = []
    with _mode(model, training=True):
        for step in range(first_step, first_step + steps):
            learning_rate = learning_rate_at(step, total_steps, optimization)
            micro_batches = list(islice(batches, optimization.accumulation))
            taken = _train_step(model, micro_batches, optimizer, optimization, step, learning_rate, proximal)
            figures.append(taken)
            if on_step is not None:
                on_step(taken)
    tokens = sum(taken.tokens for taken in figures)
    return TrainFigures(
        steps=steps,
        loss=sum(taken.loss * taken.tokens for taken in figures) / tokens,
        tokens=tokens,
        seconds=time.perf_counter() - started,
        gradient_norm=sum(taken.gradient_norm for taken in figures) / steps,
    )


def _train_step(
    model: torch.nn.Module,
    micro_batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    optimization: OptimizationSettings,
    step: int,
    learning_rate: float,
    proximal: Proximal | None,
) -> StepFigures:
    parameters = trainable_parameters(model)
    optimizer.zero_grad(set_to_none=True)
    loss, tokens = accumulate_gradients(model, micro_batches)
    if not math.isfinite(loss):
        raise Diverged(f"loss must be finite, got {loss} at step {step} (learning rate {learning_rate:.3g})")
    if proximal is not None:
        proximal.add_gradient(parameters)
    norm = clip_gradients(parameters, optimization.max_gradient_norm)
    if not math.isfinite(norm):
        raise Diverged(f"gradient norm must be finite, got {norm} at step {step} (learning rate {learning_rate:.3g})")
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    return StepFigures(step=step, loss=loss, tokens=tokens, learning_rate=learning_rate, gradient_norm=norm)


def accumulate_gradients(model: torch.nn.Module, micro_batches: Sequence[Batch]) -> tuple[float, int]:
    """Adds to the gradients those of the mean loss per counted token over all micro-batches together.

    Each micro-batch's sum is divided by the tokens of them all, so it makes no difference how examples are cut into
    micro-batches. Returns that mean loss, in nats, and the tokens.
    """
    tokens = sum(batch.targets for batch in micro_batches)
    assert tokens > 0, "no token counts in these batches"
    loss = 0.0
    for batch in micro_batches:
        share = batch_loss(model, batch) / tokens
        share.backward()
        loss += share.item()
    return loss, tokens


def batch_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Sum of the cross-entropies of a batch's counted tokens, in nats; `model` is called like those of transformers."""
    batch = batch.to(_device(model))
    with autocast(model):
        logits_BTV = model(input_ids=batch.ids_BT, attention_mask=batch.attention_BT, use_cache=False).logits
    return token_cross_entropy(logits_BTV, batch.labels_BT)[0]


def evaluate(model: torch.nn.Module, examples: Iterable[Example], batch_size: int) -> float:
    """Mean cross-entropy per counted token of `examples`, in nats; the same, but for rounding, for every batch size."""
    ordered = sorted(examples, key=lambda example: len(example.ids_T))  # little padding in a batch
    assert ordered, "evaluation needs at least one example"
    keep_differentiable(model)
    loss, tokens = 0.0, 0
    with _mode(model, training=False), torch.no_grad():
        for start in range(0, len(ordered), batch_size):
            batch = collate(ordered[start : start + batch_size])
            loss += batch_loss(model, batch).item()
            tokens += batch.targets
    return loss / tokens


@contextmanager
def _mode(model: torch.nn.Module, training: bool) -> Iterator[None]:
    """Dropout on or off inside, as before outside."""
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)
