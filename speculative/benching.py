"""The parts of the benchmark: each measures one table and gives its rows. `speculative.bench` says what they are."""

from __future__ import annotations

import multiprocessing
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from multiprocessing.synchronize import Event
from typing import Any

from lab.bench import Sample, judged, pinned, ratio
from lab.wire import WireError
from lab.wire.ping_pong import measure as measure_frames
from speculative.assisted import Assisted
from speculative.drafter import make_request
from speculative.drafting import TargetLost
from speculative.joining import join
from speculative.plots import draw_timelines
from speculative.remote_target import RemoteTarget
from speculative.rig import DRAFTER_CORE, Case, Reading, Rig, text_bytes
from speculative.settings import DraftSource, Mode, SpeculativeSettings
from speculative.tally import Tally
from speculative.theory import (
    predicted_async_tokens_per_second,
    simulated_optimum,
    sync_round_seconds,
    sync_tokens_per_second,
)
from speculative.timeline import watch

Row = dict[str, Any]
Readings = dict[Case, list[Reading]]

ASYNC = Mode["async"]
LEAST_SPEEDUP = {0.0: 2.2, 0.02: 2.1, 0.05: 1.7, 0.1: 1.4}
"""By round trip, at acceptance 0.8 and the default times of the synthetic engines."""
DEFAULT_TIMES = (0.040, 0.0008, 0.004, 0.8)
LEAST_OVER_OPTIMUM = 0.90
LEAST_OVER_FIXED = 0.95
LEAST_OVER_SYNC = 0.97
LEAST_OVER_ALONE = 0.97
LEAST_OVER_FORMULA = 0.95
MOST_BYTES = 160.0
MOST_ADDED = 60e-6
MOST_MEDIAN, MOST_P99 = 1.05, 1.25
FLOOD_FRAMES_PER_SECOND = 5000.0
FLOOD_START_SECONDS = 60.0
"""For the process of the hostile client to be there."""
DRAFTED_TOKENS = 40
"""After so many a drafter is killed."""
DEAD_SECONDS = 4.0
"""How long a killed drafter stays away."""


def measure(rig: Rig, cases: Sequence[Case], repeats: int, after_each: Callable[[], None] | None = None) -> Readings:
    """All cases in turn, then again with another seed: the same text for all cases of a turn."""
    readings: Readings = {case: [] for case in cases}
    for turn in range(repeats):
        for case in cases:
            readings[case].append(rig.speak(replace(case, seed=turn)))
        if after_each is not None:
            after_each()
    return readings


# Synthetic engines


def loops(rig: Rig) -> list[Row]:
    """The target alone, the synchronous loop and the asynchronous one, at every delay."""
    bench = rig.settings.project.bench
    cases = []
    for rtt in bench.rtt_seconds:
        cases.append(_alone(rig, rtt))
        cases += [_synthetic(rig, Mode.sync, rtt, length) for length in bench.draft_lengths]
        cases.append(_synthetic(rig, ASYNC, rtt, "auto"))
    readings = measure(rig, cases, bench.repeats)
    return [_loop_row(rig, case, readings) for case in cases]


def lengths(rig: Rig) -> list[Row]:
    """The automatic draft length beside fixed ones."""
    bench = rig.settings.project.bench
    rows = []
    for rtt in bench.rtt_seconds:
        automatic = _synthetic(rig, ASYNC, rtt, "auto")
        fixed = [_synthetic(rig, ASYNC, rtt, length) for length in bench.fixed_lengths]
        readings = measure(rig, [_alone(rig, rtt), automatic, *fixed], bench.repeats)
        rows += [_loop_row(rig, case, readings, part="lengths") for case in fixed]
        best = max(fixed, key=lambda case: _median_speed(readings[case]))
        row = _loop_row(rig, automatic, readings, part="lengths") | {
            "best_fixed": best.draft_length,
            "over_best_fixed": _ratio(readings[automatic], readings[best]),
        }
        over = row["over_best_fixed"].median
        rows.append(judged(_name(row), row, f"over_best_fixed at least {LEAST_OVER_FIXED}", over >= LEAST_OVER_FIXED))
    return rows


def near(rig: Rig) -> list[Row]:
    """No delay and low acceptance, where the synchronous loop is at its best."""
    bench = rig.settings.project.bench
    rtt = min(bench.rtt_seconds)
    rows = []
    for acceptance in bench.low_acceptances:
        speeds = rig.speeds(rtt)
        best = max(range(1, 17), key=lambda k: sync_tokens_per_second(acceptance, k, speeds))
        synchronous, asynchronous = (
            replace(_synthetic(rig, mode, rtt, length), acceptance=acceptance)
            for mode, length in ((Mode.sync, best), (ASYNC, "auto"))
        )
        readings = measure(rig, [_alone(rig, rtt), synchronous, asynchronous], bench.repeats)
        rows.append(_loop_row(rig, synchronous, readings, part="near"))
        row = _loop_row(rig, asynchronous, readings, part="near")
        row["over_sync"] = _ratio(readings[asynchronous], readings[synchronous])
        over = row["over_sync"].median
        rows.append(judged(_name(row), row, f"over_sync at least {LEAST_OVER_SYNC}", over >= LEAST_OVER_SYNC))
    return rows


def useless(rig: Rig) -> list[Row]:
    """Drafters that are never right, and such that were killed."""
    bench = rig.settings.project.bench
    rows = []
    for rtt in [min(bench.rtt_seconds), *bench.far_rtt_seconds]:
        alone = _alone(rig, rtt)
        random = replace(alone, mode=ASYNC, source=DraftSource.random, new_tokens=2 * bench.alone_tokens)
        readings = measure(rig, [alone, random], bench.repeats)
        dead = [_speed_while_dead(rig, replace(_synthetic(rig, ASYNC, rtt, "auto"), new_tokens=1000))]
        row = _loop_row(rig, random, readings, part="useless")
        rows.append(
            judged(_name(row), row, f"speedup at least {LEAST_OVER_ALONE}", row["speedup"].median >= LEAST_OVER_ALONE)
        )
        row = _row(rig, "useless", random) | {
            "drafter": "killed",
            "draft_length": "auto",
            "tokens_per_second": Sample.of(dead),
            "speedup": Sample.of([speed / _median_speed(readings[alone]) for speed in dead]),
            "predicted_speedup": 1.0,
            "n": len(dead),
        }
        rows.append(
            judged(_name(row), row, f"speedup at least {LEAST_OVER_ALONE}", row["speedup"].median >= LEAST_OVER_ALONE)
        )
    return rows


def frame(rig: Rig) -> list[Row]:
    """One frame there and back, over as many raw bytes."""
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
    """Who was busy when, in a short text of either loop; a picture, and how much of the time."""
    bench = rig.settings.project.bench
    rtt = bench.busy_rtt_seconds
    rows, timelines = [], {}
    for mode, length in ((Mode.sync, bench.draft_lengths[-1]), (ASYNC, "auto")):
        case = replace(_synthetic(rig, mode, rtt, length), new_tokens=bench.alone_tokens)
        timeline = timelines[mode.name] = watch(rig, case)
        end = timeline.verdicts[-1][0]
        rows.append(
            _row(rig, "busy", case)
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


def neighbours(rig: Rig) -> list[Row]:
    """Three clients beside a fourth that is like them, that is stalled, and that floods the verifier with frames."""
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
            row = judged(
                f"fourth client {name}",
                row,
                f"median_over_calm at most {MOST_MEDIAN}, p99_over_calm at most {MOST_P99}",
                ok,
            )
        rows.append(row)
    return rows


# A real target


def texts(rig: Rig) -> list[Row]:
    """Every text at every delay, with the drafts of `project.draft`; transformers' own speculation beside them."""
    bench = rig.settings.project.bench
    source = rig.settings.project.draft.source
    rows = []
    colocated = Assisted(rig.settings, rig.tokenizer)
    for text in bench.chosen_texts:
        cases = []
        for rtt in bench.rtt_seconds:
            alone = Case(mode=Mode.target_only, rtt_seconds=rtt, prompt=text.prompt, new_tokens=bench.text_tokens)
            cases += [alone, replace(alone, mode=Mode.sync, source=source, draft_length=bench.draft_lengths[0])]
            cases.append(replace(alone, mode=ASYNC, source=source, draft_length="auto"))
        assisted: list[float] = []
        readings = measure(rig, cases, bench.repeats, lambda: assisted.append(colocated.speed(text.prompt)))  # noqa: B023
        near = readings[cases[0]]
        rows.append(
            _row(rig, "texts", cases[1])
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
            row = _real_row(rig, case, readings) | {"text": text.name}
            if case.mode is ASYNC:
                least = 1.5 if text.repeats and case.rtt_seconds <= 0.02 else LEAST_OVER_ALONE
                row = judged(_name(row), row, f"speedup at least {least}", row["speedup"].median >= least)
            rows.append(row)
    return rows


def sources(rig: Rig) -> list[Row]:
    """Who guesses best: prompt lookup, and the first layers of the target, on every text without a delay."""
    bench = rig.settings.project.bench
    rtt = min(bench.rtt_seconds)
    rows = []
    for text in bench.chosen_texts:
        alone = Case(mode=Mode.target_only, rtt_seconds=rtt, prompt=text.prompt, new_tokens=bench.text_tokens)
        cases = [alone, replace(alone, mode=ASYNC, source=DraftSource.ngram)]
        cases += [replace(alone, mode=ASYNC, source=DraftSource.layers, layers=layers) for layers in bench.layers]
        readings = measure(rig, cases, 1)
        rows += [_real_row(rig, case, readings, part="sources") | {"text": text.name} for case in cases[1:]]
    return rows


def crowd(rig: Rig) -> list[Row]:
    """Many prompt-lookup drafters on one verifier, in one process, beside one of them."""
    bench = rig.settings.project.bench
    rtt = min(bench.rtt_seconds)
    prompt = bench.chosen_texts[0].prompt
    case = Case(mode=ASYNC, rtt_seconds=rtt, source=DraftSource.ngram, prompt=prompt, new_tokens=bench.crowd_tokens)
    speeds: dict[int, list[float]] = {1: [], bench.crowd: []}
    for _ in range(bench.repeats):
        for count, own in speeds.items():
            own.append(_together(rig, [case] * count))
    rows = []
    for count, own in speeds.items():
        row = _row(rig, "crowd", case) | {
            "drafters": count,
            "tokens_per_second": Sample.of(own),
            "over_one": ratio(own, speeds[1]),
            "n": len(own),
        }
        rows.append(
            judged(_name(row), row, "over_one at least 2.5", row["over_one"].median >= 2.5) if count > 1 else row
        )
    return rows


# Cases and rows


def _alone(rig: Rig, rtt_seconds: float) -> Case:
    return Case(mode=Mode.target_only, rtt_seconds=rtt_seconds, new_tokens=rig.settings.project.bench.alone_tokens)


def _synthetic(rig: Rig, mode: Mode, rtt_seconds: float, length: int | str) -> Case:
    project = rig.settings.project
    # A text of the synchronous loop is stationary, too, and slower.
    tokens = project.bench.new_tokens if mode is ASYNC else project.bench.new_tokens // 3
    return Case(
        mode=mode,
        rtt_seconds=rtt_seconds,
        source=DraftSource.synthetic,
        draft_length=length,
        acceptance=project.synthetic.agreement,
        new_tokens=max(1, tokens),
    )


def _row(rig: Rig, part: str, case: Case) -> Row:
    """What every row has; figures that are not there are None."""
    return {
        "part": part,
        "mode": case.mode.name,
        "drafter": case.source,
        "rtt_seconds": case.rtt_seconds,
        "alpha": None,
        "draft_length": case.draft_length if case.mode is not Mode.target_only else 0,
        "tokens_per_second": None,
        "speedup": None,
        "predicted_speedup": None,
        "n": 0,
    }


def _name(row: Row) -> str:
    delay = f"{1000 * row['rtt_seconds']:g} ms"
    words = (row["part"], row.get("text"), row["mode"], row["drafter"], row["draft_length"], delay)
    return ", ".join(str(word) for word in words if word is not None)


def _loop_row(rig: Rig, case: Case, readings: Readings, part: str = "loops") -> Row:
    """A case of the synthetic engines beside the target alone at the same delay, and beside its formula."""
    own, alone = readings[case], readings[_alone(rig, case.rtt_seconds)]
    row = _row(rig, part, case) | _measured(own, alone)
    if case.mode is Mode.target_only:
        return row
    speeds, alpha = rig.speeds(case.rtt_seconds), row["alpha"] or 0.0
    row |= _bytes(own)
    if case.mode is Mode.sync:
        assert isinstance(case.draft_length, int)
        predicted = sync_tokens_per_second(alpha, case.draft_length, speeds)
        row["formula_over_measured"] = Sample.of([_sync_seconds(rig, case, r) / _seconds(r) for r in own])
        row["predicted_speedup"] = predicted * speeds.step_seconds
        accepted = sum(reading.figures["drafts_accepted"] for reading in own)
        row["bytes_per_accepted_guess"] = (
            sum(text_bytes(1, r.tally.rounds) for r in own) / accepted if accepted else None
        )
        over = row["formula_over_measured"].median
        return judged(
            _name(row), row, f"formula_over_measured at least {LEAST_OVER_FORMULA}", over >= LEAST_OVER_FORMULA
        )
    longest = rig.settings.project.max_draft_length
    fixed = case.draft_length if isinstance(case.draft_length, int) else None
    predicted = predicted_async_tokens_per_second(
        alpha, speeds, longest=longest, draft_length=fixed, new_tokens=case.new_tokens
    )
    row["predicted_speedup"] = predicted * speeds.step_seconds
    if part == "loops":
        row = _beside_optimum(rig, case, own, row)
    return row


def _beside_optimum(rig: Rig, case: Case, own: Sequence[Reading], row: Row) -> Row:
    project, speeds = rig.settings.project, rig.speeds(case.rtt_seconds)
    optima = [
        simulated_optimum(
            reading.guess(), row["alpha"], speeds, longest=project.max_draft_length, new_tokens=case.new_tokens
        )
        for reading in own
    ]
    row["over_optimum"] = Sample.of([r.tokens_per_second / best.tokens_per_second for r, best in zip(own, optima)])
    row["alpha_by_position"] = own[0].figures["alpha_by_position"]
    synthetic = project.synthetic
    times = (synthetic.step_seconds, synthetic.row_seconds, synthetic.draft_step_seconds, synthetic.agreement)
    least = LEAST_SPEEDUP.get(case.rtt_seconds, 0.0) if times == DEFAULT_TIMES else 0.0
    target = f"speedup at least {least}, over_optimum at least {LEAST_OVER_OPTIMUM}"
    ok = row["speedup"].median >= least and row["over_optimum"].median >= LEAST_OVER_OPTIMUM
    if case.rtt_seconds == 0.05:
        target += f", bytes_per_accepted_token at most {MOST_BYTES:g}"
        ok = ok and row["bytes_per_accepted_token"] <= MOST_BYTES
    return judged(_name(row), row, target, ok)


def _real_row(rig: Rig, case: Case, readings: Readings, part: str = "texts") -> Row:
    own = readings[case]
    alone = next(readings[c] for c in readings if c.mode is Mode.target_only and c.rtt_seconds == case.rtt_seconds)
    row = _row(rig, part, case) | _measured(own, alone)
    if case.source is DraftSource.layers:
        row["layers"] = case.layers
    return row if case.mode is Mode.target_only else row | _bytes(own)


def _measured(own: Sequence[Reading], alone: Sequence[Reading]) -> Row:
    figures = [reading.figures for reading in own]
    checked = sum(figure["drafts_checked"] for figure in figures)
    wrong = sum(figure["epochs"] for figure in figures)
    right = sum(done.right for reading in own for done in reading.tally.rounds)
    return {
        "alpha": right / checked if checked else None,
        "epochs": wrong,
        "tokens_per_second": Sample.of([reading.tokens_per_second for reading in own]),
        "speedup": _ratio(own, alone),
        "new_tokens": [figure["new_tokens"] for figure in figures],
        "n": len(own),
    }


def _bytes(own: Sequence[Reading]) -> Row:
    """Both directions with headers; accepted are the guesses that took no pass of their own."""
    total = sum(reading.frame_bytes for reading in own)
    accepted = sum(reading.figures["drafts_accepted"] for reading in own)
    tokens = sum(reading.figures["new_tokens"] for reading in own)
    return {
        "bytes_per_accepted_token": total / accepted if accepted else None,
        "bytes_per_new_token": total / tokens,
    }


def _ratio(own: Sequence[Reading], other: Sequence[Reading]) -> Sample:
    return ratio([r.tokens_per_second for r in own], [r.tokens_per_second for r in other])


def _median_speed(readings: Sequence[Reading]) -> float:
    return statistics.median(reading.tokens_per_second for reading in readings)


def _seconds(reading: Reading) -> float:
    return float(reading.figures["generation_seconds"])


def _sync_seconds(rig: Rig, case: Case, reading: Reading) -> float:
    """What the very rounds of a synchronous text should take."""
    speeds = rig.speeds(case.rtt_seconds)
    return sum(sync_round_seconds(len(done.guesses), speeds) for done in reading.tally.rounds)


# Clients beside each other


def _speed_while_dead(rig: Rig, case: Case) -> float:
    """Tokens per second of a text whose drafter is gone: its connection ends without a word, and one that takes the
    text up again comes after `DEAD_SECONDS`."""
    with rig.join(case.rtt_seconds) as target:
        tokens, died_at = 0, 0.0
        for done in rig.rounds(case, target):
            tokens += len(done.tokens)
            if target.resumes:
                return tokens / (time.perf_counter() - died_at)
            if not died_at and tokens > DRAFTED_TOKENS:
                target.connection.close()
                tokens, died_at = 0, time.perf_counter()
                time.sleep(DEAD_SECONDS)
    raise RuntimeError("the text was over before its drafter came back")


def _token_seconds_beside(rig: Rig, fourth: Callable[[Rig], Any]) -> list[float]:
    """Seconds per token of three clients while a fourth does what it does."""
    with fourth(rig):
        tallies = _speak_together(rig, [_neighbour(rig)] * 3)
    return [seconds for tally in tallies for seconds in _token_seconds(tally)]


def _neighbour(rig: Rig) -> Case:
    bench = rig.settings.project.bench
    return replace(_synthetic(rig, ASYNC, min(bench.rtt_seconds), "auto"), new_tokens=bench.neighbour_tokens)


def _token_seconds(tally: Tally) -> list[float]:
    """The n tokens of a round took 1/n of the time since the round before, each; without the first, the prompt's."""
    rows = list(tally.rows())[1:]
    return [row["round_seconds"] / row["round_tokens"] for row in rows for _ in range(row["round_tokens"])]


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[int(0.99 * (len(values) - 1))]


def _together(rig: Rig, cases: Sequence[Case]) -> float:
    """Tokens per second of several texts at once, all of them together."""
    began = time.perf_counter()
    tallies = _speak_together(rig, cases)
    return sum(len(tally.token_ids) for tally in tallies) / (time.perf_counter() - began)


def _speak_together(rig: Rig, cases: Sequence[Case]) -> list[Tally]:
    """Several texts at once, each over a connection and in a thread of its own."""
    with ExitStack() as stack:
        targets = [stack.enter_context(rig.join(case.rtt_seconds)) for case in cases]
        with ThreadPoolExecutor(len(cases)) as pool:
            return list(pool.map(lambda pair: _speak(rig, *pair), zip(cases, targets)))


def _speak(rig: Rig, case: Case, target: RemoteTarget) -> Tally:
    tally = Tally()
    for done in rig.rounds(case, target):
        tally.add(done)
    return tally


@contextmanager
def _calm(rig: Rig) -> Iterator[None]:
    """A fourth client like the others."""
    case = replace(_neighbour(rig), seed=1)
    with rig.join(case.rtt_seconds) as target, ThreadPoolExecutor(1) as pool:
        pool.submit(_speak, rig, case, target)
        yield


@contextmanager
def _stalled(rig: Rig) -> Iterator[None]:
    """A drafter whose process is stopped in the middle of its text: it reads nothing and says nothing."""
    tokens = rig.settings.project.context // 2
    words = [f"network.port={rig.port}", "prompt=x", f"project.max_new_tokens={tokens}", *rig.drafter_words]
    process = subprocess.Popen(
        [sys.executable, "-m", "speculative.drafter", f"hydra.run.dir={rig.folder}/stalled", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
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
    """A client in a process of its own that sends frames as fast as `FLOOD_FRAMES_PER_SECOND`."""
    context = multiprocessing.get_context("spawn")
    is_there = context.Event()
    process = context.Process(target=flood, args=(rig.settings, rig.texts, rig.port, is_there))
    with pinned(DRAFTER_CORE):
        process.start()
    try:
        if not is_there.wait(FLOOD_START_SECONDS):
            raise RuntimeError(f"the hostile client was not there within {FLOOD_START_SECONDS:g} s")
        yield
    finally:
        process.kill()
        process.join()


def flood(settings: SpeculativeSettings, texts: Sequence[str], port: int, is_there: Event) -> None:
    """Open a text and send wrong guesses for its first place, again and again; join again when thrown out."""
    settings = replace(settings, network=replace(settings.network, host="127.0.0.1", port=port))
    frames_at_once = 50
    while True:
        with suppress(WireError, TargetLost), join(settings, texts) as target:
            request = make_request(settings, [0])
            target.open(replace(request, mode=ASYNC, max_new_tokens=settings.project.context // 2))
            is_there.set()
            while True:
                for _ in range(frames_at_once):
                    target.draft(0, 1, [1] * target.longest_draft)
                time.sleep(frames_at_once / FLOOD_FRAMES_PER_SECOND)
        time.sleep(0.1)
