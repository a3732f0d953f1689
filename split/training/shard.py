"""One shard of a model that learns: a forward that keeps what its backward needs, and the optimizer's step.

Knows nothing about networks, schedules or the other shards, but whether it is the first or the last of them.

Shapes: B examples, T positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from lab.learning.training import autocast, derive_seed, keep_differentiable, token_cross_entropy
from lab.models.shape import ModelShape
from lab.models.slices import cut_of, run_slice
from split.training.messages import Recipe
from split.training.optimizer import MasterAdamW
from split.training.settings import Train


class Entering(NamedTuple):
    """What a micro-batch brings to a shard."""

    step: int
    """Counted over the whole run; dropout depends on it."""
    micro_batch: int
    """Its number in the step."""
    states: Tensor
    """Token ids B x T at the first shard, hidden states B x T x H at others."""
    lengths: Sequence[int]
    """Positions of each example that are not padding."""
    labels_BT: Tensor | None
    """At the last shard."""
    tokens: int
    """That the loss counts in the whole step."""


class Held(NamedTuple):
    """A micro-batch between its forward and its backward."""

    entering: Tensor | None
    """Hidden states B x T x H that came, a leaf whose gradient goes back; None at the first shard."""
    leaving: Tensor
    """Hidden states B x T x H that went on; the share of the loss (a scalar) at the last shard."""


class TrainingShard:
    """Layers of a model, and the optimizer of those of its weights that are trained.

    Args:
        model: From `lab.models.layers.load_layers`, with the adapter on it where one is trained.
        weights: Those that are trained, by their names in the whole model (in a PEFT file, for an adapter).
        recipe: What is trained, and how.
    """

    def __init__(self, model: PreTrainedModel, weights: dict[str, torch.nn.Parameter], recipe: Recipe) -> None:
        self._model = cast(Any, model)  # the forward of a model is not typed
        cut = cut_of(model)
        self.layers, self.recipe = cut.layers, recipe
        self.is_first, self.is_last = cut.embedding, cut.head
        self.device: torch.device = model.device
        shape = ModelShape.of(model.config)
        self.hidden_size, self.vocabulary_size = shape.hidden_size, shape.vocabulary
        self.weights = weights
        self.optimizer = self._new_optimizer() if self.weights else None
        is_copy = cut.is_tied and not (self.is_first and self.is_last) and recipe.train is Train.everything
        self.tied: torch.nn.Parameter | None = self._tied_copy() if is_copy else None
        """This shard's copy of a tied embedding whose other copy learns elsewhere."""
        self.held: dict[int, Held] = {}
        self.losses: dict[int, float] = {}
        """Of each micro-batch of this step: its share of the step's mean loss."""
        keep_differentiable(model)
        self._model.train()
        if recipe.activation_checkpointing:
            slice_ = self._model  # transformers gave it another name in 5.23
            enable = getattr(slice_, "activation_checkpointing_enable", None) or slice_.gradient_checkpointing_enable
            enable({"use_reentrant": False})

    def forward(self, entering: Entering) -> Tensor | None:
        """Run a micro-batch and keep it; return the hidden states that go on, None from the last shard."""
        leaf = None if self.is_first else entering.states.requires_grad_()
        leaving = self.run(entering)
        self.held[entering.micro_batch] = Held(leaf, leaving)
        return None if self.is_last else leaving.detach()

    def backward(self, micro_batch: int, gradient_BTH: Tensor | None) -> Tensor | None:
        """Add a micro-batch's gradients and forget it; return dL/dx B x T x H, None from the first shard.

        Args:
            micro_batch: Its number in the step.
            gradient_BTH: dL/dy of the hidden states that went on; None at the last shard.
        """
        held = self.held.pop(micro_batch)
        if held.leaving.requires_grad:  # the first shard may have nothing to learn
            torch.autograd.backward(held.leaving, gradient_BTH)
        return None if held.entering is None else held.entering.grad

    def run(self, entering: Entering) -> Tensor:
        """What `forward` computes, differentiable: hidden states, at the last shard a share of the loss."""
        seed = derive_seed(self.recipe.seed, "dropout", entering.step, entering.micro_batch, self.layers.start)
        _seed(self.device, seed)
        positions_T = torch.arange(entering.states.shape[1])
        attention_BT = (positions_T[None] < torch.tensor(entering.lengths)[:, None]).long().to(self.device)
        with autocast(self._model):
            leaving = run_slice(self._model, entering.states, attention_mask=attention_BT, use_cache=False)
        if not self.is_last:
            return leaving
        assert entering.labels_BT is not None
        share = token_cross_entropy(leaving, entering.labels_BT)[0] / entering.tokens
        self.losses[entering.micro_batch] = share.item()
        return share

    @property
    def loss(self) -> float:
        """Mean over the step's tokens, in nats; 0 but at the last shard."""
        return sum(self.losses[micro_batch] for micro_batch in sorted(self.losses))

    def squares(self) -> float:
        """Sum of the squares of all gradients, in float64; a tied embedding counts at the first shard only."""
        counted = [weight for weight in self.weights.values() if self.is_first or weight is not self.tied]
        norms = [
            float(torch.linalg.vector_norm(weight.grad, dtype=torch.float64))
            for weight in counted
            if weight.grad is not None
        ]
        return sum(norm * norm for norm in norms)

    def apply(self, scale: float, learning_rate: float) -> None:
        """Take the optimizer's step with gradients times `scale`, and forget them."""
        if self.optimizer is None:
            return
        self.scale_gradients(scale)
        self.optimizer.set_learning_rate(learning_rate)
        self.optimizer.step()
        self.forget_gradients()

    def scale_gradients(self, scale: float) -> None:
        """Multiply all gradients."""
        for weight in self.weights.values():
            if weight.grad is not None:
                weight.grad.mul_(scale)

    def forget_gradients(self) -> None:
        """Begin a step anew, with nothing held."""
        self.held.clear()
        self.losses.clear()
        for weight in self.weights.values():
            weight.grad = None

    @property
    def weights_bytes(self) -> int:
        """What all tensors of the model take, frozen ones too."""
        tensors = {id(tensor): tensor.nbytes for tensor in (*self._model.parameters(), *self._model.buffers())}
        return sum(tensors.values())

    @property
    def gradient_bytes(self) -> int:
        """Of all gradients, where there are any."""
        return sum(weight.nbytes for weight in self.weights.values())

    @property
    def optimizer_bytes(self) -> int:
        """Moments and masters, once there was a step."""
        return self.optimizer.state_bytes if self.optimizer else 0

    def _new_optimizer(self) -> MasterAdamW:
        recipe = self.recipe
        betas = (recipe.beta1, recipe.beta2)
        return MasterAdamW(self.weights.values(), lr=0.0, betas=betas, weight_decay=recipe.weight_decay)

    def _tied_copy(self) -> torch.nn.Parameter | None:
        if self.is_first:
            return cast(torch.nn.Parameter, self._model.get_input_embeddings().weight)
        return cast(torch.nn.Parameter, self._model.get_output_embeddings().weight) if self.is_last else None


def _seed(device: torch.device, seed: int) -> None:
    """Seeds the generator of dropout. Of those of all devices, as `torch.manual_seed` does it, the ones that are not in
    use cost a stack trace each: a third of a millisecond, every micro-batch."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)
