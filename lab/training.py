"""What every trainer needs: loss, schedule, clipping, seeds, and the loop that puts them together. Plain PyTorch.

Knows nothing about where a model, its examples or its first weights come from.

Shapes: B examples, T positions, V vocabulary, N = B * T rows of logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from lab.data import Batch, Example
from lab.settings import OptimizationSettings


class Diverged(ArithmeticError):
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


@dataclass(frozen=True, kw_only=True)
class EvalFigures:
    """One pass over held-out examples."""

    loss: float
    """Mean cross-entropy per counted token, in nats."""
    tokens: int
    examples: int


@dataclass(frozen=True, eq=False)
class Proximal:
    """FedProx (arXiv 1812.06127): adds mu / 2 * |w - w_global|^2 over the trainable parameters to the loss."""

    mu: float
    anchors: list[torch.Tensor]
    """w_global: one tensor for each trainable parameter, in their order."""

    @classmethod
    def around(cls, model: torch.nn.Module, mu: float) -> Proximal:
        """The term that pulls towards the weights that `model` has now."""
        return cls(mu, [parameter.detach().clone() for parameter in trainable_parameters(model)])

    def add_gradient(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Adds mu * (w - w_global) to every gradient."""
        raise NotImplementedError


def derive_seed(seed: int, *parts: int | str) -> int:
    """A seed in [0, 2**63) for one purpose, from a run's seed and what tells the purpose apart (a name, round, ...)."""
    raise NotImplementedError


def seed_everything(seed: int, *parts: int | str) -> int:
    """Seeds torch (every device), numpy and random with `derive_seed(seed, *parts)`, and returns it."""
    raise NotImplementedError


def token_cross_entropy(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Sum of the cross-entropies of the counted tokens, in nats, and how many there are."""
    raise NotImplementedError


def learning_rate_at(step: int, total_steps: int, optimization: OptimizationSettings) -> float:
    """Learning rate of `step` (from 0) in a run of `total_steps`: linear warm-up, then cosine decay."""
    raise NotImplementedError


def trainable_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Parameters that training changes, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def clip_gradients(parameters: Sequence[torch.nn.Parameter], max_norm: float) -> float:
    """Scales the gradients down to the global norm `max_norm` (0: leaves them); returns their norm before."""
    raise NotImplementedError


def adamw(model: torch.nn.Module, optimization: OptimizationSettings) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over the trainable parameters; train_steps sets the learning rate of each step."""
    raise NotImplementedError


def autocast(model: torch.nn.Module) -> AbstractContextManager[object]:
    """bfloat16 autocast where the model's device profits from it, else a context that does nothing."""
    raise NotImplementedError


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
    derives it, for example from round and partition). Without `optimizer` the moments start at zero. Raises Diverged.
    """
    raise NotImplementedError


def evaluate(model: torch.nn.Module, examples: Iterable[Example], batch_size: int) -> EvalFigures:
    """Token-weighted mean loss over `examples`; the same, but for rounding, for every batch size."""
    raise NotImplementedError
