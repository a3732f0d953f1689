"""Shards with an adapter say what PEFT says on the whole model, as a text of the engine, in 4 bits too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from lab.models.conversion import byte_tokenizer
from lab.models.fingerprints import weights_fingerprints
from lab.models.sources import load_model
from lab.settings import ModelSettings, Quantization, UserError
from split.chain.boundary import Boundary
from split.inference.shard import Shard, load_shard
from split.inference.stage import InferenceStage
from split.transport.inproc import InProcess
from tests.lab.models.adapters import make_adapter
from tests.split.chains import LIMITS, SAMPLED, as_engine, local_engine, saved_model, some_ids

CPU = torch.device("cpu")


def shards_of(settings: ModelSettings) -> list[Shard]:
    return [load_shard(settings, CPU, layers, LIMITS) for layers in (range(0, 1), range(1, 4))]


def step_of(engine: Any) -> tuple[Any, Any]:
    step = engine.open(some_ids(9, 1), SAMPLED).step
    return step.next_ids, step.next_nll


@pytest.mark.parametrize("quantization", Quantization)
def test_shards_say_what_peft_says(quantization: Quantization, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    base = saved_model("llama", tmp_path / "base", hidden_size=64, head_dim=16)
    byte_tokenizer().save_pretrained(tmp_path / "base")
    settings = replace(base, quantization=quantization)
    replaced = {} if quantization.bits else {"modules_to_save": ["lm_head"]}
    made = make_adapter(tmp_path / "base", tmp_path / "made", use_rslora=True, **replaced)
    if quantization is Quantization.none:
        whole: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    else:
        whole = load_model(settings, CPU).model
    plain = step_of(local_engine(whole))
    expected = step_of(local_engine(peft.PeftModel.from_pretrained(whole, made)))
    adapted = shards_of(replace(settings, adapter=str(made)))
    assert step_of(as_engine(InProcess([InferenceStage(shard, Boundary.float32) for shard in adapted]))) == expected
    assert expected != plain, "the adapter changes nothing"
    if quantization is not Quantization.none:
        wide = shards_of(replace(base, adapter=str(made)))
        assert sum(shard.weights_bytes for shard in adapted) < 0.6 * sum(shard.weights_bytes for shard in wide)


@pytest.mark.parametrize("quantization", [Quantization.int8, Quantization.int4])
@pytest.mark.parametrize("changes", [{"modules_to_save": ["lm_head"]}, {"use_dora": True}])
def test_what_needs_float_weights_is_refused_over_packed_ones(
    quantization: Quantization, changes: dict[str, Any], tmp_path: Path
) -> None:
    base = saved_model("llama", tmp_path / "base", hidden_size=64, head_dim=16)
    byte_tokenizer().save_pretrained(tmp_path / "base")
    made = make_adapter(tmp_path / "base", tmp_path / "made", **changes)
    settings = replace(base, quantization=quantization, adapter=str(made))
    [key] = changes
    with pytest.raises(UserError, match=f"must be none or nf4 for an adapter with {key}=.*, got {quantization.name}"):
        shards_of(settings)


def test_the_handshake_covers_the_adapter(tmp_path: Path) -> None:
    settings = saved_model("llama", tmp_path / "base")
    prints = [weights_fingerprints(settings)["adapter"]]
    for number, changes in enumerate(({}, {"lora_alpha": 64}, {"use_rslora": True})):
        made = make_adapter(tmp_path / "base", tmp_path / f"{number}", **changes)
        prints.append(weights_fingerprints(replace(settings, adapter=str(made)))["adapter"])
    assert prints[0] == "none"
    assert len(set(prints)) == 4
