"""Reading an offline W&B run back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def held(kept: bytes, key: str, value: Any) -> bool:
    """Whether a run's text has a figure under its name."""
    if isinstance(value, dict):
        return key.encode() in kept and all(held(kept, name, item) for name, item in value.items())
    leaves = value if isinstance(value, list) else [value]
    return key.encode() in kept and all(json.dumps(leaf).encode() in kept for leaf in leaves)


def wandb_text(file: Path) -> bytes:
    """A W&B file without the headers of its blocks (a LevelDB log: crc, length, type before each piece)."""
    data, kept, place = file.read_bytes(), b"", 7
    while place + 7 <= len(data):
        length = int.from_bytes(data[place + 4 : place + 6], "little")
        kept += data[place + 7 : place + 7 + length]
        place += 7 + length
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
    return kept
