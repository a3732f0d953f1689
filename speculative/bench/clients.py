"""Parts of the benchmark with several concurrent clients."""

import multiprocessing
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from multiprocessing.synchronize import Event
from typing import Any

from lab.bench import Row, Sample, judged, pinned, ratio
from lab.command.processes import start
from lab.engine.sampling import Sampling
from lab.wire.faults import WireError
from speculative.bench.rig import DRAFTER_CORE, Case, Rig
from speculative.bench.rows import ASYNC, at_least, plain_row, synthetic_case
from speculative.drafter.loop import TargetLost
from speculative.drafter.session import make_request
from speculative.drafter.tally import Tally
from speculative.drafter.target import join
from speculative.settings import DraftSource, SpeculativeSettings

LEAST_OVER_ONE = 2.5
MOST_MEDIAN, MOST_P99 = 1.05, 1.25
FLOOD_FRAMES_PER_SECOND = 5000.0
FLOOD_START_SECONDS = 60.0
"""Time limit for the start of the hostile client's process."""


def neighbours(rig: Rig) -> list[Row]:
    """Three clients, next to a fourth that is like them, that is stalled, or that floods the verifier with frames."""
    fourths: dict[str, Callable[[Rig], Any]] = {
        "like them": _calm,
        "like them, again": _calm,
        "stalled": _stalled,
        "hostile": _hostile,
    }
    times = {name: _token_seconds_beside(rig, fourth) for name, fourth in fourths.items()}
    base = sorted(times["like them"])
    rows = []
    for name, seconds in times.items():
        row: Row = {
            "part": "neighbours",
            "mode": ASYNC.name,
            "drafter": DraftSource.synthetic,
            "rtt_seconds": min(rig.settings.project.bench.rtt_seconds),
            "fourth": name,
            "median_over_calm": statistics.median(seconds) / statistics.median(base),
            "p99_over_calm": _p99(seconds) / _p99(base),
            "ms_per_token_p50": statistics.median(seconds) * 1000,
            "ms_per_token_p99": _p99(seconds) * 1000,
            "n": len(seconds),
        }
        if fourths[name] is not _calm:
            ok = row["median_over_calm"] <= MOST_MEDIAN and row["p99_over_calm"] <= MOST_P99
            target = f"median_over_calm at most {MOST_MEDIAN}, p99_over_calm at most {MOST_P99}"
            row = judged(f"fourth client {name}", row, target, ok)
        rows.append(row)
    return rows


def crowd(rig: Rig) -> list[Row]:
    """Many concurrent prompt-lookup drafters on one verifier, relative to the same texts one after the other: all with
    the same text, and with all texts in turn."""
    bench = rig.settings.project.bench
    rtt = min(bench.rtt_seconds)
    prompts = {text.name: [text.prompt] for text in bench.chosen_texts}
    if len(prompts) > 1:
        prompts["all"] = [text.prompt for text in bench.chosen_texts]
    rows = []
    for name, own in prompts.items():
        case = Case(mode=ASYNC, rtt_seconds=rtt, source=DraftSource.ngram, new_tokens=bench.crowd_tokens)
        cases = [replace(case, prompt=own[number % len(own)]) for number in range(bench.crowd)]
        speeds: dict[int, list[float]] = {1: [], bench.crowd: []}
        for _ in range(bench.repeats):
            speeds[1].append(_sequentially(rig, cases))
            speeds[bench.crowd].append(_together(rig, cases))
        for count, tokens_per_second in speeds.items():
            row = plain_row(rig, "crowd", case) | {
                "text": name,
                "drafters": count,
                "tokens_per_second": Sample.of(tokens_per_second),
                "over_one": ratio(tokens_per_second, speeds[1]),
                "n": bench.repeats,
            }
            if count > 1:
                row = at_least(LEAST_OVER_ONE, "over_one", row)
            rows.append(row)
    return rows


def _token_seconds_beside(rig: Rig, fourth: Callable[[Rig], Any]) -> list[float]:
    """Seconds per token of three clients, next to a fourth."""
    with fourth(rig):
        tallies = _generate_together(rig, [_neighbour(rig)] * 3)
    return [seconds for tally in tallies for seconds in _token_seconds(tally)]


def _neighbour(rig: Rig) -> Case:
    bench = rig.settings.project.bench
    return replace(synthetic_case(rig, ASYNC, min(bench.rtt_seconds), "auto"), new_tokens=bench.neighbour_tokens)


def _token_seconds(tally: Tally) -> list[float]:
    """Seconds of each token: an n-th of its round, without the first round, which reads the prompt."""
    rows = list(tally.rows())[1:]
    return [row["round_seconds"] / row["round_tokens"] for row in rows for _ in range(row["round_tokens"])]


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[int(0.99 * (len(values) - 1))]


def _sequentially(rig: Rig, cases: Sequence[Case]) -> float:
    """Tokens per second of several texts one after the other; one that occurs twice is measured once, counted twice."""
    figures = {case: rig.generate(case).figures for case in dict.fromkeys(cases)}
    tokens = sum(figures[case]["new_tokens"] for case in cases)
    return float(tokens / sum(figures[case]["generation_seconds"] for case in cases))


def _together(rig: Rig, cases: Sequence[Case]) -> float:
    """Tokens per second of several concurrent texts, all together."""
    began = time.perf_counter()
    tallies = _generate_together(rig, cases)
    return sum(len(tally.token_ids) for tally in tallies) / (time.perf_counter() - began)


def _generate_together(rig: Rig, cases: Sequence[Case]) -> list[Tally]:
    """Generate several texts concurrently, each over its own connection and in its own thread."""
    with ExitStack() as stack:
        targets = [stack.enter_context(rig.join(case.rtt_seconds)) for case in cases]
        with ThreadPoolExecutor(len(cases)) as pool:
            return list(pool.map(rig.tally, cases, targets))


@contextmanager
def _calm(rig: Rig) -> Iterator[None]:
    """A fourth client like the others."""
    case = replace(_neighbour(rig), seed=1)
    with rig.join(case.rtt_seconds) as target, ThreadPoolExecutor(1) as pool:
        pool.submit(rig.tally, case, target)
        yield


@contextmanager
def _stalled(rig: Rig) -> Iterator[None]:
    """A drafter whose process is stopped in the middle of its text: it neither reads nor sends."""
    tokens = rig.settings.project.context // 2
    overrides = [f"network.port={rig.port}", "prompt=x", f"project.max_new_tokens={tokens}", *rig.drafter_overrides]
    process = start("speculative.drafter", overrides, rig.folder / "stalled")
    try:
        assert process.stdout is not None
        if not process.stdout.read(1):  # its text has begun
            raise RuntimeError("the drafter that was to be stopped had ended before")
        process.send_signal(signal.SIGSTOP)
        yield
    finally:
        process.kill()
        process.communicate()


@contextmanager
def _hostile(rig: Rig) -> Iterator[None]:
    """A client in a separate process that sends frames as fast as `FLOOD_FRAMES_PER_SECOND`."""
    context = multiprocessing.get_context("spawn")
    has_started = context.Event()
    process = context.Process(target=flood, args=(rig.settings, rig.texts, rig.port, has_started))
    with pinned(DRAFTER_CORE):
        process.start()
    try:
        if not has_started.wait(FLOOD_START_SECONDS):
            raise RuntimeError(f"the hostile client was not there within {FLOOD_START_SECONDS:g} s")
        yield
    finally:
        process.kill()
        process.join()


def flood(settings: SpeculativeSettings, texts: Sequence[str], port: int, has_started: Event) -> None:
    """Open a request and keep sending wrong draft tokens for its first position; connect again when disconnected."""
    settings = replace(settings, network=replace(settings.network, host="127.0.0.1", port=port))
    frames_at_once = 50
    while True:
        with suppress(WireError, TargetLost), join(settings, texts) as target:
            request = make_request(settings, [0], Sampling.greedy(), settings.project.context // 2)
            target.open(replace(request, mode=ASYNC))
            has_started.set()
            while True:
                for _ in range(frames_at_once):
                    target.draft(0, 1, [1] * target.longest_draft)
                time.sleep(frames_at_once / FLOOD_FRAMES_PER_SECOND)
        time.sleep(0.1)
