"""Adapters on whole models and on slices say what PEFT says, or are refused."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig, PreTrainedConfig

from lab import decode
from lab.command.entry import Run, compose_settings
from lab.decode import DecodeSettings
from lab.models.adapter import add_adapter, fit_adapter, read_adapter
from lab.models.conversion import byte_tokenizer
from lab.models.peft_folder import IDENTITY_KEY, folder_digest
from lab.models.sources import load_config, load_model, model_identity
from lab.settings import ModelSettings, Quantization, UserError
from tests.lab.models.adapters import CPU, IDS_BT, fuzz, make_adapter, peft_says, sample_of_changes, slices_say
from tests.split.chains import VOCABULARY, saved_model

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rank pattern": {"rank_pattern": {"q_proj": 8, "layers.2.mlp.down_proj": 2}},
    "alpha pattern": {"alpha_pattern": {r".*layers\.[12]\..*q_proj": 64}},
    "dora": {"use_dora": True},
    "regex": {"target_modules": r".*layers\.[02]\.self_attn\.(q|k)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "PEFT's own choice": {"target_modules": None},
    "one layer": {"layers_to_transform": [3]},
    "one layer by pattern": {"layers_to_transform": 0, "layers_pattern": "layers"},
    "excluded": {"exclude_modules": ["model.layers.0.self_attn.q_proj"]},
    "saved head": {"modules_to_save": ["lm_head"]},
    "saved embedding and norm": {"modules_to_save": ["embed_tokens", "model.norm"]},
    "saved layer": {"modules_to_save": ["layers.2"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["lm_head"]},
    "lora bias": {"lora_bias": True},
    "all biases": {"bias": "all"},
    "own biases": {"bias": "lora_only"},
    "tokens": {"trainable_token_indices": [1, 5]},
    "parameters": {"target_parameters": ["mlp.up_proj.weight"], "target_modules": []},
    "gaussian": {"init_lora_weights": "gaussian"},
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelSettings]:
    """Qwen2 has biases; Llama ties its head to its embedding here."""
    place = tmp_path_factory.mktemp("models")
    return {
        "qwen2": saved_model("qwen2", place / "qwen2"),
        "tied": saved_model("llama", place / "tied", tie_word_embeddings=True),
        "bfloat16": saved_model("qwen2", place / "bfloat16", torch.bfloat16),
    }


@pytest.fixture
def settings(models: dict[str, ModelSettings]) -> ModelSettings:
    return models["qwen2"]


@pytest.fixture
def folder(settings: ModelSettings, tmp_path: Path) -> Path:
    """A plain adapter, with the record of its base."""
    made = make_adapter(Path(str(settings.path)), tmp_path / "adapter")
    (made / "lab_adapter.json").write_text(json.dumps({IDENTITY_KEY: model_identity(settings)}))
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_slices_say_what_peft_says_of_the_whole_model(
    kind: str, models: dict[str, ModelSettings], tmp_path: Path
) -> None:
    """To the bit, in 16 bits too, where an adapter that was merged into the weights would be rounded."""
    concerned = {"saved embedding and norm", "embedding", "saved head"}
    for name in ("qwen2", *(["tied", "bfloat16"] if kind in concerned else [])):
        settings = models[name]
        made = make_adapter(Path(str(settings.path)), tmp_path / name, **KINDS[kind])
        expected = peft_says(settings, made)
        assert not torch.equal(expected, peft_says(settings, None)), "the adapter changes nothing"
        assert torch.equal(slices_say(settings, made, (0, 1, 3, 4)), expected), name


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "pissa": ({"init_lora_weights": "pissa"}, "must have init_lora_weights of .*, got 'pissa'"),
    "olora": ({"init_lora_weights": "olora"}, "must have init_lora_weights of .*, got 'olora'"),
    "alora": ({"alora_invocation_tokens": [1, 2]}, "must not set alora_invocation_tokens"),
    "kasa": ({"kasa_config": {}}, "must not set kasa_config"),
    "another task": ({"task_type": "SEQ_CLS"}, "must have task_type=CAUSAL_LM"),
    "tied adapters": ({"ensure_weight_tying": True}, "must not set ensure_weight_tying"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_supported_is_refused_by_name(kind: str, settings: ModelSettings, tmp_path: Path) -> None:
    changes, message = REFUSED[kind]
    made = make_adapter(Path(str(settings.path)), tmp_path / "made", **changes)
    with pytest.raises(UserError, match=f"^model.adapter {message}.*"):
        read_adapter(made)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("use_new_thing", True, "must not set use_new_thing, .* got True"),
        ("use_new_thing", None, None),
        ("peft_type", "IA3", "must have peft_type=LORA, got 'IA3'"),
        ("layer_replication", [[0, 2]], "must not set layer_replication"),
        ("r", "8", "must have a r of PEFT's type, got '8'"),
        ("lora_alpha", float("inf"), "must fit the base model, .*the scale of .* is inf"),
        ("target_modules", ["c_attn"], "must fit the base model, .*c_attn"),
    ],
)
def test_keys_of_the_config(folder: Path, settings: ModelSettings, key: str, value: Any, message: str | None) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {key: value}))
    if message is None:
        fit_adapter(read_adapter(folder), load_config(settings))
        return
    with pytest.raises(UserError, match=f"^model.adapter {message}"):
        fit_adapter(read_adapter(folder), load_config(settings))


def test_rows_of_a_tied_embedding_need_the_whole_model(models: dict[str, ModelSettings], tmp_path: Path) -> None:
    settings = models["tied"]
    made = make_adapter(Path(str(settings.path)), tmp_path / "made", trainable_token_indices=[1, 5])
    assert torch.equal(slices_say(settings, made, (0, 4)), peft_says(settings, made))
    with pytest.raises(UserError, match="must not have trainable_token_indices where a tied model is split"):
        slices_say(settings, made, (0, 2, 4))


def test_a_pattern_that_matches_nothing_is_said(
    settings: ModelSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = make_adapter(Path(str(settings.path)), tmp_path / "made", rank_pattern={"q_prj": 8})
    with caplog.at_level(logging.WARNING):
        fit_adapter(read_adapter(made), load_config(settings))
    assert caplog.text.count("rank_pattern keys did not match any targeted module and were ignored: ['q_prj']") == 1


def test_any_change_of_a_folder_says_what_peft_says_or_is_refused(settings: ModelSettings, tmp_path: Path) -> None:
    """A sample; `python -m tests.soak adapters_changed` tries all of them."""
    outcomes = fuzz(settings, tmp_path, sample_of_changes(30, seed=4))
    assert outcomes.wrong == []
    assert outcomes.broken == []
    assert outcomes.same > 1
    assert outcomes.refused > 15


def test_the_fuzz_notices_a_scale_that_is_not_read(
    settings: ModelSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its control: a reader that takes every rank-stabilised adapter for a plain one."""
    from peft.tuners.lora import LoraModel

    class Careless(LoraModel):  # type: ignore[misc]  # PEFT ships no types
        def __init__(self, model: Any, config: Any, name: str) -> None:
            config.use_rslora = False
            super().__init__(model, config, name)

    monkeypatch.setattr("lab.models.adapter.LoraModel", Careless)
    outcomes = fuzz(settings, tmp_path, [("patterns", "nothing", lambda folder: None)])
    assert len(outcomes.wrong) == 1


def test_the_digest_covers_config_and_all_weights(folder: Path, tmp_path: Path) -> None:
    first = folder_digest(folder)
    shutil.copytree(folder, tmp_path / "copy")
    config = tmp_path / "copy" / "adapter_config.json"
    found = json.loads(config.read_text())
    config.write_text(json.dumps(found | {"base_model_name_or_path": "/elsewhere", "inference_mode": False}))
    assert folder_digest(tmp_path / "copy") == first, "what only records where it comes from"
    config.write_text(json.dumps(found | {"lora_alpha": 64}))
    assert folder_digest(tmp_path / "copy") != first
    config.write_text(json.dumps(found))
    weights = tmp_path / "copy" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert folder_digest(tmp_path / "copy") != first


def says(settings: ModelSettings, folder: Path) -> torch.Tensor:
    """The logits of a whole model that this lab loaded, with an adapter."""
    base = load_model(settings, CPU)
    add_adapter(base.model, replace(settings, adapter=str(folder)))
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    with torch.inference_mode():
        return torch.as_tensor(base.model(IDS_BT).logits)


def test_a_whole_model_says_the_same_in_all_precisions(models: dict[str, ModelSettings], tmp_path: Path) -> None:
    for name, settings in models.items():
        byte_tokenizer().save_pretrained(str(settings.path))
        made = make_adapter(Path(str(settings.path)), tmp_path / name, use_rslora=True)
        assert torch.equal(says(settings, made), peft_says(settings, made)), name


def test_beside_4_bits(models: dict[str, ModelSettings], tmp_path: Path) -> None:
    """Scale and pattern count there as well; against PEFT on the quantised whole model."""
    base = saved_model("llama", tmp_path / "base", hidden_size=64, head_dim=16)
    byte_tokenizer().save_pretrained(tmp_path / "base")
    settings = replace(base, quantization=Quantization.nf4)
    made = make_adapter(tmp_path / "base", tmp_path / "made", use_rslora=True, alpha_pattern={"q_proj": 40})
    whole = load_model(settings, CPU).model
    with torch.inference_mode():
        expected = peft.PeftModel.from_pretrained(whole, made).eval()(IDS_BT).logits
    assert torch.equal(slices_say(settings, made, (0, 1, 4)), expected)


def test_another_base_model(settings: ModelSettings, folder: Path) -> None:
    slices_say(settings, folder, (0, 4))
    (folder / "lab_adapter.json").write_text(json.dumps({IDENTITY_KEY: "random:other"}))
    message = f"^model.adapter must belong to base model {model_identity(settings)}, got '.*' trained on random:other$"
    with pytest.raises(UserError, match=message):
        slices_say(settings, folder, (0, 4))
    (folder / "lab_adapter.json").unlink()
    slices_say(settings, folder, (0, 4))  # one that does not say is let through


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors", "all"])
def test_no_adapter_folder(folder: Path, missing: str) -> None:
    if missing == "all":
        shutil.rmtree(folder)
    else:
        (folder / missing).unlink()
    for read in (read_adapter, folder_digest):
        with pytest.raises(UserError, match=r"^model.adapter must be a PEFT folder \(.*\), got '.+'$"):
            read(folder)


@pytest.mark.parametrize("change", ["unknown", "missing", "cut"])
def test_tensors_that_do_not_fit(settings: ModelSettings, folder: Path, change: str) -> None:
    """Each slice refuses them, also where they belong to another one. PEFT itself takes the first two."""
    tensors = load_file(folder / "adapter_model.safetensors")
    name = min(tensors)
    odd = name.replace("layers.0", "layers.7")
    value = tensors[name] if change == "unknown" else tensors.pop(name)
    if change == "unknown":
        tensors[odd] = value.clone()
    elif change == "cut":
        tensors[name] = value[:2].contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    message = {
        "unknown": rf"\(1 tensors are unknown or missing, {odd} first\)$",
        "missing": rf"\(1 tensors are unknown or missing, {name} first\)$",
        "cut": "size mismatch",
    }
    with pytest.raises(UserError, match=rf"^model.adapter must fit the base model, got '.+' .*{message[change]}"):
        slices_say(settings, folder, (0, 1, 4))


def test_lab_decode_reads_it(tmp_path: Path) -> None:
    """A sweep over adapters measured the base, and a folder that is not there was no error."""
    words = f"model=random model.cache_dir={tmp_path} project.context=32 project.max_new_tokens=2 tracking=none"
    settings = compose_settings("decode", f"{words} model.adapter=/not/there", DecodeSettings)
    with pytest.raises(UserError, match=r"^model\.adapter must be a PEFT folder"):
        decode.run(settings, Run(tmp_path / "run"))


_SMALL = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None}
_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
FAMILIES: dict[str, tuple[PreTrainedConfig, list[dict[str, Any]]]] = {
    "gpt2": (  # matrices that are stored turned, and a tied embedding
        GPT2Config(n_embd=32, n_layer=4, n_head=4, n_positions=64, **_SMALL),
        [
            {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"},
            {"target_modules": ["wte", "wpe", "c_fc"], "modules_to_save": ["ln_f"]},
        ],
    ),
    "mixtral": (  # experts that are one parameter
        MixtralConfig(
            hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
            num_local_experts=4, **_SMALL,
        ),
        [{"target_parameters": _EXPERTS, "rank_pattern": {"layers.1.mlp.experts.down_proj": 2}}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(family: str, settings: ModelSettings, tmp_path: Path) -> None:
    config, kinds = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    base = replace(settings, name=family, path=str(tmp_path / "base"))
    for number, changes in enumerate(kinds):
        made = make_adapter(tmp_path / "base", tmp_path / f"{number}", **{"target_modules": ["q_proj"]} | changes)
        expected = peft_says(base, made)
        assert not torch.equal(expected, peft_says(base, None)), "the adapter changes nothing"
        assert torch.equal(slices_say(base, made, (0, 1, 3, 4)), expected), changes


def test_an_adapter_of_experts_that_were_modules_once(settings: ModelSettings, tmp_path: Path) -> None:
    """Saved before transformers 5 fused them: PEFT puts the matrices of all experts together."""
    config, _ = FAMILIES["mixtral"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
        made = make_adapter(tmp_path / "base", tmp_path / "made", target_modules=["q_proj"])
        tensors = load_file(made / "adapter_model.safetensors")
        for layer, expert in itertools.product(range(4), range(4)):
            for name, (entering, leaving) in {"w1": (32, 48), "w2": (48, 32), "w3": (32, 48)}.items():
                place = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                tensors[f"{place}.lora_A.weight"] = torch.randn(4, entering)
                tensors[f"{place}.lora_B.weight"] = torch.randn(leaving, 4)
    save_file(tensors, made / "adapter_model.safetensors")
    written = json.loads((made / "adapter_config.json").read_text()) | {"target_modules": ["q_proj", "w1", "w2", "w3"]}
    (made / "adapter_config.json").write_text(json.dumps(written))
    base = replace(settings, name="mixtral", path=str(tmp_path / "base"))
    assert torch.equal(slices_say(base, made, (0, 1, 3, 4)), peft_says(base, made))
