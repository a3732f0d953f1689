"""Kinds of engines, for settings, and the import of the one that another pillar builds. Loads no torch."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from lab.engine.base import Engine
    from lab.settings import ModelSettings, NetworkSettings


class EngineKind(Enum):
    """The engine of a role; names are values of the setting."""

    local = "local"
    split = "split"
    speculative = "speculative"
    """A verifier's, on another machine: only the HTTP server takes it."""
    synthetic = "synthetic"


def open_split_engine(
    model: ModelSettings,
    network: NetworkSettings,
    *,
    shards: Sequence[str],
    spares: Sequence[str],
    boundary: str,
    context: int,
    prefill_chunk: int,
    start_seconds: float,
    recovery_seconds: float,
) -> Engine:
    """Open the engine of `split.inference.open.join_shards`, which describes these arguments. Imported by name, and
    only when it is asked for: `lab` knows no pillar, and no pillar another one."""
    arguments = dict(locals())
    return cast("Engine", importlib.import_module("split.inference.open").join_shards(**arguments))
