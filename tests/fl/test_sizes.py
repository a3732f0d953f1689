import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fl import sizes
from fl.settings import FederatedSettings, WireDtype
from fl.sizes import adapter_bytes, base_bytes
from lab.command.entry import compose_settings
from lab.models.lora import lora_config
from lab.models.sources import load_config
from lab.settings import ArchitectureSettings, ModelSettings
from tests.in_process import exit_code


def settings_of(model: str) -> FederatedSettings:
    return compose_settings("fed_learn", f"model={model}", FederatedSettings)


def from_numbers(model: ModelSettings) -> PreTrainedModel:
    """transformers' own model of that family and those numbers, without memory for its weights."""
    numbers = model.architecture
    config = AutoConfig.for_model(
        numbers.family,
        vocab_size=numbers.vocabulary,
        hidden_size=numbers.hidden_size,
        intermediate_size=numbers.intermediate_size,
        num_hidden_layers=numbers.layers,
        num_attention_heads=numbers.heads,
        num_key_value_heads=numbers.kv_heads,
        head_dim=numbers.head_dim,
        tie_word_embeddings=numbers.tied_embeddings,
    )
    with torch.device("meta"):
        skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return skeleton


def counted(settings: FederatedSettings, skeleton: PreTrainedModel) -> tuple[int, int]:
    """Values of a real adapter, and of the model below it."""
    base = sum(parameter.numel() for parameter in skeleton.parameters())
    with torch.device("meta"):
        model = get_peft_model(skeleton, lora_config(settings.model.lora_targets, settings.project.lora))
    return sum(p.numel() for p in model.parameters() if p.requires_grad), base


@pytest.mark.parametrize("model", ["random", "smollm2_135m", "tinyllama", "llama3_8b", "llama3_70b", "qwen3_0_6b"])
def test_sizes_are_those_of_a_real_skeleton_these_numbers(model: str) -> None:
    settings = settings_of(model)
    adapter, base = counted(settings, from_numbers(settings.model))
    rank = settings.project.lora.rank
    assert adapter_bytes(settings.model, rank, WireDtype.float32) == 4 * adapter
    assert adapter_bytes(settings.model, rank, WireDtype.bfloat16) == 2 * adapter
    assert adapter_bytes(settings.model, 2 * rank, WireDtype.bfloat16) == 4 * adapter
    assert base_bytes(settings.model) == 2 * base


@pytest.mark.parametrize("targets", [["q_proj"], ["v_proj", "down_proj"]])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_sizes_of_other_families_numbers_and_targets(family: str, tied: bool, targets: list[str]) -> None:
    settings = settings_of("random")
    numbers = ArchitectureSettings(
        family=family, layers=3, hidden_size=48, intermediate_size=80, heads=6, kv_heads=2, vocabulary=101, context=64,
        head_dim=8 if family == "qwen2" else 16,  # Qwen2 has no other than hidden_size / heads
        tied_embeddings=tied,
    )  # fmt: skip
    model = replace(settings.model, architecture=numbers, lora_targets=targets)
    adapter, base = counted(replace(settings, model=model), from_numbers(model))
    assert adapter_bytes(model, settings.project.lora.rank, WireDtype.float32) == 4 * adapter
    assert base_bytes(model) == 2 * base


@pytest.mark.parametrize("model", ["random", "smollm2_135m"])
def test_the_numbers_in_conf_are_those_of_the_model_itself(model: str) -> None:
    settings = settings_of(model)
    config = load_config(settings.model)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    assert counted(settings, skeleton) == counted(settings, from_numbers(settings.model))


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = exit_code(sizes.main, *words)
    out, err = capsys.readouterr()
    return code, (out or err).splitlines()[-1]


def test_the_command_says_what_travels_and_what_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, line = command(capsys, "model=llama3_8b")
    figures = json.loads(line)
    assert code == 0
    # q: 8 (4096 + 4096), v: 8 (4096 + 1024), 32 layers, 4 bytes
    assert figures["adapter_bytes"] == 32 * 8 * (8192 + 5120) * 4 == 13_631_488
    assert figures["base_bytes"] == 16_060_522_496
    code, line = command(capsys, "model=llama3_8b", "project.wire_dtype=bfloat16")
    assert json.loads(line)["adapter_bytes"] == 13_631_488 // 2
    code, line = command(capsys, "model=llama3_8b", "project.lora.rank=0")
    assert (code, line) == (2, "error: project.lora.rank must be at least 1, got 0")
    code, line = command(capsys, "model=llama3_8b", "model.lora_targets=[c_attn]")
    assert code == 2
    assert line.startswith("error: model.lora_targets must be among ['down_proj', ")
