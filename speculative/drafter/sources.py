"""Draft sources that need a model, and the choice of one by the settings.

Shapes: V vocabulary, H hidden size.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers.modeling_utils import PreTrainedModel
from typing_extensions import override

from lab.engine.base import Engine
from lab.engine.compiled import Compiler
from lab.engine.local import open_local_engine
from lab.engine.not_finite import NotFinite
from lab.engine.sampling import Sampling
from lab.engine.synthetic import SyntheticEngine
from lab.models.layers import load_layers, load_proved, with_adapter
from lab.models.packed import IntLinear
from lab.models.sources import load_tokenizer_only
from lab.settings import ModelSettings, UserError
from lab.text.grammars import GrammarFailed, Grammars
from speculative.drafter.draft_model import draft_model
from speculative.drafts import Drafts, NgramDrafts, NoDrafts, RandomDrafts, RecordedDrafts, with_schema
from speculative.settings import SYNTHETIC_CONTEXT, DraftSource, TargetRoleSettings, TargetSettings
from speculative.vocabulary import first_difference, token_texts

log = logging.getLogger(__name__)


class EngineDrafts(Drafts):
    """Draft tokens of an engine: a model, a slice of the target, a noisy target, a synthetic one.

    It samples as the target does: with the same noise at each position it chooses the same token far more often than
    with independent noise (`lab.engine.sampling`).
    """

    def __init__(self, engine: Engine, sampling: Sampling, vocabulary_size: int) -> None:
        """`vocabulary_size` is the target's: an id beyond it, from longer padding, is not a draft token."""
        self._engine = engine
        self._vocabulary_size = vocabulary_size
        sampling = replace(sampling, top_tokens=0)  # the target's are reported
        if sampling.logit_rules is not None:
            sampling = replace(sampling, logit_rules=sampling.logit_rules.within(engine.vocabulary_size))
        self._session = engine.open([], sampling, engine.longest)
        self._sampling = sampling
        self._text: list[int] = []

    @override
    def begin(self, prompt_ids: Sequence[int]) -> None:
        self._text = list(prompt_ids)
        if self._session.fault:
            self._session.close()
            self._session = self._engine.open([], self._sampling, self._engine.longest)
        self._session.position = 0

    @override
    def propose(self, count: int) -> list[int]:
        drafted: list[int] = []
        while len(drafted) < count and len(self._text) <= self._engine.longest and not self._session.fault:
            try:
                token = self._next_id()
            except (NotFinite, GrammarFailed) as fault:
                log.warning("the drafter makes no more drafts for this request: %s", fault)
                self._session.fault = self._session.fault or str(fault)
                break
            if token >= self._vocabulary_size:
                break
            drafted.append(token)
            self._text.append(token)
        return drafted

    @override
    def correct(self, position: int, ids: Sequence[int]) -> None:
        del self._text[position:]
        self._session.position = min(self._session.position, position)
        self._text += ids

    @override
    def close(self) -> None:
        self._session.close()
        self._engine.shutdown()

    def _next_id(self) -> int:
        # At least one token is fed, even again: after an id that was no draft token there is no new one.
        self._session.position = min(self._session.position, len(self._text) - 1)
        # The target's padding may be longer than ours: we treat such an id as any token, which only costs acceptance.
        largest = self._engine.vocabulary_size - 1
        unseen = [min(token, largest) for token in self._text[self._session.position :]]
        [step] = self._engine.extend([(self._session, unseen)], "last")
        return step.next_ids[-1]


def add_noise_to_head(model: PreTrainedModel, noise: float, seed: int) -> None:
    """Replace the model's head by a noisy copy: normal noise of `noise` times the head's standard deviation."""
    head = cast(Any, model.get_output_embeddings())
    if isinstance(head, IntLinear):
        head = head.in_float().to(model.dtype)
        model.set_output_embeddings(head)
    weight_VH = head.weight.detach().float()
    generator = torch.Generator().manual_seed(seed)
    random_VH = torch.randn(weight_VH.shape, generator=generator).to(weight_VH.device)
    noisy_VH = weight_VH + noise * weight_VH.std() * random_VH
    head.weight = torch.nn.Parameter(noisy_VH.to(head.weight.dtype), requires_grad=False)


def open_drafts(
    settings: TargetRoleSettings,
    device: torch.device,
    sampling: Sampling,
    target_texts: list[str],
    vocabulary_size: int,
    grammars: Grammars | None = None,
) -> Drafts:
    """Open the draft source that `settings` select.

    Args:
        settings: The drafter's.
        device: Where its model runs.
        sampling: The request's own: draft tokens are sampled with the target's noise.
        target_texts: Text of each id of the target's tokenizer.
        vocabulary_size: Number of ids that the target takes.
        grammars: Compiles the schema of a request for the target's tokenizer and end tokens; None: no schema.

    Raises:
        UserError: a draft model with another vocabulary, layers that the target does not have, ...
    """
    project = settings.project
    shared = min(vocabulary_size, len(target_texts))

    def of_model(model: torch.nn.Module, its: ModelSettings) -> EngineDrafts:
        compiler = Compiler.of(its, settings.device, lasts=False)
        engine = open_local_engine(model, project, sessions=1, compiler=compiler, grammars=grammars)
        return EngineDrafts(engine, sampling, shared)

    makers: dict[DraftSource, Callable[[], Drafts]] = {
        DraftSource.none: NoDrafts,
        DraftSource.ngram: lambda: NgramDrafts(project.draft.longest_ngram, project.draft.shortest_ngram),
        DraftSource.random: lambda: RandomDrafts(settings.seed, shared),
        DraftSource.recorded: lambda: RecordedDrafts(
            _recorded_ids(str(project.draft.file)), project.synthetic.agreement, settings.seed, shared
        ),
        # It has no logits for penalties, biases and schemas to change, which only costs acceptance.
        DraftSource.synthetic: lambda: EngineDrafts(
            _synthetic_drafter(project, vocabulary_size), replace(sampling, min_p=0.0, logit_rules=None), shared
        ),
        DraftSource.model: lambda: of_model(*_draft_model(settings, device, target_texts)),
        DraftSource.layers: lambda: of_model(_first_layers(settings, device), settings.model),
        DraftSource.noisy: lambda: of_model(_noisy_target(settings, device), settings.model),
    }
    made = makers[project.draft.source]()
    return made if project.draft.source is DraftSource.none else with_schema(made, sampling.logit_rules, grammars)


def _recorded_ids(file: str) -> list[int]:
    try:
        return [int(token) for token in json.loads(Path(file).read_text(encoding="utf-8"))["token_ids"]]
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(f"project.draft.file must be a run's result.json with token_ids, got {file!r}") from None


def _synthetic_drafter(project: TargetSettings, vocabulary_size: int) -> SyntheticEngine:
    synthetic = project.synthetic
    return SyntheticEngine(
        vocabulary_size=vocabulary_size,
        context=project.context or SYNTHETIC_CONTEXT,
        sessions=1,
        step_seconds=synthetic.draft_step_seconds,
        row_seconds=0.0,
        agreement=synthetic.agreement,
    )


def _draft_model(
    settings: TargetRoleSettings, device: torch.device, target_texts: list[str]
) -> tuple[PreTrainedModel, ModelSettings]:
    model = draft_model(settings, device)
    whose = f"project.draft.model {settings.project.draft.model}"
    try:
        tokenizer = load_tokenizer_only(model)
    except UserError as error:
        raise UserError(f"{whose}: {error}") from None
    if difference := first_difference(token_texts(tokenizer), target_texts):
        raise UserError(f"{whose} must have the target's tokenizer: {difference}")
    try:
        return load_proved(model, device).model, model
    except UserError as error:
        raise UserError(f"{whose}: {error}") from None


def _first_layers(settings: TargetRoleSettings, device: torch.device) -> PreTrainedModel:
    try:
        model = load_layers(settings.model, device, range(settings.project.draft.layers), embedding=True, head=True)
    except UserError as error:
        raise UserError(f"project.draft.layers: {error}") from None
    return with_adapter(model, settings.model)


def _noisy_target(settings: TargetRoleSettings, device: torch.device) -> torch.nn.Module:
    loaded = load_proved(settings.model, device)
    add_noise_to_head(loaded.model, settings.project.draft.noise, settings.seed)
    return with_adapter(loaded.model, settings.model)
