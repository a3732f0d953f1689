"""Token ids as a frame body: raw int32, little-endian (what every machine of the lab has in memory)."""

import struct
from collections.abc import Sequence

from lab.wire.faults import BadFrame, Peer

TOKEN_BYTES = 4


def pack_tokens(ids: Sequence[int]) -> bytes:
    """Return `ids` as a body of 4 bytes each. Raises `ValueError` for an id that is no int32."""
    try:
        return struct.pack(f"<{len(ids)}i", *ids)
    except struct.error:
        wrong = next(i for i in ids if not -(2**31) <= i < 2**31)
        raise ValueError(f"token id must be in [-2147483648, 2147483647], got {wrong}") from None


def unpack_tokens(body: memoryview, *, vocabulary_size: int, peer: Peer) -> list[int]:
    """Return the ids of a body. Raises `BadFrame` for a torn id or one that is not in [0, vocabulary_size)."""
    if len(body) % TOKEN_BYTES:
        raise BadFrame(peer, f"sent {len(body)} bytes of token ids, not a multiple of {TOKEN_BYTES}")
    ids = list(struct.unpack(f"<{len(body) // TOKEN_BYTES}i", body))
    if ids and not (min(ids) >= 0 and max(ids) < vocabulary_size):
        index, wrong = next((i, t) for i, t in enumerate(ids) if not 0 <= t < vocabulary_size)
        raise BadFrame(peer, f"sent token id {wrong} at index {index}, vocabulary is {vocabulary_size}")
    return ids
