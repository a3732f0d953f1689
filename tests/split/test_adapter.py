"""An adapter merged slice by slice against PEFT's own merge of the whole model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from lab.lora import apply_adapter
from lab.models import byte_tokenizer, load_model
from lab.settings import Quantization, UserError
from split.boundary import Boundary
from split.shard import load_shard
from split.stage import Stage
from split.transport.inproc import InProcess
from tests.split.chains import LIMITS, SAMPLED, as_engine, local_engine, saved_model, some_ids


def _adapter(base: Path, folder: Path) -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)


def test_slices_have_the_weights_of_the_whole_merge(tmp_path: Path) -> None:
    settings = saved_model("llama", tmp_path / "base")
    _adapter(tmp_path / "base", tmp_path / "adapter")
    whole = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    ).merge_and_unload()
    adapted = replace(settings, adapter=str(tmp_path / "adapter"))
    moved = 0
    for layers in (range(0, 1), range(1, 3), range(3, 4)):
        slice_ = load_shard(adapted, torch.device("cpu"), layers, LIMITS)._model
        plain = load_shard(settings, torch.device("cpu"), layers, LIMITS)._model
        for index in layers:
            for name in ("self_attn.q_proj", "mlp.down_proj", "self_attn.k_proj"):
                merged = slice_.get_submodule(f"model.layers.{index - layers.start}.{name}").weight
                torch.testing.assert_close(merged, whole.get_submodule(f"model.layers.{index}.{name}").weight)
                before = plain.get_submodule(f"model.layers.{index - layers.start}.{name}").weight
                moved += not torch.equal(merged, before)
    assert moved == 8


def test_an_adapter_beside_4_bits_says_what_peft_says_on_the_whole_model(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    sizes = {"hidden_size": 64, "head_dim": 16}
    settings = replace(saved_model("llama", tmp_path / "base", **sizes), quantization=Quantization.nf4)
    byte_tokenizer().save_pretrained(tmp_path / "base")
    _adapter(tmp_path / "base", tmp_path / "adapter")
    whole = load_model(settings, torch.device("cpu"))
    plain = local_engine(whole.model).open(some_ids(9, 1), SAMPLED).step
    expected = local_engine(apply_adapter(whole, str(tmp_path / "adapter"))).open(some_ids(9, 1), SAMPLED).step
    adapted = replace(settings, adapter=str(tmp_path / "adapter"))
    slices = [load_shard(adapted, torch.device("cpu"), layers, LIMITS) for layers in (range(0, 1), range(1, 4))]
    split = as_engine(InProcess([Stage(shard, Boundary.float32) for shard in slices]))
    step = split.open(some_ids(9, 1), SAMPLED).step
    assert step is not None
    assert expected is not None
    assert plain is not None
    assert (step.next_ids, step.next_nll) == (expected.next_ids, expected.next_nll)
    assert step.next_nll != plain.next_nll, "the adapter changes nothing"
    assert sum(shard.weights_bytes for shard in slices) < 0.6 * sum(
        load_shard(
            replace(settings, quantization=Quantization.none), torch.device("cpu"), shard.layers, LIMITS
        ).weights_bytes
        for shard in slices
    )


def test_other_kinds_of_adapters_are_refused(tmp_path: Path) -> None:
    settings = saved_model("llama", tmp_path / "base")
    _adapter(tmp_path / "base", tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    dora = json.loads(config.read_text()) | {"use_dora": True}
    config.write_text(json.dumps(dora))
    for folder, message in ((tmp_path / "adapter", "use_dora"), (tmp_path / "base", "must be a PEFT folder")):
        with pytest.raises(UserError, match=message):
            load_shard(replace(settings, adapter=str(folder)), torch.device("cpu"), range(0, 4), LIMITS)
