"""One request of a drafter, from its prompt to its figures."""

import contextlib
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lab.command import entry
from lab.command.terminal import TextStream
from lab.device import open_device
from lab.engine.base import check_schema
from lab.engine.sampling import Sampling
from lab.files import path_of
from lab.models.sources import load_tokenizer_only
from lab.settings import UserError, user_errors
from lab.text.generation import check_rows, decoder, most_new_tokens, sampling_of
from lab.text.grammars import Grammars
from lab.text.prompts import input_ids
from lab.text.running_text import final_text
from lab.tracking import Tracker
from speculative.drafter.check import find_flips
from speculative.drafter.loop import SYNC_LENGTH, RequestRefused, Round, speculate
from speculative.drafter.sources import open_drafts
from speculative.drafter.tally import Tally
from speculative.drafter.target import RemoteTarget, Ticket, join
from speculative.drafts import Drafts, NoDrafts
from speculative.messages import MAX_PROMPT_TOKENS, WelcomeFrame
from speculative.request import GenerationRequest
from speculative.settings import DraftSource, Mode, Rule, SpeculativeProjectSettings, SpeculativeSettings
from speculative.theory import Speeds, predicted_async_tokens_per_second, sync_tokens_per_second
from speculative.vocabulary import token_texts

log = logging.getLogger(__name__)

ACCEPTED, CORRECTED = "\x1b[32m", "\x1b[33m"
"""Colours of accepted draft tokens and of the target's own tokens."""


def draft(settings: SpeculativeSettings, place: entry.Run) -> dict[str, Any]:
    """Join the verifier, generate the text, and return its figures.

    Raises:
        UserError: a prompt or settings that this target does not take.
        WireError: the verifier cannot be joined.
        RequestRefused: the verifier does not serve the request.
        RequestFailed, WireError: the request could not continue; `place.so_far` has the figures so far.
    """
    project = settings.project
    warn_of_unused(settings)
    device = open_device(settings.device)
    tokenizer = load_tokenizer_only(settings.model)
    texts = token_texts(tokenizer)
    ids = input_ids(tokenizer, settings.prompt, project)
    sampling = sampling_of(project, settings.seed, tokenizer, len(ids))
    with Tracker(settings, "drafter", place.folder) as tracker, join(settings, texts) as target:
        request = make_request(settings, ids, sampling, most_new_tokens(project, len(ids), target.welcome.context))
        grammars = Grammars(lambda: (tokenizer, target.welcome.end_ids))
        _check_request(request, texts, target.welcome, grammars)
        drafts: Drafts = NoDrafts()
        if request.mode is not Mode.target_only:
            size = target.welcome.vocabulary_size
            drafts = open_drafts(settings, device, request.sampling, texts, size, grammars)
        tally = Tally()
        place.so_far = lambda: _figures(settings, target, tokenizer, tally)
        try:
            set_ticket(settings.project.resume, target, place.folder / "text.json")
            generate(target, drafts, request, tokenizer, tally, tracker, project.stops)
        except RequestRefused:
            if not tally.token_ids:
                place.so_far = dict  # not begun yet
            raise
        finally:
            drafts.close()
        result = _figures(settings, target, tokenizer, tally)
        if project.check:
            flips = find_flips(target, request, result["token_ids"], target.welcome.end_ids)
            result["flips"] = [asdict(flip) for flip in flips]
        tracker.result(result)
    return result


def warn_of_unused(settings: SpeculativeSettings) -> None:
    """Say once which settings of a draft source were asked for and belong to another one: a sweep over sources has
    those of all."""
    source, draft = settings.project.draft.source, settings.project.draft
    is_alone = settings.project.mode is Mode.target_only
    of_model = is_alone or source is not DraftSource.model
    has_layers = not is_alone and source in (DraftSource.model, DraftSource.layers, DraftSource.noisy)
    asked = {
        "project.draft.model": of_model and draft.model,
        "project.draft.dtype": of_model and draft.dtype,
        "project.draft.quantization": of_model and draft.quantization,
        "project.draft.file": (is_alone or source is not DraftSource.recorded) and draft.file,
        "device.compile": not has_layers and settings.device.compile is True,
    }
    if unused := [key for key, value in asked.items() if value]:
        whose = "project.mode=target_only" if is_alone else f"project.draft.source={source.name}"
        log.warning("not used with %s: %s", whose, ", ".join(unused))


def _check_request(request: GenerationRequest, texts: Sequence[str], welcome: WelcomeFrame, grammars: Grammars) -> None:
    """UserError for a prompt that is too long, for ids that the target does not have, and for a schema that cannot be
    compiled."""
    if request.sampling.logit_rules is not None:
        with user_errors("project."):
            request.sampling.logit_rules.check_ids(welcome.vocabulary_size)
            check_schema(grammars, request.sampling.logit_rules.schema)
    if len(request.prompt_ids) > MAX_PROMPT_TOKENS:
        raise UserError(f"prompt must be at most {MAX_PROMPT_TOKENS} tokens, got {len(request.prompt_ids)}")
    check_rows(request.prompt_ids, welcome.vocabulary_size, "target", texts.__getitem__)


def generate(
    target: RemoteTarget,
    drafts: Drafts,
    request: GenerationRequest,
    tokenizer: PreTrainedTokenizerBase,
    tally: Tally,
    tracker: Tracker,
    stops: Sequence[str],
) -> None:
    """Generate the text, and write it to stdout as it is verified; `tally` and `tracker` get each round at once. A stop
    string ends it. Raises StreamLeft when stdout is no longer read."""
    if request.threshold is not None:
        log.warning("rule cross_entropy is lossy: this text is not the target's own")
    stream = TextStream(decoder(tokenizer, target.welcome.end_ids), sys.stdout, stops)
    try:
        with contextlib.closing(speculate(target, drafts, request, target.welcome.end_ids)) as rounds:
            for done in rounds:
                tally.add(done)
                tracker.log(len(tally.rounds) - 1, **tally.row(len(tally.rounds) - 1))
                show(stream, done)
                if stream.text.stopped:
                    return
    finally:
        if tally.token_ids:
            stream.finish(CORRECTED)


def show(stream: TextStream, done: Round) -> None:
    """Write accepted draft tokens in one colour, the target's own in the other. Raises StreamLeft."""
    stream.add(done.tokens[: done.accepted], ACCEPTED)
    stream.add(done.tokens[done.accepted :], CORRECTED)


def set_ticket(resume: str | None, target: RemoteTarget, path: Path) -> None:
    """Give the next request a new ticket, or the ticket in the file `resume` of another process; write it to `path`."""
    with user_errors("project.resume "):
        ticket = Ticket.new(target.welcome.target) if resume is None else Ticket.read(path_of(resume, "project.resume"))
    try:
        ticket.write(path)
    except OSError as error:
        log.warning("%s could not be written (%s): no other process can resume this request", path, error.strerror)
    target.set_next_ticket(ticket, again=resume is not None)


def make_request(
    settings: SpeculativeSettings, ids: Sequence[int], sampling: Sampling, max_new_tokens: int
) -> GenerationRequest:
    """The request for a prompt, with the settings of the text."""
    project = settings.project
    return GenerationRequest(
        prompt_ids=ids,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        mode=project.mode,
        draft_length=project.draft.fixed_length,
        threshold=project.cross_entropy_threshold if project.rule is Rule.cross_entropy else None,
    )


def _figures(
    settings: SpeculativeSettings, target: RemoteTarget, tokenizer: PreTrainedTokenizerBase, tally: Tally
) -> dict[str, Any]:
    project = settings.project
    text = final_text(decoder(tokenizer, target.welcome.end_ids), tally.token_ids, project.stops)
    figures = tally.figures()
    return {
        "text": text.text,
        "token_ids": text.ids,
        **figures,
        "predicted_tokens_per_second": _predicted(project, target, figures),
        "rtt_seconds": target.rtt_seconds,
        "resumes": target.resumes,
        "waited_seconds": target.waited_seconds,
        "bytes_sent": target.bytes_sent,
        "bytes_received": target.bytes_received,
        "ended_by": text.ended_by(target.welcome.end_ids),
        "mode": project.mode,
        "drafter": "none" if project.mode is Mode.target_only else project.draft.source,
        "draft_length": project.draft.length,
        "rule": project.rule,
        "lossless": project.rule is Rule.exact,
        "seed": settings.seed,
        "target": target.welcome.model,
        "target_dtype": target.welcome.dtype,
        "flips": None,
    }


def _predicted(project: SpeculativeProjectSettings, target: RemoteTarget, figures: dict[str, Any]) -> float | None:
    """Predicted tokens per second for the measured figures; None if one of them is missing."""
    ended, rtt, draft_step = target.ended, target.rtt_seconds, figures["draft_step_seconds"]
    if ended is None or not ended.step_seconds:
        return None
    if project.mode is Mode.target_only:
        return 1 / ended.step_seconds
    if rtt is None or draft_step is None or figures["alpha"] is None:
        return None
    speeds = Speeds(
        step_seconds=ended.step_seconds,
        row_seconds=ended.row_seconds,
        draft_step_seconds=draft_step,
        rtt_seconds=rtt,
    )
    if project.mode is Mode.sync:
        return sync_tokens_per_second(figures["alpha"], project.draft.fixed_length or SYNC_LENGTH, speeds)
    return predicted_async_tokens_per_second(
        figures["alpha_by_position"],
        speeds,
        longest=target.longest_draft,
        draft_length=project.draft.fixed_length or None,
        new_tokens=figures["new_tokens"],
    )
