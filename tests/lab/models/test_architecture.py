"""The name and the numbers that are shown are those of the model that is meant, not of the preset it was named over."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from lab.command.entry import compose_settings
from lab.doctor import DoctorSettings
from lab.models.architecture import LayerWeights, architecture_of, as_described, layer_weights_of
from lab.models.sources import load_model
from lab.settings import ModelSettings, Quantization, UserError
from split.plan import own_architecture
from split.planner import bytes_of_weight
from tests.folder_fuzz import good_folder
from tests.lab.models.gguf_files import write_gguf
from tests.lab.models.test_sources import CPU


def composed(*words: str) -> ModelSettings:
    return compose_settings("doctor", shlex.join(words), DoctorSettings).model


def test_a_folder_goes_by_its_own_name_and_numbers(tmp_path: Path) -> None:
    folder = good_folder("qwen2", tmp_path / "My Qwen (2)", num_hidden_layers=3, layer_types=["full_attention"] * 3)
    model = composed("model.source=path", f"model.path='{folder}'")
    assert (model.name, model.architecture.family, model.architecture.layers) == ("My Qwen (2)", "qwen2", 3)
    numbers = model.architecture
    assert (numbers.hidden_size, numbers.heads, numbers.kv_heads, numbers.head_dim) == (32, 4, 2, 8)
    assert (numbers.vocabulary, numbers.context, numbers.tied_embeddings) == (264, 256, False)
    named = composed("model.source=path", f"model.path='{folder}'", "model.name=mine")
    assert (named.name, named.architecture) == ("mine", numbers)


def test_a_gguf_file_of_ones_own(tmp_path: Path) -> None:
    file, _ = write_gguf(tmp_path / "small-model.gguf")
    model = composed("model.package=null", f"model.path={file}", f"model.cache_dir={tmp_path / 'cache'}")
    assert (model.name, model.architecture.layers, model.architecture.vocabulary) == ("small-model", 1, 259)
    assert not (tmp_path / "cache").exists(), "nothing is converted for it"
    assert architecture_of(load_model(model, CPU).model.config).layers == 1


def test_another_repository_than_the_presets() -> None:
    assert composed("model=tinyllama", "model.repo=someone/other").name == "other"
    assert composed("model.source=hub", "model.repo=someone/other").name == "other"


@pytest.mark.parametrize("preset", ["smollm2_135m", "random", "tinyllama", "llama3_70b"])
def test_presets_stay_as_they_are(preset: str) -> None:
    model = composed(f"model={preset}")
    assert as_described(replace(model, name="x")) == replace(model, name="x")


def test_a_folder_that_cannot_be_read_is_left_to_its_loader(tmp_path: Path) -> None:
    model = composed("model.source=path", f"model.path={tmp_path}/nowhere")
    assert model.name == "nowhere"
    with pytest.raises(UserError, match=r"^model.path must "):
        own_architecture(model)


SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


def test_the_planner_counts_the_layers_that_are_there() -> None:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    config = AutoConfig.for_model("mixtral", **SIZES, **experts)
    attention, router, mlp = 32 * 8 * (2 * 4 + 2 * 2), 32 * 4, 3 * 32 * 48
    assert layer_weights_of(config) == 2 * [LayerWeights(attention, router + 4 * mlp)]
    dense = AutoConfig.for_model("llama", **SIZES, num_key_value_heads=2)
    assert layer_weights_of(dense) == 2 * [LayerWeights(attention + mlp, 0)]


@pytest.mark.parametrize(("kind", "sizes", "kv_heads"), [
    ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, 4),
    ("falcon", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "multi_query": True}, 1),
])  # fmt: skip
def test_families_with_other_words(kind: str, sizes: dict[str, Any], kv_heads: int) -> None:
    numbers = architecture_of(AutoConfig.for_model(kind, **sizes))
    assert (numbers.layers, numbers.hidden_size, numbers.heads, numbers.kv_heads) == (2, 32, 4, kv_heads)
    assert numbers.intermediate_size == 128


@pytest.mark.parametrize(("kind", "head_dim", "is_tied"), [("gemma4_text", 512, True), ("inkling_text", 128, False)])
def test_values_that_differ_by_layer_or_are_not_there(kind: str, head_dim: int, is_tied: bool, tmp_path: Path) -> None:
    """The largest layer's counts, since the numbers are there to plan for memory."""
    AutoConfig.for_model(kind).save_pretrained(tmp_path / "own")
    numbers = composed("model.source=path", f"model.path={tmp_path / 'own'}").architecture
    assert (numbers.family, numbers.head_dim, numbers.tied_embeddings) == (kind, head_dim, is_tied)


def test_the_planner_counts_in_4_bits_only_what_nf4_packs(tmp_path: Path) -> None:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **SIZES, **experts)).save_pretrained(
        tmp_path / "own"
    )
    words = ("model.source=path", f"model.path={tmp_path / 'own'}", "model.dtype=bfloat16")
    attention, others, norms = 32 * 8 * (2 * 4 + 2 * 2), 32 * 4 + 4 * 3 * 32 * 48, 2 * 32
    packed = own_architecture(composed(*words, "model.quantization=nf4"))
    assert packed.layer_bytes == attention * bytes_of_weight(Quantization.nf4, 2) + 2 * (others + norms)
    assert own_architecture(composed(*words, "model.quantization=none")).layer_bytes == 2 * (attention + others + norms)
