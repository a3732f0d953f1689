"""Opens the model that the settings name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers.modeling_utils import PreTrainedModel

from lab.device import open_device
from lab.engine.kinds import EngineKind
from lab.models.layers import load_proved
from lab.models.sources import load_tokenizer_only
from lab.settings import UserError
from serve.models.adapters import Turns, sharing
from serve.models.remote import RemoteWriter
from serve.models.scheduled import ScheduledWriter
from serve.models.served import ServedModel
from serve.models.tokens import ModelTexts
from serve.models.writer import Writer
from serve.settings import ServeSettings
from speculative.verifier.scheduler import EngineFailed
from speculative.verifier.target import OpenTarget, local_target, open_target
from speculative.vocabulary import token_texts


@dataclass(frozen=True)
class Opened:
    """The first model of a server."""

    model: ServedModel
    base: PreTrainedModel | None
    """The loaded base, where adapters are to share its tensors."""


def open_first(settings: ServeSettings, call_soon: Callable[..., object], turns: Turns) -> Opened:
    """The model that the settings name, ready for requests.

    Raises:
        UserError: settings that it cannot be served with.
        WireError: no verifier at `project.verifier`.
    """
    tokenizer = load_tokenizer_only(settings.model)
    base: PreTrainedModel | None = None
    writer: Writer
    if settings.project.engine is EngineKind.speculative:
        writer = RemoteWriter(settings, token_texts(tokenizer), call_soon)
    elif settings.project.adapters is not None:
        base = load_proved(settings.model, open_device(settings.device)).model
        writer = _scheduled(settings, local_target(settings, sharing(base)), call_soon, turns)
    else:
        writer = _scheduled(settings, open_target(settings, open_device(settings.device)), call_soon, turns)
    texts = ModelTexts(tokenizer, writer.end_ids, vocabulary_size=writer.vocabulary_size, context=writer.context)
    return Opened(ServedModel(settings.project.model_id or settings.model.name, writer, texts), base)


def _scheduled(
    settings: ServeSettings, target: OpenTarget, call_soon: Callable[..., object], turns: Turns
) -> ScheduledWriter:
    try:
        return ScheduledWriter(target, settings.project, call_soon, turns.turn)
    except EngineFailed as error:
        raise UserError(f"model {target.model} must run here: {error}") from None
