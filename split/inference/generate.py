"""Generation of one text by a `ShardedModel`, shown token by token, with its figures."""

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
from lab.engine.base import Session, check_logit_rules
from lab.engine.sampling import Sampling
from lab.models.sources import end_ids_of, load_tokenizer_only
from lab.settings import UserError, user_errors
from lab.text.generation import check_rows, decoder, most_new_tokens, sampling_of
from lab.text.prompts import input_ids
from lab.text.running_text import final_text
from lab.tracking import Tracker, picture
from split.inference.messages import Report
from split.inference.picture import draw
from split.inference.sharded_model import ShardedModel
from split.inference.times import PassParts, as_row, take_apart
from split.settings import SplitSettings
from split.transport.base import ShardReport


@dataclass
class Generation:
    """A text generated so far, with its times."""

    settings: SplitSettings
    tokenizer: PreTrainedTokenizerBase
    ends: Sequence[int]
    """Ids that end the text."""
    ids: list[int] = field(default_factory=list)
    token_seconds: list[float] = field(default_factory=list)
    """Times between two tokens; without the first one, which includes the prompt."""
    first_token_seconds: float = 0.0

    def figures(self) -> dict[str, Any]:
        """The text and its ending."""
        found = final_text(decoder(self.tokenizer, self.ends), self.ids, self.settings.project.stops)
        return {
            "text": found.text,
            "token_ids": found.ids,
            "ended_by": found.ended_by(self.ends),
            "seed": self.settings.seed,
        }


def generate(settings: SplitSettings, engine: ShardedModel, tracker: Tracker, place: entry.Run) -> dict[str, Any]:
    """Generate the text that the settings ask for; return the figures of the last line.

    Raises:
        UserError: the prompt has no tokens, one that the model has no row for, or more than the context.
        Fault: shards failed or were lost, or gave NaN or infinity; `place.so_far` has the text so far.
    """
    project = settings.project
    tokenizer = load_tokenizer_only(settings.model)
    prompt = input_ids(tokenizer, settings.prompt, project)
    if not prompt:
        raise UserError(f"prompt must have at least one token, got {settings.prompt!r}")
    most = most_new_tokens(project, len(prompt), engine.context)
    if len(prompt) + most > engine.context:
        raise UserError(
            f"project.max_new_tokens must leave room in the context of {engine.context} tokens for a prompt of "
            f"{len(prompt)}, got {most}"
        )
    check_rows(prompt, engine.vocabulary_size, "model", tokenizer.convert_ids_to_tokens)
    sampling = sampling_of(project, settings.seed, tokenizer, len(prompt))
    with user_errors("project."):
        check_logit_rules(engine, sampling)
    generation = Generation(settings, tokenizer, end_ids_of(settings.model))
    place.so_far = generation.figures
    write(engine, generation, prompt, sampling, most, tracker)
    reports = engine.reports()
    apart = take_apart(list(engine.passes), reports)
    for index, parts in enumerate(apart, start=len(generation.ids)):
        tracker.log(index, **as_row(parts, [f"shard{place + 1}" for place in range(len(reports))]))
    figures = _figures(generation, engine, reports, apart)
    _print_table(figures["shards"])
    figures["plots"] = picture(lambda: draw(reports, _single(apart), place.folder / "split.png", settings.model.name))
    return figures


def write(
    engine: ShardedModel,
    generation: Generation,
    prompt: Sequence[int],
    sampling: Sampling,
    max_new_tokens: int,
    tracker: Tracker,
) -> None:
    """Generate token by token; `generation`, standard output and `tracker` get each of them at once."""
    ids, ends = generation.ids, generation.ends
    stream = TextStream(decoder(generation.tokenizer, ends), sys.stdout, generation.settings.project.stops)
    began = time.monotonic()
    try:
        with engine.open(prompt, sampling, len(prompt) + max_new_tokens) as session:
            _take(ids, session, stream)
            generation.first_token_seconds = time.monotonic() - began
            while len(ids) < max_new_tokens and ids[-1] not in ends and not stream.text.stopped:
                before = time.monotonic()
                engine.extend([(session, ids[-1:])], "last")
                generation.token_seconds.append(time.monotonic() - before)
                tracker.log(len(ids), token_seconds=generation.token_seconds[-1])
                _take(ids, session, stream)
    finally:
        if ids:
            stream.finish()


def _take(ids: list[int], session: Session, stream: TextStream) -> None:
    assert session.step is not None
    ids.append(session.step.next_ids[-1])
    stream.add(ids[-1:])


def _single(apart: Sequence[PassParts]) -> list[PassParts]:
    return [parts for parts in apart if parts.rows == 1] or list(apart)


def _figures(
    generation: Generation, engine: ShardedModel, reports: Sequence[ShardReport[Report]], apart: Sequence[PassParts]
) -> dict[str, Any]:
    project, token_seconds = generation.settings.project, generation.token_seconds
    single = {parts.number for parts in _single(apart)}
    handed_on = [statistics.median(report.hops[number].sent_bytes for number in single) for report in reports]
    return {
        **generation.figures(),
        "tokens_per_second": len(token_seconds) / sum(token_seconds) if token_seconds else None,
        "token_seconds_p50": statistics.median(token_seconds) if token_seconds else None,
        "time_to_first_token_seconds": generation.first_token_seconds,
        "transport": project.transport.name,
        "boundary": project.boundary.name,
        "boundary_bytes_per_token": max(handed_on[:-1], default=0),
        "return_bytes_per_token": handed_on[-1],
        "shards": [_shard(report, place, _single(apart)) for place, report in enumerate(reports)],
        "recoveries": len(engine.recoveries),
        "recovery_start_seconds": [recovery.start_seconds for recovery in engine.recoveries],
        "recovery_prefill_seconds": [recovery.prefill_seconds for recovery in engine.recoveries],
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
