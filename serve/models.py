"""The models that a server offers: their ids, writers, tokenizers and fingerprints."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from serve.faults import RequestFault
from serve.tokens import ModelTexts
from serve.writer import Writer


@dataclass(frozen=True)
class ServedModel:
    """One model as clients know it."""

    id: str
    writer: Writer
    texts: ModelTexts
    parent: str | None = None
    """Id of the base model, where this is an adapter on it."""

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

    def add(self, model: ServedModel) -> None:
        """Offer a model."""
        self.by_id[model.id] = model

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
