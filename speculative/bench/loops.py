"""Parts of the benchmark with one text at a time: each measures the rows of one table.

`speculative.bench` describes them.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace

from lab.bench import Row, Sample, judged, ratio
from lab.llama_cpp import LlamaCpp, open_llama_cpp
from lab.ping_pong import measure as measure_frames
from lab.text.prompts import prompt_ids
from speculative.bench.assisted import AssistedRun
from speculative.bench.plots import draw_timelines
from speculative.bench.rig import Case, Rig
from speculative.bench.rows import (
    ASYNC,
    Readings,
    alone_case,
    at_least,
    loop_row,
    median_speed,
    plain_row,
    real_row,
    row_name,
    speed_ratio,
    synthetic_case,
)
from speculative.bench.timeline import watch
from speculative.settings import DraftSource, Mode
from speculative.theory import sync_tokens_per_second

LEAST_OVER_FIXED = 0.95
LEAST_OVER_SYNC = 0.97
LEAST_OVER_ALONE = 0.97
MOST_ADDED = 60e-6
LEAST_OVER_LLAMA_CPP = 2.0
LLAMA_CPP_DRAFTS = ("NGRAM_SIMPLE", "NGRAM_MAP_K", "NGRAM_MAP_K4V", "NGRAM_CACHE")
"""Its ways to draft by n-grams, but for NGRAM_MOD, which remembers the answer of the turn before."""


def measure(rig: Rig, cases: Sequence[Case], repeats: int, after_each: Callable[[], None] | None = None) -> Readings:
    """Measure all cases in turn, then again with another seed: all cases of a turn generate the same text."""
    readings: Readings = {case: [] for case in cases}
    for turn in range(repeats):
        for case in cases:
            readings[case].append(rig.generate(replace(case, seed=turn)))
        if after_each is not None:
            after_each()
    return readings


# Synthetic engines


def loops(rig: Rig) -> list[Row]:
    """The target alone, the synchronous loop and the asynchronous one, at every delay."""
    bench = rig.settings.project.bench
    cases = []
    for rtt in bench.rtt_seconds:
        cases.append(alone_case(rig, rtt))
        cases += [synthetic_case(rig, Mode.sync, rtt, length) for length in bench.draft_lengths]
        cases.append(synthetic_case(rig, ASYNC, rtt, "auto"))
    readings = measure(rig, cases, bench.repeats)
    return [loop_row(rig, case, readings) for case in cases]


def lengths(rig: Rig) -> list[Row]:
    """The automatic draft length compared with fixed ones."""
    bench = rig.settings.project.bench
    rows = []
    for rtt in bench.rtt_seconds:
        automatic = synthetic_case(rig, ASYNC, rtt, "auto")
        fixed = [synthetic_case(rig, ASYNC, rtt, length) for length in bench.fixed_lengths]
        readings = measure(rig, [alone_case(rig, rtt), automatic, *fixed], bench.repeats)
        rows += [loop_row(rig, case, readings, part="lengths") for case in fixed]
        best = max(fixed, key=lambda case: median_speed(readings[case]))
        row = loop_row(rig, automatic, readings, part="lengths") | {
            "best_fixed": best.draft_length,
            "over_best_fixed": speed_ratio(readings[automatic], readings[best]),
        }
        rows.append(at_least(LEAST_OVER_FIXED, "over_best_fixed", row))
    return rows


def near(rig: Rig) -> list[Row]:
    """No delay and low acceptance, where the synchronous loop is at its best: both loops over the same text."""
    bench = rig.settings.project.bench
    rtt = min(bench.rtt_seconds)
    rows = []
    for acceptance in bench.low_acceptances:
        speeds = rig.speeds(rtt)
        best = max(range(1, 17), key=lambda k: sync_tokens_per_second(acceptance, k, speeds))
        synchronous, asynchronous = (
            replace(synthetic_case(rig, mode, rtt, length), acceptance=acceptance, new_tokens=bench.new_tokens)
            for mode, length in ((Mode.sync, best), (ASYNC, "auto"))
        )
        readings = measure(rig, [alone_case(rig, rtt), synchronous, asynchronous], bench.repeats)
        rows.append(loop_row(rig, synchronous, readings, part="near"))
        row = loop_row(rig, asynchronous, readings, part="near")
        row["over_sync"] = speed_ratio(readings[asynchronous], readings[synchronous])
        rows.append(at_least(LEAST_OVER_SYNC, "over_sync", row))
    return rows


def useless(rig: Rig) -> list[Row]:
    """A drafter that is never right."""
    bench = rig.settings.project.bench
    rows = []
    for rtt in [min(bench.rtt_seconds), *bench.far_rtt_seconds]:
        alone = alone_case(rig, rtt)
        random = replace(alone, mode=ASYNC, source=DraftSource.random)
        readings = measure(rig, [alone, random], bench.repeats)
        rows.append(at_least(LEAST_OVER_ALONE, "speedup", loop_row(rig, random, readings, part="useless")))
    return rows


def frame(rig: Rig) -> list[Row]:
    """The round trip of one frame, relative to as many raw bytes."""
    rounds = rig.settings.project.bench.frame_rounds
    pings = measure_frames(body_bytes=32, rounds=rounds, warm_up_rounds=rounds // 10)
    row = {
        "part": "frame",
        "frame_bytes": pings.frame_bytes,
        "raw_seconds": pings.raw_seconds,
        "frame_seconds": pings.frame_seconds,
        "added_seconds": pings.added_seconds,
        "n": pings.rounds,
    }
    return [judged("frame", row, f"added_seconds at most {MOST_ADDED}", pings.added_seconds <= MOST_ADDED)]


def busy(rig: Rig) -> list[Row]:
    """Busy times of both sides in a short text of each loop, and a picture of them."""
    bench = rig.settings.project.bench
    rtt = bench.busy_rtt_seconds
    rows, timelines = [], {}
    for mode, length in ((Mode.sync, bench.draft_lengths[-1]), (ASYNC, "auto")):
        case = replace(synthetic_case(rig, mode, rtt, length), new_tokens=bench.alone_tokens)
        timeline = timelines[mode.name] = watch(rig, case)
        end = timeline.verdicts[-1][0]
        rows.append(
            plain_row(rig, "busy", case)
            | {
                "target_busy": sum(b - a for a, b in timeline.passes) / end,
                "drafter_busy": sum(b - a for a, b in timeline.steps) / end,
                "rows_per_pass": statistics.mean(timeline.rows),
                "tokens_per_second": sum(tokens for _, tokens, _ in timeline.verdicts) / end,
                "n": 1,
            }
        )
    draw_timelines(rig.folder / "busy.png", timelines, rtt)
    return rows


# A real target


def texts(rig: Rig) -> list[Row]:
    """Every text at every delay, with the source of `project.draft`, and transformers' own speculation."""
    bench = rig.settings.project.bench
    source = rig.settings.project.draft.source
    rows = []
    colocated = AssistedRun(rig.settings, rig.tokenizer)
    for text in bench.chosen_texts:
        cases = []
        for rtt in bench.rtt_seconds:
            alone = Case(mode=Mode.target_only, rtt_seconds=rtt, prompt=text.prompt, new_tokens=bench.text_tokens)
            cases += [alone, replace(alone, mode=Mode.sync, source=source, draft_length=bench.draft_lengths[0])]
            cases.append(replace(alone, mode=ASYNC, source=source, draft_length="auto"))
        assisted: list[float] = []
        readings = measure(rig, cases, bench.text_repeats, lambda: assisted.append(colocated.speed(text.prompt)))  # noqa: B023
        near = readings[cases[0]]
        rows.append(
            plain_row(rig, "texts", cases[1])
            | {
                "mode": "assisted",
                "draft_length": None,
                "rtt_seconds": 0.0,
                "tokens_per_second": Sample.of(assisted),
                "speedup": ratio(assisted, [reading.tokens_per_second for reading in near]),
                "n": len(assisted),
                "text": text.name,
            }
        )
        for case in cases:
            row = real_row(rig, case, readings) | {"text": text.name}
            if case.mode is ASYNC:
                least = 1.5 if text.repeats and case.rtt_seconds <= 0.02 else LEAST_OVER_ALONE
                row = at_least(least, "speedup", row)
            rows.append(row)
    return rows


def llama_cpp(rig: Rig) -> list[Row]:
    """Prompt lookup without a delay, compared with llama.cpp on one core: alone, and with the best of its own ways to
    draft by n-grams. All decode greedily until the model ends the text. No rows where `open_llama_cpp` has none."""
    settings = rig.settings
    with ExitStack() as stack:
        peers: dict[str | None, LlamaCpp] = {}
        for name in (None, *LLAMA_CPP_DRAFTS):
            peer = open_llama_cpp(settings.model, 1, 1, settings.project.context, name)
            if peer is None:
                return []
            peers[name] = stack.enter_context(closing(peer))
        return _beside(rig, peers)


def _beside(rig: Rig, peers: Mapping[str | None, LlamaCpp]) -> list[Row]:
    bench, rows = rig.settings.project.bench, []
    for text in bench.chosen_texts:
        ids = prompt_ids(rig.tokenizer, text.prompt, chat=True)
        speeds: dict[str | None, list[float]] = {name: [] for name in peers}

        def after_each(ids: list[int] = ids, speeds: dict[str | None, list[float]] = speeds) -> None:
            for name, peer in peers.items():
                timings = peer.complete(ids, bench.text_tokens, ignore_end=False)
                speeds[name].append(1000 * timings["predicted_n"] / (timings["prompt_ms"] + timings["predicted_ms"]))

        alone = Case(mode=Mode.target_only, rtt_seconds=0.0, prompt=text.prompt, new_tokens=bench.text_tokens)
        case = replace(alone, mode=ASYNC, source=DraftSource.ngram)
        readings = measure(rig, [alone, case], bench.text_repeats, after_each)
        ours = [reading.tokens_per_second for reading in readings[case]]
        best = max(LLAMA_CPP_DRAFTS, key=lambda name: statistics.median(speeds[name]))
        over, over_best = ratio(ours, speeds[None]), ratio(ours, speeds[best])
        row = real_row(rig, case, readings, part="llama_cpp") | {
            "text": text.name,
            "llama_cpp_tokens_per_second": {name or "alone": Sample.of(found) for name, found in speeds.items()},
            "its_best": best,
            "over_llama_cpp": over,
            "over_its_best": over_best,
        }
        if text.repeats:
            holds = over.median >= LEAST_OVER_LLAMA_CPP and over_best.median >= 1
            target = f"over_llama_cpp at least {LEAST_OVER_LLAMA_CPP}, over_its_best at least 1"
            row = judged(row_name(row), row, target, holds)
        rows.append(row)
    return rows


def sources(rig: Rig) -> list[Row]:
    """Draft sources compared: prompt lookup, and the first layers of the target, on every text without a delay."""
    bench = rig.settings.project.bench
    rtt = min(bench.rtt_seconds)
    rows = []
    for text in bench.chosen_texts:
        alone = Case(mode=Mode.target_only, rtt_seconds=rtt, prompt=text.prompt, new_tokens=bench.text_tokens)
        cases = [alone, replace(alone, mode=ASYNC, source=DraftSource.ngram)]
        cases += [replace(alone, mode=ASYNC, source=DraftSource.layers, layers=layers) for layers in bench.layers]
        readings = measure(rig, cases, 1)
        rows += [real_row(rig, case, readings, part="sources") | {"text": text.name} for case in cases[1:]]
    return rows
