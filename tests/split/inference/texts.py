"""Greedy texts of a split model against the whole one's: one function for a few in `test` and 32 x 128 in `soak`."""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lab.command.entry import compose_settings
from lab.engine.base import Engine
from lab.engine.local import LocalEngine
from lab.engine.sampling import Sampling
from lab.models.sources import load_model, load_tokenizer_only
from split.inference.open import load_stage
from split.inference.sharded_model import ShardedModel
from split.settings import SplitSettings
from split.transport.inproc import InProcess

AT_ONCE = 16
"""Texts in one batch; split and whole run the same batches."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Texts:
    """What was compared."""

    prompts: int
    tokens: int
    """Of all texts of one engine."""
    cuts: list[list[int]]
    differing: int
    """Tokens of all split texts that are not the whole model's."""


def settings_of(*words: str) -> SplitSettings:
    """A model and how much its engines give."""
    fixed = (f"project.sessions={AT_ONCE}", "project.context=512", "device.threads=1", "tracking=none")
    return compose_settings("split_inf", " ".join((*fixed, *words)), SplitSettings)


def compare_texts(
    settings: SplitSettings,
    cuts: Sequence[Sequence[int]],
    *,
    prompts: int,
    tokens: int,
    engine_of: Callable[[SplitSettings, Sequence[int]], ShardedModel] | None = None,
) -> Texts:
    """Write `prompts` texts of `tokens` tokens, whole and with shards that begin at each of `cuts`."""
    torch.set_num_threads(1)
    starts = _prompts(settings, prompts)
    expected = _write(_whole(settings), starts, tokens)
    differing = 0
    for begins in cuts:
        engine = (engine_of or inprocess)(settings, begins)
        found = _write(engine, starts, tokens)
        engine.shutdown()
        differing += sum(a != b for one, other in zip(expected, found, strict=True) for a, b in zip(one, other))
    return Texts(prompts, sum(map(len, expected)), [list(begins) for begins in cuts], differing)


def inprocess(settings: SplitSettings, begins: Sequence[int]) -> ShardedModel:
    """Shards in this process: layers begins[0] to begins[1] - 1, ..."""
    stages = [load_stage(settings, CPU, range(a, b)) for a, b in itertools.pairwise(begins)]
    return ShardedModel(
        InProcess(stages),
        vocabulary_size=settings.model.architecture.vocabulary,
        context=settings.project.context,
        prefill_chunk=settings.project.prefill_chunk,
        recovery_seconds=0.0,
    )


def _whole(settings: SplitSettings) -> LocalEngine:
    project = settings.project
    return LocalEngine(
        load_model(settings.model, CPU).model,
        sessions=project.sessions,
        context=project.context,
        bucket=project.cache_bucket,
        kv_limit_bytes=project.cache_limit_bytes,
        prefill_chunk=project.prefill_chunk,
        exact_rows=None,
    )


def _prompts(settings: SplitSettings, count: int) -> list[list[int]]:
    """Pieces of the standard library, of different lengths."""
    tokenizer, text = load_tokenizer_only(settings.model), Path(argparse.__file__).read_text()
    generator = random.Random(5)
    places = [generator.randrange(len(text) - 400) for _ in range(count)]
    return [list(tokenizer(text[place : place + generator.randrange(20, 200)])["input_ids"]) for place in places]


def greedy(engine: Engine, ids: Sequence[int], count: int) -> list[int]:
    """The first `count` tokens behind `ids`."""
    return _write(engine, [ids], count)[0]


def _write(engine: Engine, starts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    written: list[list[int]] = []
    for begin in range(0, len(starts), AT_ONCE):
        texts = [engine.open(ids, Sampling.greedy()) for ids in starts[begin : begin + AT_ONCE]]
        said: list[list[int]] = [text.step.next_ids[-1:] for text in texts if text.step]
        for _ in range(tokens - 1):
            steps = engine.extend([(text, ids[-1:]) for text, ids in zip(texts, said, strict=True)], "last")
            for ids, step in zip(said, steps, strict=True):
                ids += step.next_ids
        written += said
        for text in texts:
            text.close()
    return written
