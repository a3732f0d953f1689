"""Logit rules and `min_p`: speculated text is the target's own, and shards say what the whole model says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lab.engine.history import History
from lab.engine.sampling import Sampling
from lab.engine.synthetic import SyntheticEngine
from tests.logit_rules import RULES, compare_logit_rules, samplings, shards_differ, without_effect


def test_speculated_text_is_the_targets_own_with_every_rule() -> None:
    compared = compare_logit_rules(350, whole=False)
    assert compared.tokens >= 350
    assert compared.accepted > 20
    assert compared.differing == 0


def test_every_rule_matters_to_these_texts() -> None:
    assert without_effect(24) == []


def test_rows_that_do_not_count_the_guesses_before_them_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: each row of a pass is drawn as if the guesses before it were not there."""
    right = History.changed

    def wrong(self: History, logits_KV: Tensor, end: int) -> Tensor:
        first = end - len(logits_KV) + 1
        return torch.cat([right(self, row_V[None], first) for row_V in logits_KV])

    monkeypatch.setattr(History, "changed", wrong)
    assert compare_logit_rules(100, names=["all"], whole=False).differing > 0


def test_two_shards_say_what_the_whole_model_says(tmp_path: Path) -> None:
    assert shards_differ(tmp_path, steps=12) == 0


def test_a_shard_that_does_not_know_the_text_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: the last shard forgets what it was told before this pass."""

    class Forgetful(History):
        def hold(self, position: int, ids: Sequence[int]) -> None:
            super().hold(0, [0] * position)
            super().hold(position, ids)

    monkeypatch.setattr("split.inference.shard.History", Forgetful)
    assert shards_differ(tmp_path, names=["all"], steps=12) > 0


def test_a_synthetic_engine_refuses_rules_by_name() -> None:
    engine = SyntheticEngine(
        vocabulary_size=300, context=64, sessions=1, step_seconds=0, row_seconds=0, agreement=1.0, sleep=lambda s: None
    )
    for name in RULES:
        with pytest.raises(ValueError, match="logit_bias, bad_words and schema must be off for a synthetic"):
            engine.open([1], samplings(name)[1])
    engine.open([1], Sampling.greedy()).close()
