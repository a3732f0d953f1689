"""Memory of a shard in training, in a fresh process: `python -m split.bench.memory_probe FIRST LAST WORDS`.

Shapes: B examples, T positions, H hidden size.
"""

import json
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from lab.command.entry import compose_settings
from lab.device import give_back_freed_memory, peak_rss_bytes
from split.training.run import make_recipe
from split.training.settings import SplitTrainSettings
from split.training.shard import MicroBatch, TrainingShard
from split.training.weights import load_training_shard

EXAMPLES, TOKENS, STEPS, HELD = 2, 64, 3, 2
TINY = ("model=random", "project.train=everything")


def main(first: int, last: int, overrides: Sequence[str]) -> None:
    """Measure layers first..last - 1 of a model that is in the cache already."""
    torch.set_num_threads(1)
    give_back_freed_memory()  # as a shard's process does
    train(TINY, range(0, 4))  # imports and whatever torch sets up at its first step
    before = peak_rss_bytes()
    shard, activations = train(overrides, range(first, last))
    own = shard.weights_bytes + shard.gradient_bytes + shard.optimizer_bytes + HELD * activations
    taken = peak_rss_bytes() - before
    figures = {
        "layers": f"{first}:{last}",
        "weights_bytes": shard.weights_bytes,
        "gradient_bytes": shard.gradient_bytes,
        "optimizer_bytes": shard.optimizer_bytes,
        "activation_bytes": HELD * activations,
        "peak_above_imports_bytes": taken,
        "peak_over_own": taken / own,
    }
    print(json.dumps(figures), flush=True)


def train(overrides: Sequence[str], layers: range) -> tuple[TrainingShard, int]:
    """Train some steps, `HELD` micro-batches in flight; return the shard, and the bytes that autograd keeps for one."""
    settings = compose_settings("split_train", overrides, SplitTrainSettings)
    shard = load_training_shard(settings.model, torch.device("cpu"), layers, make_recipe(settings))
    weights = {weight.untyped_storage().data_ptr() for weight in shard.weights.values()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    for step in range(STEPS):
        for number in range(HELD):
            kept.clear()
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                shard.forward(micro_batch(shard, step, number))
        for number in range(HELD):
            shard.backward(number, None if shard.is_last else torch.ones(EXAMPLES, TOKENS, shard.hidden_size))
        shard.apply(1.0, 1e-4)
    return shard, sum(kept.values())


def micro_batch(shard: TrainingShard, step: int, number: int) -> MicroBatch:
    """A micro-batch of B x T."""
    ids_BT = torch.arange(EXAMPLES * TOKENS).reshape(EXAMPLES, TOKENS) % shard.vocabulary_size
    states = ids_BT if shard.is_first else torch.randn(EXAMPLES, TOKENS, shard.hidden_size)
    return MicroBatch(step, number, states, [TOKENS] * EXAMPLES, ids_BT, EXAMPLES * TOKENS)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
