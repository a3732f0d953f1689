"""The proof that logit rules (penalties, biases, banned words) and `min_p` leave speculated text the target's own:
a small size is a test, the whole is `soak`.

    python -m tests.logit_rules 10000

Each of them alone and all together, greedy and sampled, every source of guesses that needs no second checkpoint, modes
sync and async, one text and two in a pass, in float64; and the same texts by two shards.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lab.engine.base import Engine, Session, TargetStep
from lab.engine.sampling import Sampling
from lab.text.logit_rules import LogitRules
from speculative.settings import Mode
from tests.speculative.identity import Compared, Subject, compare
from tests.split.chains import CONTEXT, VOCABULARY, inprocess, local, saved_model

PROMPT_TOKENS = 24
SOURCES = ("model", "ngram", "layers", "noisy", "random")
MODES = (Mode.sync, Mode["async"])
LENGTHS = ((4,), (7, 2))
"""Draft lengths of the texts at once."""
ASKED: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.15},
    "presence_penalty": {"presence_penalty": 0.3},
    "frequency_penalty": {"frequency_penalty": 0.3},
    "logit_bias": {"logit_bias": tuple((token, (-1) ** token * 0.05) for token in range(0, 200, 3))},
    "bad_words": {
        "bad_words": (
            *((token,) for token in range(0, 256, 5)),
            *((first, second) for first in range(0, 256, 2) for second in range(1, 256, 43)),
        )
    },
}
"""In the measure of the logits of random models, which lie within about one of each other."""
RULES: dict[str, dict[str, Any]] = {
    **ASKED,
    "min_p": {},
    "all": {name: value for asked in ASKED.values() for name, value in asked.items()},
}


def samplings(name: str) -> tuple[Sampling, Sampling]:
    """A rule greedy and sampled."""
    asked = RULES[name]
    rules = LogitRules(prompt_tokens=PROMPT_TOKENS, **asked) if asked else None
    min_p = 0.9 if name in ("min_p", "all") else 0.0
    sampled = Sampling(seed=5, temperature=0.8, top_k=40, top_p=0.95, min_p=min_p, logit_rules=rules)
    return replace(Sampling.greedy(), min_p=min_p, logit_rules=rules), sampled


def subject() -> Subject:
    """`model=random` in float64 with prompts of one length; the draft model is the same in float32."""
    numbers = random.Random(0)
    prompts = [[numbers.randrange(256) for _ in range(PROMPT_TOKENS)] for _ in range(4)]
    words = (
        *("model=random", "model.dtype=float64", "device.threads=1", "project.context=256"),
        *("project.draft.model=random", "project.draft.dtype=float32"),
        *("project.draft.layers=3", "project.draft.noise=0.05"),
    )
    return Subject(words, prompts)


def compare_logit_rules(at_least_tokens: int, *, names: Sequence[str] = tuple(RULES), whole: bool = True) -> Compared:
    """Speculated texts against the target alone; not whole: each rule with one source, mode and number of texts."""
    torch.set_num_threads(1)
    asked, total = subject(), Compared()
    cells = list(_cells(names, whole=whole))
    new_tokens = -(-at_least_tokens // sum(len(lengths) for *_, lengths in cells))
    for sampling, source, mode, lengths in cells:
        total.add(compare(asked, source, sampling, lengths, new_tokens, mode=mode))
    return total


def _cells(names: Sequence[str], *, whole: bool) -> Iterator[tuple[Sampling, str, Mode, tuple[int, ...]]]:
    drawn = [sampling for name in names for sampling in samplings(name)]
    if whole:
        yield from itertools.product(drawn, SOURCES, MODES, LENGTHS)
        return
    for index, sampling in enumerate(drawn):
        yield sampling, SOURCES[index % len(SOURCES)], MODES[index % 2], LENGTHS[index // 2 % 2]


def without_effect(new_tokens: int) -> list[str]:
    """The rules that do not matter to the texts that are compared."""
    asked = subject()
    plain = [asked.own_text(0, replace(one, min_p=0.0, logit_rules=None), new_tokens) for one in samplings("all")]
    return [name for name in RULES if [asked.own_text(0, one, new_tokens) for one in samplings(name)] == plain]


def walk(engine: Engine, sampling: Sampling, seed: int, steps: int) -> list[list[int]]:
    """What an engine says of two texts that are read in pieces of any length, guessed at, and taken back."""
    numbers = random.Random(seed)
    said: list[list[int]] = []
    with engine.open([], sampling) as one, engine.open([], Sampling.greedy()) as other:
        texts: list[Session] = [one, other]
        for _ in range(steps):
            for text in texts:
                text.position = numbers.randrange(max(0, text.position - 5), text.position + 1)
            requests = [
                (text, [numbers.randrange(VOCABULARY) for _ in range(numbers.choice([1, 1, 2, 5, 17]))])
                for text in texts
                if text.position < CONTEXT - 20
            ]
            want = numbers.choice(["last", "all"])
            found: list[TargetStep] = engine.extend(requests, want)  # type: ignore[arg-type]  # mypy sees str
            said += [step.next_ids for step in found]
    return said


def shards_differ(folder: Path, names: Sequence[str] = tuple(RULES), steps: int = 25) -> int:
    """Tokens that two shards say otherwise than the whole model, over all rules."""
    settings = saved_model("llama", folder, torch.float64)
    whole, split = local(settings), inprocess(settings, (0, 2, 4))
    differing = 0
    for index, sampling in enumerate(sampling for name in names for sampling in samplings(name)):
        expected, found = (walk(engine, sampling, index, steps) for engine in (whole, split))
        differing += sum(
            a != b for one, two in zip(expected, found, strict=True) for a, b in zip(one, two, strict=True)
        )
    return differing


if __name__ == "__main__":
    done = compare_logit_rules(int(sys.argv[1]))
    print(f"{done.tokens} tokens, {done.differing} differ, {done.accepted} guesses accepted, {len(done.cells)} cells")
