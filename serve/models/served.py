"""The models that a server offers: their ids, writers, tokenizers and fingerprints."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve.faults import RequestFault
from serve.models.tokens import ModelTexts
from serve.models.writer import Writer


@dataclass(frozen=True)
class ServedModel:
    """One model as clients know it."""

    id: str
    writer: Writer
    texts: ModelTexts
    parent: str | None = None
    """Id of the base model, where this is an adapter on it."""
    folder: Path | None = None
    """The adapter's folder."""

    @property
    def fingerprint(self) -> str:
        """`system_fingerprint`: weights, adapter, precision, quantisation and boundary; equal ones give equal texts."""
        own = self.writer.fingerprints
        named = [own[name] for name in ("dtype", "quantization", "boundary", "shapes", "layers") if name in own]
        weights = hashlib.sha256(own.get("model", "").encode()).hexdigest()[:12]
        adapter = own.get("adapter", "none")
        adapter = adapter if adapter == "none" else hashlib.sha256(adapter.encode()).hexdigest()[:12]
        return "-".join([f"fp_{weights}", adapter, *named])

    def about(self, created: int) -> dict[str, Any]:
        """Its entry in the list of models."""
        return {
            "id": self.id,
            "object": "model",
            "created": created,
            "owned_by": "distributed-llm-lab",
            "root": self.parent or self.id,
            "parent": self.parent,
            "max_model_len": self.writer.context,
        }


@dataclass
class Models:
    """All models of a server; the first one serves requests that name none."""

    created: int
    by_id: dict[str, ServedModel] = field(default_factory=dict)
    retired: list[ServedModel] = field(default_factory=list)
    """Models that are offered no more, but may have texts."""

    broke: Callable[[BaseException], object] = field(default=lambda error: None)
    """Called, in any thread, with what ended a writer."""

    def add(self, model: ServedModel) -> None:
        """Begin to offer a model."""
        self.begin(model)
        self.by_id[model.id] = model

    def begin(self, model: ServedModel) -> None:
        """Start its writer, whose end is watched from then on."""
        model.writer.start()
        model.writer.finished.add_done_callback(self._ended)

    def _ended(self, finished: Future[None]) -> None:
        error = finished.exception()
        if error is not None:
            self.broke(error)

    def retire(self, name: str) -> None:
        """Offer a model no more, if it is offered."""
        model = self.by_id.pop(name, None)
        if model is not None:
            self.retired.append(model)

    def all(self) -> list[ServedModel]:
        """Those that are offered, and the others."""
        return [*self.by_id.values(), *self.retired]

    def with_fingerprint(self, fingerprint: str) -> ServedModel | None:
        """The model of this fingerprint; None if there is none."""
        return next((model for model in self.all() if model.fingerprint == fingerprint), None)

    def get(self, name: str | None) -> ServedModel:
        """The model of this id. RequestFault (404) for one that is not here."""
        if name is None:
            return next(iter(self.by_id.values()))
        found = self.by_id.get(name)
        if found is None:
            known = ", ".join(self.by_id)
            rule = f"model must be one of {known}"
            raise RequestFault(404, f"{rule}, got {name[:200]!r}", param="model", code="model_not_found")
        return found

    def listed(self) -> Mapping[str, Any]:
        """The document of /v1/models."""
        return {"object": "list", "data": [model.about(self.created) for model in self.by_id.values()]}
