"""From settings to what computes: the target's engine, and who guesses. Everything that loads a model is here."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lab.engine.base import Engine, LocalEngine, ShapeDependence, SyntheticEngine
from lab.engine.context import model_context
from lab.engine.kinds import EngineKind, open_split_engine
from lab.engine.kv import CacheFull
from lab.engine.sampling import Sampling
from lab.models.fingerprints import weights_fingerprints
from lab.models.layers import load_layers, load_proved
from lab.models.sources import end_ids_of, load_tokenizer_only
from lab.settings import ModelSettings, UserError
from speculative.drafter.draft_model import draft_model
from speculative.drafter.sources import (
    Drafts,
    EngineDrafts,
    NgramDrafts,
    NoDrafts,
    RandomDrafts,
    RecordedDrafts,
    add_noise_to_head,
)
from speculative.messages import MAX_END_IDS
from speculative.settings import DraftSource, SpeculativeProjectSettings, SpeculativeSettings
from speculative.vocabulary import first_difference, token_texts

SYNTHETIC_CONTEXT = 2**17
"""Tokens of a text in a synthetic engine where `project.context` is 0; it has no model to ask."""


@dataclass(frozen=True)
class OpenTarget:
    """The target, ready to be asked."""

    engine: Engine
    end_ids: list[int]
    model: str
    """Name for people."""
    dtype: str
    bytes_per_token: int
    """Of keys and values; 0 where they are not here."""
    fingerprints: dict[str, str]
    """What its text depends on, by name: a text is resumed only where these are the same."""


def open_target(settings: SpeculativeSettings, device: torch.device) -> OpenTarget:
    """The engine that `settings` name for the verifier. UserError for what it cannot do."""
    project, model = settings.project, settings.model
    if project.engine is EngineKind.synthetic:
        size = _synthetic_vocabulary(settings)
        known = {"model": "synthetic", "vocabulary": str(size)}
        return OpenTarget(_synthetic_target(project, size), [], "synthetic", "none", 0, known)
    ends = _ends(model)
    fingerprints = weights_fingerprints(model)
    if project.engine is EngineKind.split:
        fingerprints["boundary"] = project.split.boundary
        return OpenTarget(_split_target(settings), ends, model.name, model.dtype.name, 0, fingerprints)
    loaded = load_proved(model, device)
    rows = project.max_draft_length + 1 if project.exact_shapes else None
    engine = _local_engine(_with_adapter(loaded.model, model), project, project.sessions, rows)
    if project.exact_shapes:
        fingerprints["shapes"] = "exact"
    return OpenTarget(engine, ends, model.name, model.dtype.name, engine.cache.bytes_per_position, fingerprints)


def open_drafts(
    settings: SpeculativeSettings,
    device: torch.device,
    sampling: Sampling,
    target_texts: list[str],
    vocabulary_size: int,
) -> Drafts:
    """Who guesses, as `settings` name it.

    Args:
        settings: Of the drafter.
        device: What its model runs on.
        sampling: The text's own: guesses are drawn with the target's noise.
        target_texts: The text of each id of the target's tokenizer.
        vocabulary_size: Ids the target takes.

    Raises:
        UserError: a draft model with another vocabulary, layers that the target does not have, ...
    """
    project = settings.project
    shared = min(vocabulary_size, len(target_texts))
    makers: dict[DraftSource, Callable[[], Drafts]] = {
        DraftSource.none: NoDrafts,
        DraftSource.ngram: lambda: NgramDrafts(project.draft.longest_ngram, project.draft.shortest_ngram),
        DraftSource.random: lambda: RandomDrafts(settings.seed, shared),
        DraftSource.recorded: lambda: RecordedDrafts(
            _recorded_ids(str(project.draft.file)), project.synthetic.agreement, settings.seed, shared
        ),
        # It has no logits for words to change: it only guesses more often wrong.
        DraftSource.synthetic: lambda: EngineDrafts(
            _synthetic_drafter(project, vocabulary_size), replace(sampling, min_p=0.0, words=None), shared
        ),
        DraftSource.model: lambda: _from_model(_draft_model(settings, device, target_texts), project, sampling, shared),
        DraftSource.layers: lambda: _from_model(_first_layers(settings, device), project, sampling, shared),
        DraftSource.noisy: lambda: _from_model(_noisy_target(settings, device), project, sampling, shared),
    }
    return makers[project.draft.source]()


def _recorded_ids(file: str) -> list[int]:
    try:
        return [int(token) for token in json.loads(Path(file).read_text(encoding="utf-8"))["token_ids"]]
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(f"project.draft.file must be a run's result.json with token_ids, got {file!r}") from None


def _ends(model: ModelSettings) -> list[int]:
    """The ids that end a text. UserError for more than a drafter can be told."""
    ends = end_ids_of(model)
    if len(ends) > MAX_END_IDS:
        raise UserError(
            f"model {model.name} must end texts with at most {MAX_END_IDS} ids (eos_token_id of its generation "
            f"config), got {len(ends)}"
        )
    return ends


def _synthetic_vocabulary(settings: SpeculativeSettings) -> int:
    """Ids of a synthetic target: at least those that prompts are made of. UserError for fewer."""
    known = len(token_texts(load_tokenizer_only(settings.model)))
    asked = settings.project.synthetic.vocabulary_size
    if 0 < asked < known:
        raise UserError(
            f"project.synthetic.vocabulary_size must be 0 or at least {known}, the ids of the tokenizer of model "
            f"{settings.model.name}, got {asked}"
        )
    return asked or known


def _local_engine(
    model: torch.nn.Module, project: SpeculativeProjectSettings, sessions: int, exact_rows: int | None
) -> LocalEngine:
    config: Any = model.config
    try:
        return LocalEngine(
            model,
            sessions=sessions,
            context=model_context(config, project.context),
            bucket=project.cache_bucket,
            kv_limit_bytes=project.cache_limit_bytes,
            prefill_chunk=project.prefill_chunk,
            exact_rows=exact_rows,
        )
    except ShapeDependence as error:
        raise UserError(f"project.exact_shapes must be false here: {error}") from None
    except CacheFull as error:
        least = "one pass of exact shapes" if exact_rows else "a text of project.cache_bucket positions"
        raise UserError(f"project.cache_limit_bytes must hold {least}: {error}") from None
    except ValueError as error:
        raise UserError(f"project.exact_shapes: {error}" if exact_rows else str(error)) from None


def _with_adapter(model: PreTrainedModel, settings: ModelSettings) -> PreTrainedModel:
    if settings.adapter is not None:
        from lab.models.adapter import add_adapter  # loads PEFT and bitsandbytes, which plain models can do without

        add_adapter(model, settings)
    return model


def _split_target(settings: SpeculativeSettings) -> Engine:
    project = settings.project
    return open_split_engine(
        settings.model,
        settings.network,
        **asdict(project.split),
        context=project.context,
        prefill_chunk=project.prefill_chunk,
    )


def _synthetic_target(project: SpeculativeProjectSettings, vocabulary_size: int) -> SyntheticEngine:
    synthetic = project.synthetic
    return SyntheticEngine(
        vocabulary_size=vocabulary_size,
        context=project.context or SYNTHETIC_CONTEXT,
        sessions=project.sessions,
        step_seconds=synthetic.step_seconds,
        row_seconds=synthetic.row_seconds,
        agreement=1.0,
    )


def _synthetic_drafter(project: SpeculativeProjectSettings, vocabulary_size: int) -> SyntheticEngine:
    synthetic = project.synthetic
    return SyntheticEngine(
        vocabulary_size=vocabulary_size,
        context=project.context or SYNTHETIC_CONTEXT,
        sessions=1,
        step_seconds=synthetic.draft_step_seconds,
        row_seconds=0.0,
        agreement=synthetic.agreement,
    )


def _from_model(
    model: torch.nn.Module, project: SpeculativeProjectSettings, sampling: Sampling, vocabulary_size: int
) -> EngineDrafts:
    return EngineDrafts(_local_engine(model, project, sessions=1, exact_rows=None), sampling, vocabulary_size)


def _draft_model(settings: SpeculativeSettings, device: torch.device, target_texts: list[str]) -> PreTrainedModel:
    model = draft_model(settings, device)
    whose = f"project.draft.model {settings.project.draft.model}"
    try:
        tokenizer = load_tokenizer_only(model)
    except UserError as error:
        raise UserError(f"{whose}: {error}") from None
    check_same_vocabulary(tokenizer, target_texts, whose)
    return load_proved(model, device).model


def check_same_vocabulary(tokenizer: PreTrainedTokenizerBase, target_texts: list[str], whose: str) -> None:
    """UserError that names the first id which is not the target's."""
    if difference := first_difference(token_texts(tokenizer), target_texts):
        raise UserError(f"{whose} must have the target's tokenizer: {difference}")


def _first_layers(settings: SpeculativeSettings, device: torch.device) -> PreTrainedModel:
    try:
        model = load_layers(settings.model, device, range(settings.project.draft.layers), embedding=True, head=True)
    except UserError as error:
        raise UserError(f"project.draft.layers: {error}") from None
    return _with_adapter(model, settings.model)


def _noisy_target(settings: SpeculativeSettings, device: torch.device) -> torch.nn.Module:
    loaded = load_proved(settings.model, device)
    add_noise_to_head(loaded.model, settings.project.draft.noise, settings.seed)
    return _with_adapter(loaded.model, settings.model)
