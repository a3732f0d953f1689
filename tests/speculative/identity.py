"""The proof that speculation does not change the text, at any size: `make test` runs a small one, `soak` the whole.

    python -m tests.speculative.identity 50000

Every source of guesses, greedy and sampled, draft lengths 1 to 16, four texts at once on one verifier that batches them
(and one alone), against the target decoding alone, token by token. float64: not one token may differ.
"""

from __future__ import annotations

import functools
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from lab.sampling import Sampling
from speculative.drafts import Drafts, EngineDrafts, NgramDrafts, NoDrafts, RandomDrafts, add_noise_to_head
from tests.random_models import random_model
from tests.speculative.in_process import InProcess, bench, decoded_alone, local_engine, request, speculated, tokens

VOCABULARY = 97
SOURCES = ("model", "ngram", "layers", "noisy", "random", "none")
SAMPLINGS = (Sampling.greedy(), Sampling(seed=5, temperature=0.8, top_k=40, top_p=0.95))
LENGTHS = tuple(range(1, 17))


@dataclass
class Compared:
    """How much was compared, and how often it differed."""

    tokens: int = 0
    differing: int = 0
    accepted: int = 0
    shared_passes: int = 0
    sources: set[str] = field(default_factory=set)


@functools.cache
def target_model() -> torch.nn.Module:
    """Loaded once: engines only read it."""
    return random_model("llama", torch.float64)


@functools.cache
def draft_model(source: str) -> torch.nn.Module | None:
    """The model that guesses, if one does. Made in one thread: `random_model` sets the global seed."""
    if source == "model":  # the target's weights in another precision: nearly always right
        return random_model("llama", torch.float32)
    if source == "layers":
        return random_model("llama", torch.float64, num_hidden_layers=3)
    if source == "noisy":
        model = random_model("llama", torch.float64)
        add_noise_to_head(model, 0.3, 3)
        return model
    return None


def make_drafts(source: str, sampling: Sampling) -> Drafts:
    """A source of guesses for the random Llama of `tests.random_models`."""
    if (model := draft_model(source)) is not None:
        return EngineDrafts(local_engine(model, sessions=1), sampling, VOCABULARY)
    others: dict[str, Drafts] = {"none": NoDrafts(), "ngram": NgramDrafts(3, 1), "random": RandomDrafts(7, VOCABULARY)}
    return others[source]


def compare(source: str, sampling: Sampling, texts: int, new_tokens: int, first_length: int, seed: int) -> Compared:
    """`texts` texts at once on one verifier, each with a draft length of its own, against the target alone."""
    compared = Compared(sources={source})
    draft_model(source)
    numbers = random.Random(seed)
    prompts = [[numbers.randrange(VOCABULARY) for _ in range(numbers.randrange(1, 90))] for _ in range(texts)]
    alone = local_engine(target_model(), sessions=1)
    with bench(local_engine(target_model(), sessions=texts)) as verifiers:

        def draft(index: int) -> tuple[list[int], int]:
            drafts = make_drafts(source, sampling)
            length = LENGTHS[(first_length + 5 * index) % len(LENGTHS)]
            rounds = speculated(
                InProcess(verifiers, index), drafts, request(prompts[index], new_tokens, sampling), length
            )
            drafts.close()
            return tokens(rounds), sum(done.accepted for done in rounds)

        with ThreadPoolExecutor(texts) as pool:
            drafted = list(pool.map(draft, range(texts)))
        compared.shared_passes = sum(count > 1 for count in verifiers.batches)
    for prompt, (text, accepted) in zip(prompts, drafted, strict=True):
        own = decoded_alone(alone, prompt, sampling, new_tokens)
        assert len(text) == new_tokens
        compared.tokens += new_tokens
        compared.differing += sum(a != b for a, b in zip(own, text, strict=True))
        compared.accepted += accepted
    return compared


def compare_everything(at_least_tokens: int, new_tokens: int = 60) -> Compared:
    """All sources and samplings in turn, with ever other lengths and prompts, until so many tokens were compared."""
    torch.set_num_threads(1)
    total = Compared()
    turn = 0
    while total.tokens < at_least_tokens:
        for source in SOURCES:
            for sampling in SAMPLINGS:
                done = compare(source, sampling, 4 if turn % 3 else 1, new_tokens, turn, turn)
                total.tokens += done.tokens
                total.differing += done.differing
                total.accepted += done.accepted
                total.shared_passes += done.shared_passes
                total.sources |= done.sources
                turn += 1
    return total


if __name__ == "__main__":
    print(compare_everything(int(sys.argv[1])))
