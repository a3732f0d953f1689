"""One shard of a model in training: forward, backward and the optimizer's step.

Knows nothing about networks, schedules or the other shards, except whether it is the first or the last of them.

Shapes: B examples, T positions, H hidden size, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from lab.learning.training import autocast, derive_seed, keep_differentiable, token_cross_entropy
from lab.models.quantized import stored_bytes
from lab.models.shape import ModelShape
from lab.models.slices import cut_of, run_slice
from split.training.messages import Recipe
from split.training.optimizer import MasterAdamW, adamw_options
from split.training.settings import Train


class MicroBatch(NamedTuple):
    """The input of a shard."""

    step: int
    """Number of the step in the whole run; dropout depends on it."""
    number: int
    """Its number in the step."""
    states: Tensor
    """Token ids B x T at the first shard, hidden states B x T x H at others."""
    lengths: Sequence[int]
    """Positions of each example that are not padding."""
    labels_BT: Tensor | None
    """Labels, at the last shard only."""
    tokens: int
    """Number of tokens that the loss counts in the whole step."""


class InFlight(NamedTuple):
    """A micro-batch between its forward and its backward."""

    input: Tensor | None
    """Hidden states B x T x H, a leaf whose gradient goes back; None at the first shard."""
    output: Tensor
    """Hidden states B x T x H; at the last shard the share of the loss, a scalar."""


class TrainingShard:
    """Some layers of a model, with the optimizer of their trained weights.

    Args:
        model: From `lab.models.layers.load_layers`, with the adapter on it where one is trained.
        weights: The trained weights, by their names in the whole model (in a PEFT file, for an adapter).
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
        self.optimizer = MasterAdamW(weights.values(), **adamw_options(recipe)) if weights else None
        is_copy = cut.is_tied and not (self.is_first and self.is_last) and recipe.train is Train.everything
        self.tied: torch.nn.Parameter | None = self._tied_copy() if is_copy else None
        """This shard's copy of a tied embedding whose other copy is trained at another shard."""
        self.held: dict[int, InFlight] = {}
        self.losses: dict[int, float] = {}
        """Each micro-batch's share of the step's mean loss."""
        keep_differentiable(model)
        self._model.train()
        if recipe.activation_checkpointing:
            slice_ = self._model  # transformers gave it another name in 5.23
            enable = getattr(slice_, "activation_checkpointing_enable", None) or slice_.gradient_checkpointing_enable
            enable({"use_reentrant": False})

    def forward(self, micro_batch: MicroBatch) -> Tensor | None:
        """Run a micro-batch and keep it; return the hidden states for the next shard, None from the last shard."""
        leaf = None if self.is_first else micro_batch.states.requires_grad_()
        output = self.compute(micro_batch)
        self.held[micro_batch.number] = InFlight(leaf, output)
        return None if self.is_last else output.detach()

    def backward(self, number: int, gradient_BTH: Tensor | None) -> Tensor | None:
        """Add a micro-batch's gradients and forget it; return dL/dx B x T x H, None from the first shard.

        `gradient_BTH` is dL/dy of its output; None at the last shard.
        """
        held = self.held.pop(number)
        if held.output.requires_grad:  # the first shard may have nothing to train
            torch.autograd.backward(held.output, gradient_BTH)
        return None if held.input is None else held.input.grad

    def compute(self, micro_batch: MicroBatch) -> Tensor:
        """The differentiable output of a forward: hidden states, at the last shard a share of the loss."""
        seed = derive_seed(self.recipe.seed, "dropout", micro_batch.step, micro_batch.number, self.layers.start)
        _seed(self.device, seed)
        positions_T = torch.arange(micro_batch.states.shape[1])
        attention_BT = (positions_T[None] < torch.tensor(micro_batch.lengths)[:, None]).long().to(self.device)
        with autocast(self._model):
            output = run_slice(self._model, micro_batch.states, attention_mask=attention_BT, use_cache=False)
        if not self.is_last:
            return output
        assert micro_batch.labels_BT is not None
        share = token_cross_entropy(output, micro_batch.labels_BT)[0] / micro_batch.tokens
        self.losses[micro_batch.number] = share.item()
        return share

    @property
    def loss(self) -> float:
        """Mean cross-entropy of the step's tokens, in nats; 0 except at the last shard."""
        return sum(self.losses[number] for number in sorted(self.losses))

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
        """Drop all gradients, losses and micro-batches in flight."""
        self.held.clear()
        self.losses.clear()
        for weight in self.weights.values():
            weight.grad = None

    @property
    def weights_bytes(self) -> int:
        """Size of all tensors of the model, frozen ones too."""
        return stored_bytes(self._model)

    @property
    def gradient_bytes(self) -> int:
        """Size of all gradients."""
        return sum(weight.nbytes for weight in self.weights.values())

    @property
    def optimizer_bytes(self) -> int:
        """Size of moments and masters; 0 before the first step."""
        return self.optimizer.state_bytes if self.optimizer else 0

    def _tied_copy(self) -> torch.nn.Parameter | None:
        if self.is_first:
            return cast(torch.nn.Parameter, self._model.get_input_embeddings().weight)
        return cast(torch.nn.Parameter, self._model.get_output_embeddings().weight) if self.is_last else None


def _seed(device: torch.device, seed: int) -> None:
    """Seed the generator of dropout."""
    # `torch.manual_seed` seeds the generators of all devices: an unused one costs a stack trace, 0.3 ms a micro-batch.
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)
