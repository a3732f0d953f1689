"""Encodings of hidden states between two shards, and their sizes. Loads no torch."""

from enum import Enum

SCALE_BYTES = 4


class Boundary(Enum):
    """Encoding of hidden states. `int8`: each position is scaled by its own largest absolute value, H + 4 bytes."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    int8 = "int8"

    def row_bytes(self, hidden_size: int) -> int:
        """Bytes of one position."""
        return {"float32": 4 * hidden_size, "bfloat16": 2 * hidden_size, "int8": hidden_size + SCALE_BYTES}[self.value]
