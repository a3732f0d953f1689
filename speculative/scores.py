"""The numbers of a verdict as the body of SCORES."""

import struct
from dataclasses import replace

from speculative.messages import TOP_BYTES, ScoresFrame
from speculative.request import Verdict

_TOP = struct.Struct("<id")
assert _TOP.size == TOP_BYTES


def pack_scores(verdict: Verdict, *, report: bool) -> tuple[ScoresFrame, bytes]:
    """Head and body of the SCORES of a verdict; `report`: with the cross-entropies of draft tokens and margins."""
    draft_nll, margins = (verdict.draft_nll, verdict.margins) if report else ([], [])
    head = ScoresFrame(
        position=verdict.position,
        draft_tokens=len(draft_nll),
        margins=len(margins),
        logprobs=len(verdict.nll),
        top_tokens=len(verdict.top[0]) if verdict.top else 0,
    )
    body = struct.pack(f"<{len(draft_nll) + len(margins)}f{len(verdict.nll)}d", *draft_nll, *margins, *verdict.nll)
    return head, body + b"".join(_TOP.pack(*one) for top in verdict.top for one in top)


def with_scores(verdict: Verdict, head: ScoresFrame, body: bytes | memoryview) -> Verdict:
    """The verdict with its numbers. Raises ValueError for a body of another size than the head says."""
    singles, doubles = head.draft_tokens + head.margins, head.logprobs
    expected = 4 * singles + doubles * (8 + head.top_tokens * TOP_BYTES)
    if len(body) != expected:
        raise ValueError(f"scores must be {expected} bytes, got {len(body)}")
    numbers = struct.unpack(f"<{singles}f{doubles}d", body[: 4 * singles + 8 * doubles])
    flat = list(_TOP.iter_unpack(body[4 * singles + 8 * doubles :]))
    return replace(
        verdict,
        draft_nll=list(numbers[: head.draft_tokens]),
        margins=list(numbers[head.draft_tokens : singles]),
        nll=list(numbers[singles:]),
        top=[flat[first : first + head.top_tokens] for first in range(0, len(flat), head.top_tokens or 1)],
    )
