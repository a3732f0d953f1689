"""Three clients that mean well beside one that does not: what it costs them, against four that all mean well.

    python -m tests.speculative.verifier.hostile 700

One synthetic verifier process; runs with and without the hostile client in turn (A/A'), its kinds one after the other.
Per client and run: the time between two tokens as they arrive. Prints one line of JSON: for each kind the others'
median and 99th percentile over those of the runs in which the fourth client is like them.
"""

from __future__ import annotations

import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from lab.command.entry import compose_settings
from lab.engine.sampling import Sampling
from lab.models.sources import load_tokenizer_only
from lab.wire.faults import WireError
from speculative.drafter.loop import Round, TargetLost, speculate
from speculative.drafter.sources import open_drafts
from speculative.drafter.target import RemoteTarget, join
from speculative.request import GenerationRequest, Verdict
from speculative.settings import Mode, SpeculativeSettings
from speculative.vocabulary import token_texts
from tests.speculative.in_process import request
from tests.speculative.processes import verifier

WORDS = (
    *("model=random", "tracking=none", "project.engine=synthetic", "project.lookup=false", "project.context=0"),
    *("project.draft.source=synthetic", "project.sessions=8", "project.resume_seconds=0"),
)
HONEST = 3
MOST_TOKENS = 100_000


@dataclass(frozen=True)
class Beside:
    """Seconds between tokens of the clients that mean well, and whether their texts are what they should be."""

    median_seconds: float
    p99_seconds: float
    texts: list[list[int]]


def wrong_guesses(target: RemoteTarget, stop: threading.Event) -> None:
    """As many wrong guesses as the window takes, at once, in every epoch; asks for the longest passes."""
    epoch, position = 0, 1
    target.open(_asked(MOST_TOKENS, 0, length=target.longest_draft))
    while not stop.is_set():
        for start in range(0, target.window, target.longest_draft):
            target.draft(epoch, position + start, [0] * target.longest_draft)
        told = epoch
        while told == epoch and not stop.is_set():
            verdict = target.next()
            assert isinstance(verdict, Verdict)
            position += verdict.accepted + len(verdict.ids)
            epoch = max(epoch, verdict.epoch)


def flood(target: RemoteTarget, stop: threading.Event) -> None:
    """Empty DRAFTs as fast as the socket takes them."""
    target.open(_asked(MOST_TOKENS, 0))
    target.next()
    while not stop.is_set():
        target.draft(0, 1, [])


def stall(target: RemoteTarget, stop: threading.Event) -> None:
    """A text of mode sync, and never a guess."""
    target.open(_asked(MOST_TOKENS, 0, mode=Mode.sync))
    stop.wait()


Fourth = Callable[[RemoteTarget, threading.Event], None]
KINDS: dict[str, Fourth] = {done.__name__: done for done in (wrong_guesses, flood, stall)}


def beside(port: int, kind: str | None, new_tokens: int) -> Beside:
    """One run: three texts of `new_tokens` each, beside a fourth client; None: it is like them."""
    settings = compose_settings("spec_decoding", " ".join((*WORDS, f"network.port={port}")), SpeculativeSettings)
    texts = token_texts(load_tokenizer_only(settings.model))
    gaps: list[float] = []
    stop = threading.Event()
    with ThreadPoolExecutor(HONEST + 1) as pool, join(settings, texts) as fourth:
        targets = [join(settings, texts) for _ in range(HONEST)]

        def like_them(target: RemoteTarget, stop: threading.Event) -> None:
            for _ in _rounds(settings, target, 9, MOST_TOKENS, texts):
                if stop.is_set():
                    return

        other = pool.submit(_until_stopped, KINDS[kind] if kind else like_them, fourth, stop)
        jobs = [
            pool.submit(_draft, settings, target, seed, new_tokens, texts, gaps)
            for seed, target in enumerate(targets, start=1)
        ]
        found = [job.result() for job in jobs]
        stop.set()
        fourth.close()
        other.result()
        for target in targets:
            target.close()
    ordered = sorted(gaps)
    return Beside(statistics.median(ordered), ordered[int(0.99 * len(ordered))], found)


def compare(new_tokens: int, kinds: list[str], turns: int, *words: str) -> dict[str, dict[str, float | bool]]:
    """Each kind against runs without it, in turn."""
    report: dict[str, dict[str, float | bool]] = {}
    with verifier(*WORDS, *words) as running:
        for kind in kinds:
            pairs = [
                (beside(running.port, None, new_tokens), beside(running.port, kind, new_tokens)) for _ in range(turns)
            ]
            report[kind] = {
                "median_ratio": statistics.median(b.median_seconds / a.median_seconds for a, b in pairs),
                "p99_ratio": statistics.median(b.p99_seconds / a.p99_seconds for a, b in pairs),
                "same_texts": all(a.texts == b.texts for a, b in pairs),
            }
    return report


def _asked(count: int, seed: int, mode: Mode = Mode["async"], length: int = 0) -> GenerationRequest:
    return request([1], count, Sampling(seed=seed, temperature=0.0, top_k=0, top_p=1.0), mode, length=length)


def _draft(
    settings: SpeculativeSettings,
    target: RemoteTarget,
    seed: int,
    new_tokens: int,
    texts: list[str],
    gaps: list[float],
) -> list[int]:
    ids: list[int] = []
    before = 0.0
    for done in _rounds(settings, target, seed, new_tokens, texts):
        now = time.perf_counter()
        if before:
            gaps.extend([(now - before) / len(done.tokens)] * len(done.tokens))
        before = now
        ids += done.tokens
    return ids


def _rounds(
    settings: SpeculativeSettings, target: RemoteTarget, seed: int, new_tokens: int, texts: list[str]
) -> Iterator[Round]:
    asked = _asked(new_tokens, seed)
    device = torch.device("cpu")
    drafts = open_drafts(settings, device, asked.sampling, texts, target.welcome.vocabulary_size)
    yield from speculate(target, drafts, asked, [])
    drafts.close()


def _until_stopped(how: Fourth, target: RemoteTarget, stop: threading.Event) -> None:
    try:
        how(target, stop)
    except (WireError, TargetLost):
        if not stop.is_set():
            raise


if __name__ == "__main__":
    print(json.dumps(compare(int(sys.argv[1]), list(KINDS), 3)))
