"""What a text costs on the wire, and what the table refuses."""

from __future__ import annotations

import msgspec
import pytest

from lab.engine.sampling import Sampling
from lab.engine.synthetic import SyntheticEngine
from lab.wire.frames import encode
from lab.wire.tokens import pack_tokens
from speculative.bench.rig import text_bytes
from speculative.drafter.sources import EngineDrafts
from speculative.messages import TABLE, CloseFrame, DraftFrame, MessageType, OpenFrame, Reason, VerdictFrame
from speculative.settings import Mode
from tests.speculative.in_process import InProcess, bench, request, speculated

GREEDY = Sampling.greedy()


def _synthetic(agreement: float) -> SyntheticEngine:
    """Without time, so that a text is there at once."""
    return SyntheticEngine(
        vocabulary_size=40000, context=3000, sessions=1, step_seconds=0, row_seconds=0, agreement=agreement
    )


def test_bytes_of_a_text_at_length_8_and_acceptance_080() -> None:
    """25 bytes a guess that was accepted, both directions, frame headers included; per token of the text it is less."""
    with bench(_synthetic(1.0)) as verifiers:
        drafts = EngineDrafts(_synthetic(0.8), GREEDY, 40000)
        rounds = speculated(InProcess(verifiers), drafts, request([5], 2500, GREEDY, length=8))
    accepted = sum(done.accepted for done in rounds)
    checked = sum(min(len(done.draft_ids), done.accepted + 1) for done in rounds)
    assert accepted / checked == pytest.approx(0.8, abs=0.02)
    sent = text_bytes(1, rounds)
    assert sent / accepted <= 25
    assert sent / 2500 <= 20


def test_ids_only() -> None:
    """Of a round nothing travels but three small numbers, one small number, and raw ids."""
    draft = encode(TABLE, MessageType.draft, 1, DraftFrame(epoch=70000, position=70000), pack_tokens([1] * 8))
    verdict = encode(
        TABLE,
        MessageType.verdict,
        1,
        VerdictFrame(epoch=70000, position=70000, accepted=8, prefix=2**64 - 1),
        pack_tokens([1]),
    )
    assert len(draft) == 16 + (1 + 5 + 5) + 32
    assert len(verdict) == 16 + (1 + 5 + 5 + 1 + 9) + 4


@pytest.mark.parametrize(
    "head",
    [
        OpenFrame(
            seed=2**63 - 1,
            temperature=0.5,
            top_k=3,
            top_p=0.9,
            min_p=0.05,
            logit_rules=None,
            top_tokens=0,
            max_new_tokens=5,
            mode=Mode.sync,
            draft_length=5,
            name=2**64 - 1,
            owner=bytes(16),
            threshold=None,
            report=False,
            logprobs=False,
        ),
        CloseFrame(reason=Reason.refused, text="why"),
    ],
)
def test_heads_are_read_as_they_were_written(head: OpenFrame | CloseFrame) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(head), type=type(head)) == head


@pytest.mark.parametrize("bad", [[-1, 0], [0, 2**32], [0], [0, 0, 0], ["a", 0], None])
def test_other_heads_are_refused(bad: object) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(bad), type=DraftFrame)
