"""The benchmark runs, at toy size. No time is asserted: machines are shared."""

from __future__ import annotations

import json
from pathlib import Path

from lab.engine import SyntheticEngine
from lab.entry import Run, compose_settings
from lab.models import load_tokenizer_only
from lab.sampling import Sampling
from lab.wire import encode, pack_tokens
from speculative import bench
from speculative.drafting import speculate
from speculative.drafts import EngineDrafts, RandomDrafts
from speculative.joining import join
from speculative.messages import TABLE, Close, MessageType, Open, Reason
from speculative.settings import Mode, SpeculativeSettings
from speculative.vocabulary import token_texts
from tests.speculative.in_process import InProcess, request, speculated
from tests.speculative.in_process import bench as verifiers_on
from tests.speculative.processes import Role, wait_until


def _settings(*words: str) -> SpeculativeSettings:
    return compose_settings("spec_decoding", " ".join(("tracking=none", *words)), SpeculativeSettings)


def test_every_row_is_there(tmp_path: Path) -> None:
    settings = _settings(
        "project.bench.rtt_seconds=[0.0,0.03]",
        "project.bench.draft_lengths=[3]",
        "project.bench.new_tokens=12",
        "project.bench.repeats=2",
        "project.bench.frame_rounds=20",
        "project.synthetic.step_seconds=0.01",
    )
    result = bench.run(settings, Run(tmp_path))
    rows = result["rows"]
    assert [(row["row"], row.get("mode"), row.get("rtt_seconds")) for row in rows] == [
        ("sync", "target_only", 0.0),
        ("sync", "target_only", 0.03),
        ("sync", "sync", 0.0),
        ("sync", "sync", 0.03),
        ("frame", None, None),
    ]
    for row in rows[:4]:
        assert row["tokens_per_second"]["n"] == row["n"] == 2
        assert 0 < row["formula_over_measured"]["median"] < 1.05, "faster than its own formula"
        assert 0 < row["formula_over_median_round"]["median"] < 1.05
    assert rows[3]["tokens_per_second"]["median"] < rows[2]["tokens_per_second"]["median"], "the delay was not there"
    assert json.loads((tmp_path / "bench.json").read_text())["rows"] == rows
    assert rows[-1]["frame_seconds"] > 0
    for row in rows[:4]:
        assert row["holds"] == (row["formula_over_measured"]["median"] >= 0.95)
    assert rows[-1]["holds"] == (rows[-1]["added_seconds"] <= 60e-6)


def _bytes_per_accepted_guess(length: int) -> float:
    """Of a text at acceptance 0.8."""
    target, drafter = (
        SyntheticEngine(
            vocabulary_size=50_000, context=2**14, sessions=1, step_seconds=0, row_seconds=0, agreement=agreement
        )
        for agreement in (1.0, 0.8)
    )
    with verifiers_on(target) as verifiers:
        drafts = EngineDrafts(drafter, Sampling.greedy(), 50_000)
        rounds = speculated(InProcess(verifiers), drafts, request([1], 4000, Sampling.greedy(), length=length))
    return bench.text_bytes(1, rounds) / sum(done.accepted for done in rounds)


def test_an_accepted_token_costs_at_most_25_bytes_both_ways() -> None:
    assert _bytes_per_accepted_guess(8) <= 25
    assert _bytes_per_accepted_guess(1) > 25, "the check sees a loop that is chattier"


def test_these_bytes_are_the_ones_that_cross_the_socket(random_verifier: Role) -> None:
    settings = _settings("model=random", "model.dtype=float64", f"network.port={random_verifier.port}")
    asked = request([1, 2, 3], 40, Sampling.greedy(), length=8)
    opened = Open(
        name=2**64 - 1,
        owner=bytes(16),
        seed=0,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=40,
        mode=Mode.sync,
        draft_length=8,
        threshold=None,
        report=False,
    )
    expected = len(encode(TABLE, MessageType.open, 1, opened, pack_tokens(asked.prompt_ids)))
    for reason in (Reason.length, Reason.left):  # the verifier's word and ours cross on the way
        expected += len(encode(TABLE, MessageType.close, 1, Close(reason=reason, text="")))
    with join(settings, token_texts(load_tokenizer_only(settings.model))) as target:
        before = target.bytes_sent + target.bytes_received
        rounds = list(speculate(target, RandomDrafts(1, 256), asked, []))
        expected += bench.text_bytes(3, rounds)
        wait_until(lambda: target.bytes_sent + target.bytes_received - before >= expected, "the verifier's CLOSE")
        more = target.bytes_sent + target.bytes_received - before - expected
    assert more % 18 == 0, "not heartbeats"
    assert more < 200
