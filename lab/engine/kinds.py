"""Which engines there are, for settings: loads none of them, and no torch."""

from __future__ import annotations

from enum import Enum


class EngineKind(Enum):
    """Which engine stands behind a role; names are what people type."""

    local = "lab.engine.base:LocalEngine"
    split = "split.inference.open:join_shards"
    synthetic = "lab.engine.base:SyntheticEngine"
