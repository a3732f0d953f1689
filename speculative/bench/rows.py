"""Cases of the benchmark and their rows: measured figures, compared with the target alone and the formulas."""

import statistics
from collections.abc import Sequence

from lab.bench import Row, Sample, judged, ratio
from speculative.bench.rig import Case, Reading, Rig, text_bytes
from speculative.drafter.tally import Tally
from speculative.settings import DraftSource, Mode
from speculative.theory import (
    predicted_async_tokens_per_second,
    simulated_optimum,
    sync_round_seconds,
    sync_tokens_per_second,
)

Readings = dict[Case, list[Reading]]

ASYNC = Mode["async"]
LEAST_SPEEDUP = {0.0: 2.2, 0.02: 2.1, 0.05: 1.7, 0.1: 1.4}
"""Least speed-up by round trip, at acceptance 0.8 and the default times of the synthetic engines."""
DEFAULT_TIMES = (0.040, 0.0008, 0.004, 0.8)
LEAST_OVER_OPTIMUM = 0.90
LEAST_OVER_FORMULA = 0.95
MOST_BYTES = 160.0


def alone_case(rig: Rig, rtt_seconds: float) -> Case:
    """The synthetic target alone."""
    return Case(mode=Mode.target_only, rtt_seconds=rtt_seconds, new_tokens=rig.settings.project.bench.alone_tokens)


def synthetic_case(rig: Rig, mode: Mode, rtt_seconds: float, length: int | str) -> Case:
    """A text of the synthetic engines."""
    project = rig.settings.project
    # A text of the synchronous loop is stationary, too, and takes longer.
    tokens = project.bench.new_tokens if mode is ASYNC else project.bench.new_tokens // 3
    return Case(
        mode=mode,
        rtt_seconds=rtt_seconds,
        source=DraftSource.synthetic,
        draft_length=length,
        acceptance=project.synthetic.agreement,
        new_tokens=max(1, tokens),
    )


def plain_row(rig: Rig, part: str, case: Case) -> Row:
    """The columns of every row; missing figures are None."""
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


def row_name(row: Row) -> str:
    """Name of a row, for messages."""
    delay = f"{1000 * row['rtt_seconds']:g} ms"
    words = (row["part"], row.get("text"), row["mode"], row["drafter"], row["draft_length"], delay)
    return ", ".join(str(word) for word in words if word is not None)


def at_least(least: float, figure: str, row: Row) -> Row:
    """The row, judged by the median of one of its figures."""
    return judged(row_name(row), row, f"{figure} at least {least}", row[figure].median >= least)


def loop_row(rig: Rig, case: Case, readings: Readings, part: str = "loops") -> Row:
    """A case of the synthetic engines, compared with the target alone at the same delay, and with its formula."""
    own, alone = readings[case], readings[alone_case(rig, case.rtt_seconds)]
    row = plain_row(rig, part, case) | _measured(own, alone)
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
        return at_least(LEAST_OVER_FORMULA, "formula_over_measured", row)
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
            reading.is_right(), row["alpha"], speeds, longest=project.max_draft_length, new_tokens=case.new_tokens
        )
        for reading in own
    ]
    row["over_optimum"] = Sample.of([r.tokens_per_second / best.tokens_per_second for r, best in zip(own, optima)])
    together = Tally(rounds=[done for reading in own for done in reading.tally.rounds])
    row["alpha_by_position"] = together.figures()["alpha_by_position"]
    synthetic = project.synthetic
    times = (synthetic.step_seconds, synthetic.row_seconds, synthetic.draft_step_seconds, synthetic.agreement)
    least = LEAST_SPEEDUP.get(case.rtt_seconds, 0.0) if times == DEFAULT_TIMES else 0.0
    target = f"speedup at least {least}, over_optimum at least {LEAST_OVER_OPTIMUM}"
    ok = row["speedup"].median >= least and row["over_optimum"].median >= LEAST_OVER_OPTIMUM
    if case.rtt_seconds == 0.05:
        target += f", bytes_per_accepted_token at most {MOST_BYTES:g}"
        ok = ok and row["bytes_per_accepted_token"] <= MOST_BYTES
    return judged(row_name(row), row, target, ok)


def real_row(rig: Rig, case: Case, readings: Readings, part: str = "texts") -> Row:
    """A case of a real target, compared with the target alone at the same delay."""
    own = readings[case]
    alone = next(readings[c] for c in readings if c.mode is Mode.target_only and c.rtt_seconds == case.rtt_seconds)
    row = plain_row(rig, part, case) | _measured(own, alone)
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
        "speedup": speed_ratio(own, alone),
        "new_tokens": [figure["new_tokens"] for figure in figures],
        "n": len(own),
    }


def _bytes(own: Sequence[Reading]) -> Row:
    """Bytes in both directions, headers included; accepted draft tokens are those that arrived in time."""
    total = sum(reading.frame_bytes for reading in own)
    accepted = sum(reading.figures["drafts_accepted"] for reading in own)
    tokens = sum(reading.figures["new_tokens"] for reading in own)
    return {
        "bytes_per_accepted_token": total / accepted if accepted else None,
        "bytes_per_new_token": total / tokens,
    }


def speed_ratio(own: Sequence[Reading], other: Sequence[Reading]) -> Sample:
    """Speeds relative to those of the same turns."""
    return ratio([r.tokens_per_second for r in own], [r.tokens_per_second for r in other])


def median_speed(readings: Sequence[Reading]) -> float:
    """Tokens per second."""
    return statistics.median(reading.tokens_per_second for reading in readings)


def _seconds(reading: Reading) -> float:
    return float(reading.figures["generation_seconds"])


def _sync_seconds(rig: Rig, case: Case, reading: Reading) -> float:
    """Seconds that the rounds of a synchronous text should take by the formula."""
    speeds = rig.speeds(case.rtt_seconds)
    return sum(sync_round_seconds(len(done.draft_ids), speeds) for done in reading.tally.rounds)
