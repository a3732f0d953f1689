"""What the synchronous loop costs over a real link, beside its formula and beside the target alone.

    python -m speculative.bench

Verifier and link are processes of their own, the drafter is this one; the engines are synthetic (settable step times
and acceptance), so that a figure shows the loop and not the models. Runs are interleaved: every mode, draft length and
delay in turn, then again. Per row: median of `project.bench.repeats` runs with the smallest and largest.

`formula_over_measured` is the time that the formula of `speculative.theory` gives for the very rounds of a run, over
the time they took: 1 is a loop that costs nothing, 0.95 one that adds 5 %. `formula_over_median_round` compares the
median full round instead: on a machine that does other things, too, single rounds are held up and the median is not.
Bytes are frames of the text, headers included; heartbeats are left out.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lab import entry
from lab.bench import Sample, interleaved, judged, listening, ratio, write_report
from lab.device import open_device
from lab.entry import compose_settings
from lab.models import load_tokenizer_only
from lab.tracking import Tracker
from lab.wire import encode, pack_tokens
from lab.wire.ping_pong import measure
from speculative.drafter import make_request, prompt_ids
from speculative.drafting import Round, speculate
from speculative.drafts import Drafts, NoDrafts
from speculative.engines import open_drafts
from speculative.joining import join
from speculative.messages import TABLE, Draft, MessageType, Verdict
from speculative.remote_target import RemoteTarget
from speculative.settings import DraftSource, Mode, SpeculativeSettings
from speculative.tally import Tally
from speculative.theory import Speeds, sync_round_seconds, sync_tokens_per_second
from speculative.vocabulary import token_texts

START_SECONDS = 120.0
WARM_UP_TOKENS = 5


@dataclass(frozen=True)
class Cell:
    """One combination that is measured."""

    mode: Mode
    rtt_seconds: float
    draft_length: int
    """0 where nobody drafts."""


@dataclass
class Readings:
    """All runs of one cell."""

    tokens_per_second: list[float] = field(default_factory=list)
    formula_over_measured: list[float] = field(default_factory=list)
    formula_over_median_round: list[float] = field(default_factory=list)
    tallies: list[Tally] = field(default_factory=list)


def run(settings: SpeculativeSettings, place: entry.Run) -> dict[str, Any]:
    """Measures every cell; the rows are the result."""
    settings = with_byte_tokenizer(settings)
    with Tracker(settings, "speculative-bench", place.folder) as tracker:
        rows = [*sync_rows(settings, place.folder), frame_row(settings)]
        for index, row in enumerate(rows):
            tracker.log(index, **row)
        document = write_report(place.folder / "bench.json", "speculative", rows)
        tracker.result({"rows": len(rows)})
    return {"benchmark": document["benchmark"], "rows": document["rows"]}


def with_byte_tokenizer(settings: SpeculativeSettings) -> SpeculativeSettings:
    """Synthetic engines have no model; the tokenizer that both sides show is the one made in code."""
    model = compose_settings("spec_decoding", "model=random", SpeculativeSettings).model
    return replace(settings, model=replace(model, cache_dir=settings.model.cache_dir))


def sync_rows(settings: SpeculativeSettings, folder: Path) -> list[dict[str, Any]]:
    """The synchronous loop and the target alone, at every delay and draft length."""
    bench = settings.project.bench
    cells = [Cell(Mode.target_only, rtt, 0) for rtt in bench.rtt_seconds]
    cells += [Cell(Mode.sync, rtt, length) for rtt in bench.rtt_seconds for length in bench.draft_lengths]
    readings = {cell: Readings() for cell in cells}
    with ExitStack() as stack:
        verifier = stack.enter_context(verifier_process(settings, folder))
        texts = token_texts(load_tokenizer_only(settings.model))
        targets = {
            rtt: stack.enter_context(_joined(settings, stack.enter_context(link_process(verifier, rtt, folder)), texts))
            for rtt in bench.rtt_seconds
        }
        cases: dict[str, Callable[[], float]] = {
            str(cell): lambda cell=cell: _measure(  # type: ignore[misc]  # bound now, called without it
                settings, targets[cell.rtt_seconds], cell, readings[cell]
            )
            for cell in cells
        }
        interleaved(cases, warmup=0, repeats=bench.repeats)
    return [_row(settings, cell, readings) for cell in cells]


def frame_row(settings: SpeculativeSettings) -> dict[str, Any]:
    """One frame there and back, over as many raw bytes."""
    rounds = settings.project.bench.frame_rounds
    pings = measure(body_bytes=32, rounds=rounds, warm_up_rounds=rounds // 10)
    row: dict[str, Any] = {
        "row": "frame",
        "frame_bytes": pings.frame_bytes,
        "raw_seconds": pings.raw_seconds,
        "frame_seconds": pings.frame_seconds,
        "added_seconds": pings.added_seconds,
        "n": pings.rounds,
    }
    return judged("frame", row, "added_seconds at most 60e-6", pings.added_seconds <= 60e-6)


def text_bytes(prompt_length: int, rounds: Sequence[Round]) -> int:
    """Bytes of every DRAFT and VERDICT of a text, headers included."""
    total, epoch, position = 0, 0, prompt_length
    for done in rounds:
        draft = Draft(epoch=epoch, position=position)
        total += len(encode(TABLE, MessageType.draft, 1, draft, pack_tokens(done.guesses)))
        epoch += done.accepted < len(done.guesses)
        verdict = Verdict(epoch=epoch, position=position, accepted=done.accepted, prefix=None)
        total += len(encode(TABLE, MessageType.verdict, 1, verdict, pack_tokens(done.ids)))
        position += len(done.tokens)
    return total


def _measure(settings: SpeculativeSettings, target: RemoteTarget, cell: Cell, readings: Readings) -> float:
    """One text of one cell; returns its seconds."""
    tally = _speak(settings, target, cell, settings.project.bench.new_tokens)
    seconds = float(tally.figures()["generation_seconds"])
    predicted = sum(_round_seconds(settings, cell, done) for done in tally.rounds)
    readings.tokens_per_second.append(len(tally.token_ids) / seconds)
    readings.formula_over_measured.append(predicted / seconds)
    full = [row["round_seconds"] for row in tally.rows() if row["round_guesses"] == cell.draft_length]
    typical = next(done for done in tally.rounds if len(done.guesses) == cell.draft_length)
    readings.formula_over_median_round.append(_round_seconds(settings, cell, typical) / statistics.median(full))
    readings.tallies.append(tally)
    return seconds


def _speak(settings: SpeculativeSettings, target: RemoteTarget, cell: Cell, new_tokens: int) -> Tally:
    settings = _of_cell(settings, cell, new_tokens)
    tokenizer = load_tokenizer_only(settings.model)
    request = make_request(settings, prompt_ids(tokenizer, "x", chat=False))  # one token: no pass of its own
    drafts: Drafts = NoDrafts()
    if cell.mode is Mode.sync:
        texts = token_texts(tokenizer)
        size = target.welcome.vocabulary_size
        drafts = open_drafts(settings, open_device(settings.device), request.sampling, texts, size)
    tally = Tally()
    for done in speculate(target, drafts, request, target.welcome.end_ids):
        tally.add(done)
    drafts.close()
    return tally


def _of_cell(settings: SpeculativeSettings, cell: Cell, new_tokens: int) -> SpeculativeSettings:
    project = replace(
        settings.project,
        mode=cell.mode,
        max_new_tokens=new_tokens,
        draft=replace(settings.project.draft, source=DraftSource.synthetic, length=str(max(1, cell.draft_length))),
    )
    return replace(settings, project=project)


def _round_seconds(settings: SpeculativeSettings, cell: Cell, done: Round) -> float:
    speeds = _speeds(settings, cell.rtt_seconds)
    return speeds.step_seconds if cell.mode is Mode.target_only else sync_round_seconds(len(done.guesses), speeds)


def _speeds(settings: SpeculativeSettings, rtt_seconds: float) -> Speeds:
    synthetic = settings.project.synthetic
    return Speeds(
        step_seconds=synthetic.step_seconds,
        row_seconds=synthetic.row_seconds,
        draft_step_seconds=synthetic.draft_step_seconds,
        rtt_seconds=rtt_seconds,
    )


def _row(settings: SpeculativeSettings, cell: Cell, readings: dict[Cell, Readings]) -> dict[str, Any]:
    own, speeds = readings[cell], _speeds(settings, cell.rtt_seconds)
    alone = readings[Cell(Mode.target_only, cell.rtt_seconds, 0)]
    drafted = cell.mode is Mode.sync
    rounds = [done for tally in own.tallies for done in tally.rounds]
    accepted = sum(done.accepted for done in rounds)
    checked = sum(int(tally.figures()["drafts_checked"]) for tally in own.tallies)
    alpha = accepted / checked if checked else None
    sent = sum(text_bytes(1, tally.rounds) for tally in own.tallies)
    row: dict[str, Any] = {
        "row": "sync",
        "mode": cell.mode,
        "drafter": DraftSource.synthetic if drafted else DraftSource.none,
        "rtt_seconds": cell.rtt_seconds,
        "draft_length": cell.draft_length,
        "alpha": alpha,
        "tokens_per_second": Sample.of(own.tokens_per_second),
        "speedup": ratio(own.tokens_per_second, alone.tokens_per_second),
        "predicted_speedup": None
        if alpha is None
        else sync_tokens_per_second(alpha, cell.draft_length, speeds) * speeds.step_seconds,
        "formula_over_measured": Sample.of(own.formula_over_measured),
        "formula_over_median_round": Sample.of(own.formula_over_median_round),
        "bytes_per_accepted_guess": sent / accepted if accepted else None,
        "bytes_per_new_token": sent / sum(len(done.tokens) for done in rounds) if drafted else None,
        "n": len(own.tallies),
    }
    name = f"{cell.mode.name}, k = {cell.draft_length}, {1000 * cell.rtt_seconds:g} ms"
    return judged(name, row, "formula_over_measured at least 0.95", row["formula_over_measured"].median >= 0.95)


@contextmanager
def _joined(settings: SpeculativeSettings, port: int, texts: Sequence[str]) -> Iterator[RemoteTarget]:
    """A connection through a link, warm."""
    with join(replace(settings, network=replace(settings.network, host="127.0.0.1", port=port)), texts) as target:
        _speak(settings, target, Cell(Mode.sync, 0.0, 2), WARM_UP_TOKENS)
        yield target


def verifier_process(settings: SpeculativeSettings, folder: Path) -> Any:
    """A synthetic verifier with the step times of `settings`, as a context manager that gives its port."""
    synthetic = settings.project.synthetic
    words = [
        "model=random",
        f"model.cache_dir='{Path(settings.model.cache_dir).expanduser()}'",
        "tracking=none",
        "network.port=0",
        "project.engine=synthetic",
        f"project.context={settings.project.context}",
        f"project.max_draft_length={settings.project.max_draft_length}",
        f"project.synthetic.vocabulary_size={synthetic.vocabulary_size}",
        f"project.synthetic.step_seconds={synthetic.step_seconds}",
        f"project.synthetic.row_seconds={synthetic.row_seconds}",
    ]
    return listening("speculative.verifier", words, folder / "verifier", START_SECONDS)


def link_process(port: int, rtt_seconds: float, folder: Path) -> Any:
    """A link to `port` with this round-trip time, half each way, as a context manager that gives its own port."""
    delay = rtt_seconds / 2
    words = [
        "network.port=0",
        "tracking=none",
        f"project.target_port={port}",
        f"project.up.delay_seconds={delay}",
        f"project.down.delay_seconds={delay}",
    ]
    return listening("simulations.link", words, folder / f"link-{rtt_seconds:g}", START_SECONDS)


def main() -> None:
    """Composes `conf/spec_decoding.yaml` and measures."""
    entry.main("spec_decoding", SpeculativeSettings, run)


if __name__ == "__main__":
    main()
