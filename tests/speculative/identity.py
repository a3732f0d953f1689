"""The proof that speculation does not change the text, at any size: `make test` runs a small one, `soak` the whole.

    python -m tests.speculative.identity 50000 async
    python -m tests.speculative.identity 50000 sync

Every source of guesses, greedy and sampled, each draft length from 1 to 16, alone and with three other texts that share
its passes; against the target decoding alone, one token a pass. In mode async every word between drafter and verifier
takes a random time, others for each text, and the verifier makes guesses of its own for every second cell. float64: not
one token may differ. float32: a token may flip where the target's two best are as close as rounding.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch

from lab.command.entry import compose_settings
from lab.device import open_device
from lab.engine.compiled import Compiler
from lab.engine.local import LocalEngine
from lab.engine.sampling import Sampling
from lab.models.shape import ModelShape
from lab.models.sources import load_model, load_tokenizer_only
from lab.text.generation import grammars_of
from lab.text.prompts import prompt_ids
from speculative.drafter.check import Flip
from speculative.drafter.loop import DraftedSequence
from speculative.drafter.sources import open_drafts
from speculative.drafts import Drafts, RecordedDrafts
from speculative.messages import Reason
from speculative.request import Ending, GenerationRequest, Verdict
from speculative.settings import DraftSource, Mode, SpeculativeSettings
from speculative.verifier.scheduler import Scheduler
from speculative.vocabulary import token_texts
from tests.speculative.in_process import (
    LIMITS,
    InProcess,
    bench,
    decoded_alone,
    flips_alone,
    local_engine,
    request,
    speculated,
    tokens,
)

SOURCES = ("model", "ngram", "layers", "noisy", "random", "none")
SAMPLINGS = (Sampling.greedy(), Sampling(seed=5, temperature=0.8, top_k=40, top_p=0.95))
LENGTHS = range(1, 17)
ALONE = tuple((length,) for length in LENGTHS)
TOGETHER = tuple(tuple(range(first, 17, 4)) for first in range(1, 5))
"""Draft lengths of four texts at once."""
TEXTS = len(SOURCES) * len(SAMPLINGS) * (len(ALONE) + 4 * len(TOGETHER))
"""In the whole comparison."""
DELAYS = (0.0, 0.002, 0.01, 0.03)
"""Longest time of a word, each way, in seconds; a pass of the random model takes about 5 ms."""


@dataclass
class Compared:
    """How much was compared, and how often it differed."""

    tokens: int = 0
    accepted: int = 0
    shared_passes: int = 0
    flips: list[Flip] = field(default_factory=list)
    cells: set[tuple[str, str, tuple[int, ...]]] = field(default_factory=set)
    """Source, greedy or sampled, draft lengths of the texts at once."""

    @property
    def differing(self) -> int:
        """Tokens that the target alone does not say there."""
        return len(self.flips)

    def add(self, other: Compared) -> None:
        self.tokens += other.tokens
        self.accepted += other.accepted
        self.shared_passes += other.shared_passes
        self.flips += other.flips
        self.cells |= other.cells


class Subject:
    """A target, and prompts for it: text number n of a comparison has prompt n."""

    def __init__(self, words: Sequence[str], prompts: Sequence[Sequence[int]]) -> None:
        self.settings = compose_settings("spec_decoding", " ".join(words), SpeculativeSettings)
        self.prompts = prompts
        self._texts = token_texts(load_tokenizer_only(self.settings.model))
        self.grammars = grammars_of(self.settings.model)
        self._device = open_device(self.settings.device)
        self.model = load_model(self.settings.model, self._device).model
        self._compiler = Compiler.of(self.settings.model, self.settings.device, lasts=True)
        self._own: dict[tuple[int, int, Sampling], list[int]] = {}

    def drafts(self, source: str, sampling: Sampling) -> Drafts:
        """Who guesses, made as the drafter makes it."""
        project = self.settings.project
        draft = replace(project.draft, source=DraftSource[source])
        settings = replace(self.settings, project=replace(project, draft=draft))
        return open_drafts(settings, self._device, sampling, self._texts, len(self._texts), self.grammars)

    def engine(self, sessions: int = 1) -> LocalEngine:
        """The target."""
        return local_engine(self.model, sessions, grammars=self.grammars, compiler=self._compiler)

    def own_text(self, number: int, sampling: Sampling, count: int) -> list[int]:
        """What the target says to prompt `number` without any verifier."""
        key = (number, count, sampling)
        if key not in self._own:
            self._own[key] = decoded_alone(self.engine(), self.prompts[number], sampling, count)
        return self._own[key]


def random_subject() -> Subject:
    """`model=random` in float64. The draft model is the same in float32: right nearly always."""
    numbers = random.Random(0)
    prompts = [[numbers.randrange(256) for _ in range(numbers.randrange(1, 90))] for _ in range(len(ALONE) + 4)]
    words = (
        *("model=random", "model.dtype=float64", "device.threads=1", "project.context=256"),
        *("project.draft.model=random", "project.draft.dtype=float32"),
        *("project.draft.layers=3", "project.draft.noise=0.05"),
    )
    return Subject(words, prompts)


def quantised_subject(quantization: str, model: str = "random", *, compiles: bool = True, threads: int = 1) -> Subject:
    """A model in bfloat16, over compiled layers or eager, whose numbers take as many bits as `model.quantization`
    says."""
    numbers = random.Random(0)
    prompts = [[numbers.randrange(256) for _ in range(numbers.randrange(1, 90))] for _ in range(len(ALONE) + 4)]
    words = (
        *(f"model={model}", "model.dtype=bfloat16", f"model.quantization={quantization}"),
        *(f"device.compile={compiles}", f"device.threads={threads}", "project.context=256"),
        *(f"project.draft.model={model}", "project.draft.dtype=float32"),
        *("project.draft.layers=3", "project.draft.noise=0.05"),
    )
    return Subject(words, prompts)


def smollm2_subject() -> Subject:
    """SmolLM2 in float32; the draft model is the same in bfloat16."""
    words = (
        *("model=smollm2_135m", "model.dtype=float32", "device.threads=1", "project.context=256"),
        *("project.draft.model=smollm2_135m", "project.draft.dtype=bfloat16"),
        *("project.draft.layers=4", "project.draft.noise=0.1"),
    )
    asked = (
        "Write this Python function again, with a docstring:\ndef add(first, second):\n    return first + second\n",
        "What is the capital of France?",
        "List the numbers from one to twenty in words.",
        "Tell me a story about a fox.",
        "Repeat after me, twice: the quick brown fox jumps over the lazy dog.",
    )
    tokenizer = load_tokenizer_only(compose_settings("spec_decoding", "", SpeculativeSettings).model)
    return Subject(words, [prompt_ids(tokenizer, text, chat=True) for text in asked])


def compare(
    subject: Subject,
    source: str,
    sampling: Sampling,
    lengths: Sequence[int],
    new_tokens: int,
    first: int = 0,
    mode: Mode = Mode.sync,
) -> Compared:
    """Texts `first`, `first + 1`, ... at once on one verifier, one of each draft length, against the target alone."""
    kind = "sampled" if sampling.temperature else "greedy"
    compared = Compared(cells={(source, kind, tuple(lengths))})
    sources = [subject.drafts(source, sampling) for _ in lengths]  # not in the threads below: loading is for one
    delays = DELAYS if mode is Mode["async"] else (0.0,)
    limits = replace(LIMITS, lookup=(3, 1)) if lengths[0] % 2 else LIMITS
    with bench(subject.engine(len(lengths)), limits=limits) as verifiers:

        def draft(index: int) -> tuple[list[int], int]:
            asked = request(subject.prompts[first + index], new_tokens, sampling, mode, length=lengths[index])
            delay = delays[(lengths[0] + index) % len(delays)]
            rounds = speculated(InProcess(verifiers, index, delay, seed=index), sources[index], asked)
            sources[index].close()
            return tokens(rounds), sum(done.accepted for done in rounds)

        with ThreadPoolExecutor(len(lengths)) as pool:
            drafted = list(pool.map(draft, range(len(lengths))))
        compared.shared_passes = sum(count > 1 for count in verifiers.batches)
    for number, (text, accepted) in enumerate(drafted, start=first):
        assert len(text) == new_tokens
        compared.tokens += new_tokens
        compared.accepted += accepted
        if text != subject.own_text(number, sampling, new_tokens):
            compared.flips += flips_alone(subject.engine(), subject.prompts[number], sampling, text)
    return compared


def speculated_equals_alone(model: torch.nn.Module, *, seed: int, texts: int = 4, new_tokens: int = 24) -> Compared:
    """Whether texts of any causal model are what it says alone, one token a pass, in a cache of their own.

    What may matter is drawn from `seed`: lengths of prompts and of chunks, modes, greedy or sampled, when each text
    comes, how far ahead is guessed, and which guesses are wrong. So texts of other lengths come and go beside each one,
    prompts go in pieces while others are checked, and every few tokens a pass is taken back. In this process, one
    thread, in order: the same seed is the same run.

    Args:
        model: With its dtype: in float64 nothing may differ.
        seed: Draws everything.
        texts: How many, at most so many at once.
        new_tokens: Of each.
    """
    numbers = random.Random(seed)
    vocabulary_size = ModelShape.of(cast(Any, model).config).vocabulary
    drawn = [_drawn_text(numbers, vocabulary_size, new_tokens) for _ in range(texts)]
    engine = local_engine(model, sessions=max(2, texts - 1), context=120)
    alone = local_engine(model, sessions=1, context=120)
    own = [decoded_alone(alone, asked.prompt_ids, asked.sampling, new_tokens) for asked in drawn]
    limits = replace(LIMITS, prefill_chunk=numbers.choice([1, 3, 7, 64]), lookup=numbers.choice([None, (3, 1)]))
    verifier = Scheduler(engine, end_ids=[], limits=limits, closed=lambda text, ended: None)
    sources: list[Drafts] = [
        RecordedDrafts(text, numbers.choice([0.0, 0.6, 0.9]), numbers.randrange(2**31), vocabulary_size) for text in own
    ]
    written, compared = _written(verifier, drawn, sources, numbers)
    for asked, text, expected in zip(drawn, written, own, strict=True):
        compared.tokens += len(expected)
        if text != expected:
            compared.flips += flips_alone(alone, asked.prompt_ids, asked.sampling, text)
            assert compared.flips, "a text differs from the target's, and yet the target says each of its tokens"
    return compared


def _drawn_text(numbers: random.Random, vocabulary_size: int, new_tokens: int) -> GenerationRequest:
    sampled = Sampling(
        seed=numbers.randrange(2**63),
        temperature=numbers.choice([0.5, 1.0, 1.5]),
        top_k=numbers.choice([0, 5, 40]),
        top_p=numbers.choice([1.0, 0.95]),
    )
    prompt = [numbers.randrange(vocabulary_size) for _ in range(numbers.choice([1, 2, 9, 31, 60]))]
    sampling = numbers.choice([Sampling.greedy(), sampled])
    return request(prompt, new_tokens, sampling, numbers.choice(list(Mode)), length=numbers.randrange(1, 9))


def _written(
    verifier: Scheduler, drawn: Sequence[GenerationRequest], sources: Sequence[Drafts], numbers: random.Random
) -> tuple[list[list[int]], Compared]:
    """The texts as a verifier writes them that is told a draft, or ticks, whichever is drawn next."""
    held = [DraftedSequence(asked, drafts) for asked, drafts in zip(drawn, sources, strict=True)]
    desk = _Desk(verifier)
    compared, waiting, open_ = Compared(), list(range(len(held))), set[int]()
    for _ in range(400 * len(held)):
        if not (waiting or open_):
            return [text.new_ids for text in held], compared
        if waiting and numbers.random() < 0.2:
            number = waiting.pop(0)
            assert not any(isinstance(one, Ending) for one in verifier.open(number, drawn[number], client="drawn"))
            open_.add(number)
        for number in sorted(open_):
            if drawn[number].mode is not Mode.target_only and numbers.random() < 0.7:
                text = held[number]
                text.draft(min(drawn[number].draft_length, text.room, LIMITS.longest_check - text.ahead))
                desk.number = number
                text.send(desk)
        outcomes = verifier.tick()
        verdicts = [outcome for outcome in outcomes if isinstance(outcome, Verdict)]
        compared.shared_passes += len(verdicts) > 1
        for verdict in verdicts:
            compared.accepted += held[cast(int, verdict.key)].extend(verdict).accepted
        for outcome in outcomes:
            if isinstance(outcome, Ending):
                assert outcome.reason is Reason.length, outcome.text
                open_.discard(cast(int, outcome.key))
    raise AssertionError("the texts do not end")


class _Desk:
    """A `Target` as far as `DraftedSequence.send` needs one: what is handed in is at the verifier at once."""

    longest_draft = LIMITS.longest_check

    def __init__(self, verifier: Scheduler) -> None:
        self._verifier = verifier
        self.number = 0

    def draft(self, epoch: int, position: int, draft_ids: Sequence[int]) -> None:
        assert self._verifier.offer(self.number, epoch, position, draft_ids, 0.0) == []


def cells(whole: bool) -> Iterator[tuple[str, Sampling, tuple[int, ...], int]]:
    """Source, sampling, draft lengths of the texts at once, number of the first text.

    Whole: every source and sampling with every draft length, alone and among four. Else each source and sampling once
    alone and once among four, with lengths that go on from one to the next.
    """
    for index, (source, sampling) in enumerate(itertools.product(SOURCES, SAMPLINGS)):
        alone = ALONE if whole else ALONE[index : index + 1]
        together = TOGETHER if whole else (TOGETHER[index % 4],)
        yield from ((source, sampling, lengths, number if whole else 0) for number, lengths in enumerate(alone))
        yield from ((source, sampling, lengths, len(alone) if whole else 1) for lengths in together)


def compare_everything(subject: Subject, new_tokens: int, mode: Mode, *, whole: bool) -> Compared:
    """All cells, `new_tokens` a text."""
    torch.set_num_threads(subject.settings.device.threads)
    total = Compared()
    for source, sampling, lengths, first in cells(whole):
        total.add(compare(subject, source, sampling, lengths, new_tokens, first, mode))
    return total


def compare_random(at_least_tokens: int, mode: Mode) -> Compared:
    """The whole comparison of `model=random`."""
    return compare_everything(random_subject(), -(-at_least_tokens // TEXTS), mode, whole=True)


def compare_quantised(
    at_least_tokens: int, quantization: str, *, compiles: bool, threads: int
) -> tuple[bool, Compared]:
    """The whole comparison of an engine, one half in each mode; and whether it says that it is row-invariant."""
    subject, total = quantised_subject(quantization, compiles=compiles, threads=threads), Compared()
    for mode in (Mode.sync, Mode["async"]):
        total.add(compare_everything(subject, -(-at_least_tokens // (2 * TEXTS)), mode, whole=True))
    return subject.engine(4).row_invariant, total


if __name__ == "__main__":
    done = compare_random(int(sys.argv[1]), Mode[sys.argv[2]])
    print(f"{done.tokens} tokens, {done.differing} differ, {done.accepted} guesses accepted, {len(done.cells)} cells")
