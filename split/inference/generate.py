"""One text through a `ShardedModel`, shown as it comes, with its figures."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lab.command import entry
from lab.command.terminal import TextStream
from lab.engine.base import Session, check_words
from lab.engine.sampling import Sampling
from lab.models.sources import end_ids_of, load_tokenizer_only
from lab.settings import UserError
from lab.text.asking import asked_sampling, decoder, most_new_tokens
from lab.text.prompts import asked_ids
from lab.text.running_text import said
from lab.tracking import Tracker, picture
from split.inference.messages import Report
from split.inference.picture import draw
from split.inference.sharded_model import ShardedModel
from split.inference.times import PassParts, as_row, take_apart
from split.settings import SplitSettings
from split.transport.base import ShardReport


@dataclass
class Text:
    """What was generated, and when."""

    ids: list[int] = field(default_factory=list)
    token_seconds: list[float] = field(default_factory=list)
    """Between two tokens; without the first, which is the prompt's."""
    first_token_seconds: float = 0.0
    first_pass: int = 0
    """Number of passes before the first single token."""


def generate(settings: SplitSettings, engine: ShardedModel, tracker: Tracker, place: entry.Run) -> dict[str, Any]:
    """The text that the settings ask for.

    Raises:
        UserError: a prompt without tokens, with one that the model has no row for, or one beyond the context.
        Fault: shards that failed or were lost, NaN or infinity; `place.so_far` has the text so far.
    """
    project = settings.project
    tokenizer = load_tokenizer_only(settings.model)
    prompt = asked_ids(tokenizer, settings.prompt, project)
    if not prompt:
        raise UserError(f"prompt must have at least one token, got {settings.prompt!r}")
    most = most_new_tokens(project, len(prompt), engine.context)
    if len(prompt) + most > engine.context:
        raise UserError(
            f"project.max_new_tokens must leave room in the context of {engine.context} tokens for a prompt of "
            f"{len(prompt)}, got {most}"
        )
    wrong = next((token for token in prompt if token >= engine.vocabulary_size), None)
    if wrong is not None:
        raise UserError(
            f"prompt must hold tokens that the model has rows for, ids below {engine.vocabulary_size}, "
            f"got {tokenizer.convert_ids_to_tokens(wrong)!r} (id {wrong})"
        )
    sampling = asked_sampling(project, settings.seed, tokenizer, len(prompt))
    _check_words(engine, sampling)
    ends = end_ids_of(settings.model)
    stream = TextStream(decoder(tokenizer, ends), sys.stdout, project.stops)
    text = Text()
    place.so_far = lambda: _said(settings, tokenizer, text, ends)
    write(engine, prompt, sampling, most, ends, stream, text, tracker)
    reports = engine.reports()
    apart = take_apart(list(engine.passes), reports)
    for index, parts in enumerate(apart, start=len(text.ids)):
        tracker.log(index, **as_row(parts, [f"shard{place + 1}" for place in range(len(reports))]))
    figures = _figures(settings, tokenizer, text, engine, reports, apart)
    _print_table(figures["shards"])
    figures["plots"] = picture(lambda: draw(reports, _single(apart), place.folder / "split.png", settings.model.name))
    return figures


def write(
    engine: ShardedModel,
    prompt: Sequence[int],
    sampling: Sampling,
    max_new_tokens: int,
    ends: Sequence[int],
    stream: TextStream,
    text: Text,
    tracker: Tracker,
) -> None:
    """Generate one text, token by token; `text` and `tracker` have each of them as soon as it is there."""
    began = time.monotonic()
    try:
        with engine.open(prompt, sampling, len(prompt) + max_new_tokens) as session:
            _take(text, session, stream)
            text.first_token_seconds = time.monotonic() - began
            while len(text.ids) < max_new_tokens and text.ids[-1] not in ends and not stream.text.stopped:
                before = time.monotonic()
                engine.extend([(session, text.ids[-1:])], "last")
                text.token_seconds.append(time.monotonic() - before)
                tracker.log(len(text.ids), token_seconds=text.token_seconds[-1])
                _take(text, session, stream)
    finally:
        if text.ids:
            stream.finish()


def _take(text: Text, session: Session, stream: TextStream) -> None:
    assert session.step is not None
    text.ids.append(session.step.next_ids[-1])
    stream.add(text.ids[-1:])


def _check_words(engine: ShardedModel, sampling: Sampling) -> None:
    try:
        check_words(engine, sampling)
    except ValueError as error:
        raise UserError(f"project.{error}") from None


def _single(apart: Sequence[PassParts]) -> list[PassParts]:
    return [parts for parts in apart if parts.rows == 1] or list(apart)


def _figures(
    settings: SplitSettings,
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    engine: ShardedModel,
    reports: Sequence[ShardReport[Report]],
    apart: Sequence[PassParts],
) -> dict[str, Any]:
    seconds = sum(text.token_seconds)
    single = {parts.number for parts in _single(apart)}
    handed_on = [statistics.median(report.hops[number].sent_bytes for number in single) for report in reports]
    return {
        **_said(settings, tokenizer, text, end_ids_of(settings.model)),
        "tokens_per_second": len(text.token_seconds) / seconds if seconds else None,
        "token_seconds_p50": statistics.median(text.token_seconds) if text.token_seconds else None,
        "time_to_first_token_seconds": text.first_token_seconds,
        "transport": settings.project.transport.name,
        "boundary": settings.project.boundary.name,
        "boundary_bytes_per_token": max(handed_on[:-1], default=0),
        "return_bytes_per_token": handed_on[-1],
        "shards": [_shard(report, place, _single(apart)) for place, report in enumerate(reports)],
        "recoveries": len(engine.recoveries),
        "recovery_start_seconds": [recovery.start_seconds for recovery in engine.recoveries],
        "recovery_prefill_seconds": [recovery.prefill_seconds for recovery in engine.recoveries],
    }


def _said(
    settings: SplitSettings, tokenizer: PreTrainedTokenizerBase, text: Text, ends: Sequence[int]
) -> dict[str, Any]:
    found = said(decoder(tokenizer, ends), text.ids, settings.project.stops)
    by_end = "end_token" if text.ids and text.ids[-1] in ends else "length"
    return {
        "text": found.text,
        "token_ids": found.ids,
        "ended_by": "stop" if found.stopped else by_end,
        "seed": settings.seed,
    }


def _shard(report: ShardReport[Report], place: int, single: Sequence[PassParts]) -> dict[str, Any]:
    hops = [parts.hops[place] for parts in single]
    sizes = msgspec.structs.asdict(report.figures)
    del sizes["clock_seconds"]
    return {
        "name": sizes.pop("name"),
        "layers": f"{report.layers.start}:{report.layers.stop}",
        **sizes,
        **{
            f"{part}_seconds_p50": statistics.median(getattr(hop, part) for hop in hops)
            for part in ("compute", "serialise", "wire", "queue", "wait")
        },
    }


def _print_table(shards: Sequence[dict[str, Any]]) -> None:
    table = Table("shard", "layers", "device", "weights MiB", "KV MiB", "RSS MiB", "compute ms", "queue ms", "wire ms")
    for shard in shards:
        sizes = [f"{shard[key] / 2**20:.1f}" for key in ("weights_bytes", "kv_bytes", "rss_bytes")]
        times = [f"{1000 * shard[f'{part}_seconds_p50']:.2f}" for part in ("compute", "queue", "wire")]
        table.add_row(shard["name"], shard["layers"], shard["device"], *sizes, *times)
    Console(stderr=True, width=None if sys.stderr.isatty() else 120).print(table)
