"""Opens the models that the settings name."""

from __future__ import annotations

import time
from collections.abc import Callable

from lab.device import open_device
from lab.engine.kinds import EngineKind
from lab.models.sources import load_tokenizer_only
from lab.settings import UserError
from serve.models import Models, ServedModel
from serve.remote import RemoteWriter
from serve.scheduled import ScheduledWriter
from serve.settings import ServeSettings
from serve.tokens import ModelTexts
from serve.writer import Writer
from speculative.verifier.scheduler import EngineFailed
from speculative.verifier.target import OpenTarget, open_target
from speculative.vocabulary import token_texts


def open_models(settings: ServeSettings, call_soon: Callable[..., object]) -> Models:
    """The base model, ready for requests.

    Raises:
        UserError: settings that it cannot be served with.
        WireError: no verifier at `project.verifier`.
    """
    tokenizer = load_tokenizer_only(settings.model)
    models = Models(int(time.time()))
    writer: Writer
    if settings.project.engine is EngineKind.speculative:
        writer = RemoteWriter(settings, token_texts(tokenizer), call_soon)
    else:
        writer = _scheduled(settings, open_target(settings, open_device(settings.device)), call_soon)
    texts = ModelTexts(tokenizer, writer.end_ids, vocabulary_size=writer.vocabulary_size, context=writer.context)
    models.add(ServedModel(settings.project.model_id or settings.model.name, writer, texts))
    return models


def _scheduled(settings: ServeSettings, target: OpenTarget, call_soon: Callable[..., object]) -> ScheduledWriter:
    try:
        return ScheduledWriter(target, settings.project, call_soon)
    except EngineFailed as error:
        raise UserError(f"model {target.model} must run here: {error}") from None
