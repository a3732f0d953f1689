"""A verifier whose target is split: the same text as a whole one gives, and what is refused before."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lab.command.entry import compose_settings
from lab.engine.sampling import Sampling
from lab.settings import UserError
from speculative.request import Ending, GenerationRequest, Verdict
from speculative.settings import Mode, SpeculativeSettings
from speculative.verifier.scheduler import Scheduler
from speculative.verifier.target import open_target
from split.chain.boundary import Boundary
from split.inference.open import INFERENCE, fingerprints, load_stage
from split.settings import SplitSettings
from tests.speculative.in_process import LIMITS
from tests.split.processes import Process


def _text(settings: SpeculativeSettings) -> list[int]:
    """What a verifier writes, with guesses that are right, wrong and late offered to it."""
    target = open_target(settings, torch.device("cpu"))
    verifier = Scheduler(target.engine, end_ids=[], limits=replace(LIMITS, prefill_chunk=16), closed=lambda *_: None)
    sampling = Sampling(seed=3, temperature=0.8, top_k=50, top_p=0.95)
    request = GenerationRequest(
        prompt_ids=list(b"def main():"), sampling=sampling, max_new_tokens=40, mode=Mode["async"], threshold=None
    )
    assert verifier.open("text", request, client="client") == []
    written: list[int] = []
    guessed = False
    ended = False
    while not ended:
        for outcome in verifier.tick():
            ended = ended or isinstance(outcome, Ending)
            if isinstance(outcome, Verdict):
                written += outcome.ids
                if not guessed and len(written) > 4:
                    verifier.offer("text", outcome.epoch, len(request.prompt_ids) + len(written), [1, 2, 3], 0.0)
                    guessed = True
    verifier.shutdown()
    return written


def test_a_split_target_writes_the_text_of_a_whole_one(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    words = f"model=random model.cache_dir={tmp_path} project.context=256"
    shards: Any = compose_settings("split_inf", words, SplitSettings)
    with contextlib.ExitStack() as stack:
        side = INFERENCE.endpoint(shards.network, fingerprints(shards.model, Boundary.float32), "shard")
        addresses = [
            stack.enter_context(Process(load_stage(shards, torch.device("cpu"), layers).shard, ours=side)).address
            for layers in (range(0, 1), range(1, 4))
        ]
        names = ",".join(map(str, addresses))
        split = compose_settings(
            "spec_decoding", f"{words} project.engine=split 'project.split.shards=[{names}]'", SpeculativeSettings
        )
        assert _text(split) == _text(compose_settings("spec_decoding", words, SpeculativeSettings))


def test_a_split_target_wants_shards_and_no_exact_shapes() -> None:
    with pytest.raises(UserError, match=r"project\.split\.shards must name at least one"):
        compose_settings("spec_decoding", "project.engine=split", SpeculativeSettings)
    for engine in ("split", "synthetic"):
        words = f"project.engine={engine} 'project.split.shards=[a:1]' project.exact_shapes=true"
        with pytest.raises(UserError, match=rf"project\.exact_shapes must be false for engine={engine}"):
            compose_settings("spec_decoding", words, SpeculativeSettings)
