"""A whole model on this machine as an engine, within the cache that the settings give it."""

from __future__ import annotations

from typing import Any

import torch

from lab.engine.context import model_context
from lab.engine.kv import CacheFull
from lab.engine.local import LocalEngine, ShapeDependence
from lab.settings import UserError
from speculative.settings import SpeculativeProjectSettings


def local_engine(
    model: torch.nn.Module, project: SpeculativeProjectSettings, sessions: int, exact_rows: int | None
) -> LocalEngine:
    """Open `model` for `sessions` sequences. UserError for a small cache or shapes that do not hold."""
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
