"""A model's folder gives what transformers itself makes of it, or one line that says what is wrong with it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from lab.command.entry import compose_settings
from lab.models import conversion
from lab.models import sources as models
from lab.models.folder import INDEX, SINGLE, ModelFolder
from lab.models.layers import load_layers
from lab.models.quantized import Shapes, Unreadable, WeightFormat, find_weight_format
from lab.models.slices import run_slice
from lab.models.twin import twin_model
from lab.settings import ModelSettings, Quantization, UserError
from split.settings import SplitSettings
from tests.architectures import config_of
from tests.folder_fuzz import IDS, fuzz_folders, good_folder, judge
from tests.random_models import random_model

CPU = torch.device("cpu")
Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in several files."""
    return good_folder("llama", tmp_path_factory.mktemp("good") / "llama")


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    copy = tmp_path / "model"
    shutil.copytree(good, copy)
    return copy


@pytest.fixture
def alone(folder: Path) -> Path:
    """The same in one file without an index."""
    tensors = ModelFolder(folder).read(ModelFolder(folder).files)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    for file in [*folder.glob("model-*.safetensors"), folder / INDEX]:
        file.unlink()
    return folder


def settings_of(folder: Path, **values: Any) -> ModelSettings:
    words = "model.source=path model.path=nowhere model.quantization=none model.dtype=float32"
    composed = compose_settings("split_inf", words, SplitSettings).model
    return replace(composed, path=str(folder), cache_dir=str(folder.parent / "cache"), **values)


def logits(folder: Path, **values: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = models.load_model(settings_of(folder, **values), CPU).model(IDS).logits
    return found


def in_slices(folder: Path) -> torch.Tensor:
    settings = settings_of(folder)
    first = load_layers(settings, CPU, range(2), embedding=True, head=False)
    second = load_layers(settings, CPU, range(2, 4), embedding=False, head=True)
    with torch.inference_mode():
        return run_slice(second, run_slice(first, IDS))


def oracle(folder: Path, **options: Any) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False, **options)
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def refusal(folder: Path, **values: Any) -> str:
    with pytest.raises(UserError) as caught:
        models.load_model(settings_of(folder, **values), CPU)
    line = str(caught.value)
    assert "\n" not in line
    return line


# which files count


def test_shards_of_an_earlier_save_do_not_count(folder: Path) -> None:
    other = random_model("llama", torch.float32)
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(2)
    other.save_pretrained(folder.parent / "earlier", max_shard_size="20KB")
    for file in (folder.parent / "earlier").glob("*.safetensors"):
        if not (folder / file.name).exists():
            shutil.copy(file, folder)
    assert torch.equal(logits(folder), oracle(folder))


def test_a_stray_file_beside_a_single_one_does_not_count(alone: Path) -> None:
    other = {name: -tensor for name, tensor in load_file(alone / SINGLE).items()}
    save_file(other, alone / "old_model.safetensors", metadata={"format": "pt"})
    before = models.model_identity(settings_of(alone))
    assert torch.equal(logits(alone), oracle(alone))
    (alone / "old_model.safetensors").unlink()
    assert models.model_identity(settings_of(alone)) == before


def test_a_single_file_goes_before_an_index(folder: Path) -> None:
    tensors = ModelFolder(folder).read(ModelFolder(folder).files)
    save_file({name: 0.5 * tensor for name, tensor in tensors.items()}, folder / SINGLE, metadata={"format": "pt"})
    assert torch.equal(logits(folder), oracle(folder))


def test_weights_without_a_known_name_are_refused(alone: Path) -> None:
    (alone / SINGLE).rename(alone / "weights.safetensors")
    assert refusal(alone).startswith("model.path must be a folder with config.json and safetensors, got ")


def test_a_pickle_is_not_read(alone: Path) -> None:
    torch.save(load_file(alone / SINGLE), alone / "pytorch_model.bin")
    (alone / SINGLE).unlink()
    assert refusal(alone).startswith("model.path must be a folder with config.json and safetensors, got ")


def _name_twice(folder: Path) -> None:
    first, second = ModelFolder(folder).weight_files[:2]
    repeated = load_file(folder / first)
    save_file(load_file(folder / second) | repeated, folder / second, metadata={"format": "pt"})


def _index(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    described = json.loads((folder / INDEX).read_text())
    change(described["weight_map"])
    (folder / INDEX).write_text(json.dumps(described))


INDICES: dict[str, tuple[Change, str]] = {
    "a name in two files": (_name_twice, "must have an index that says what each file holds"),
    "a file that is gone": (
        lambda folder: (folder / ModelFolder(folder).weight_files[1]).unlink(),
        "must have all files that its index names",
    ),
    "a tensor too many": (
        lambda folder: _index(folder, lambda names: names.update({"model.extra.weight": min(names.values())})),
        "must have an index that says what each file holds",
    ),
    "a file elsewhere": (
        lambda folder: _index(folder, lambda names: names.update({min(names): "../other.safetensors"})),
        "must have an index that names a file of the folder for each tensor",
    ),
    "no map": (lambda folder: edit(folder / INDEX, weight_map=[]), "must have an index that names a file"),
    "no JSON": (lambda folder: (folder / INDEX).write_text("{"), f"must have a {INDEX} that is JSON"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "rule"), INDICES.values(), ids=INDICES)
def test_an_index_that_is_wrong_is_refused(folder: Path, change: Change, rule: str) -> None:
    change(folder)
    assert refusal(folder).startswith(f"model.path {rule}")


def test_a_file_cut_short_is_refused(folder: Path) -> None:
    file = folder / ModelFolder(folder).weight_files[-1]
    os.truncate(file, file.stat().st_size - 1)
    assert refusal(folder) == f"model.path must hold whole safetensors files, got {str(file)!r}"
    with pytest.raises(UserError, match="must hold whole safetensors files"):
        models.load_config(settings_of(folder))


# names and heads


def test_a_base_model_without_a_prefix(alone: Path) -> None:
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(alone / SINGLE).items()}
    save_file(tensors, alone / SINGLE, metadata={"format": "pt"})
    assert torch.equal(logits(alone), oracle(alone))


def test_a_head_of_its_own_beside_a_tied_config(alone: Path) -> None:
    edit(alone / "config.json", tie_word_embeddings=True)
    own = logits(alone)
    assert torch.equal(own, oracle(alone))
    tensors = load_file(alone / SINGLE)
    del tensors["lm_head.weight"]
    save_file(tensors, alone / SINGLE, metadata={"format": "pt"})
    assert torch.equal(logits(alone), oracle(alone))
    assert not torch.equal(logits(alone), own), "the stored head was not used"
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, alone / SINGLE, metadata={"format": "pt"})
    assert torch.equal(logits(alone), oracle(alone))


def test_no_weight_is_invented(alone: Path) -> None:
    tensors = load_file(alone / SINGLE)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, alone / SINGLE, metadata={"format": "pt"})
    assert "got none named 'model.layers.2.mlp.up_proj.weight'" in refusal(alone)


# what config.json says


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another type": ({"model_type": "foo"}, "must have a config.json that transformers can read"),
    "no causal model": ({"model_type": "t5"}, ""),
    "layers of text": ({"num_hidden_layers": "four"}, ""),
    "an activation nobody has": ({"hidden_act": "foo"}, "must hold a model that transformers can load"),
    "other shapes": ({"intermediate_size": 48}, "must hold a model that transformers can load"),
    "a kernel of the hub": ({"attn_implementation": "kernels-community/x"}, "must ask for no other attention"),
    "other weights": ({"transformers_weights": "x.safetensors"}, "must have a config.json that names no weight files"),
    "code": (
        {"model_type": "foo", "auto_map": {"AutoConfig": "own.Config"}}, "must have a config.json that transformers",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("values", "rule"), CONFIGS.values(), ids=CONFIGS)
def test_a_config_that_cannot_be_read_is_refused(folder: Path, values: dict[str, Any], rule: str) -> None:
    edit(folder / "config.json", **values)
    assert refusal(folder).startswith(f"model.path {rule}")


def test_a_base_model_with_an_adapter_inside_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    assert refusal(folder).startswith("model.path must be a base model alone")


# what is stored quantised


def quantised(folder: Path, kind: str) -> Path:
    """The folder's matrices in float8 with a scale for each block, and beside it a folder with what they stand for."""
    plain, exact = load_file(folder / SINGLE), {}
    stored = dict(plain)
    for name in [name for name in plain if "proj" in name]:
        rows, columns = plain[name].shape
        block = (rows, columns) if kind == "single" else (16, 16)
        blocks = plain[name].reshape(rows // block[0], block[0], columns // block[1], block[1])
        scales = blocks.abs().amax((1, 3), keepdim=True) / 448
        packed = (blocks / scales).to(torch.float8_e4m3fn)
        exact[name] = (packed.float() * scales).reshape(rows, columns)
        stored |= {name: packed.reshape(rows, columns), f"{name}_scale_inv": scales[:, 0, :, 0].contiguous()}
    true = folder.parent / "true"
    shutil.copytree(folder, true)
    save_file(plain | exact, true / SINGLE, metadata={"format": "pt"})
    save_file(stored, folder / SINGLE, metadata={"format": "pt"})
    size = [128, 128] if kind == "single" else [16, 16]
    described = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": size}
    edit(folder / "config.json", quantization_config=described)
    return true


@pytest.mark.parametrize("kind", ["single", "blocks"])
def test_float8_is_dequantised_with_its_scales(alone: Path, kind: str) -> None:
    before = logits(alone)
    true = quantised(alone, kind)
    assert torch.equal(logits(alone), oracle(true))
    assert torch.equal(in_slices(alone), oracle(true))
    assert not torch.equal(logits(alone), before), "rounding to 8 bits changed nothing"
    assert refusal(alone, quantization=Quantization.nf4) == (
        "model.quantization must be none for a model that is stored as fp8, got nf4"
    )


def test_float8_without_fitting_scales_is_refused(alone: Path) -> None:
    quantised(alone, "blocks")
    tensors = load_file(alone / SINGLE)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {f"{name}_scale_inv": tensors[f"{name}_scale_inv"][:2]}, alone / SINGLE)
    assert "fp8 with scales of shape (2, 2)" in refusal(alone)
    save_file({key: value for key, value in tensors.items() if key != f"{name}_scale_inv"}, alone / SINGLE)
    assert "fp8 with no float scales" in refusal(alone)
    described = json.loads((alone / "config.json").read_text())
    del described["quantization_config"]
    (alone / "config.json").write_text(json.dumps(described))
    assert "in F8_E4M3 without a quantization_config" in refusal(alone)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_in_4_bits_stays_as_it_is(tmp_path: Path, kind: str) -> None:
    wide = good_folder("llama", tmp_path / "wide", hidden_size=64, intermediate_size=128, head_dim=16)
    packing = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=kind == "nf4",
    )  # fmt: skip
    options = {"dtype": torch.float32, "quantization_config": packing, "device_map": {"": "cpu"}}
    AutoModelForCausalLM.from_pretrained(wide, **options).save_pretrained(tmp_path / "packed")
    for file in wide.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "packed")
    expected = oracle(tmp_path / "packed")
    assert torch.equal(logits(tmp_path / "packed"), expected)
    assert torch.equal(in_slices(tmp_path / "packed"), expected)
    assert not torch.equal(logits(wide), expected)
    if kind == "nf4":
        assert torch.equal(logits(tmp_path / "packed", quantization=Quantization.nf4), expected)
    else:
        assert "stored as fp4" in refusal(tmp_path / "packed", quantization=Quantization.nf4)


WEIGHT = "model.layers.0.mlp.up_proj.weight"
EXPERTS = "model.layers.0.mlp.experts.down_proj"
IN_FP8 = {"quant_method": "fp8", "weight_block_size": [64, 64]}
IN_NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FP8: Shapes = {WEIGHT: ("F8_E4M3", (64, 64)), f"{WEIGHT}_scale_inv": ("F32", (1, 1))}
NF4: Shapes = {
    WEIGHT: ("U8", (2048, 1)), f"{WEIGHT}.absmax": ("U8", (64,)), f"{WEIGHT}.nested_absmax": ("F32", (1,)),
    f"{WEIGHT}.quant_state.bitsandbytes__nf4": ("U8", (90,)),
}  # fmt: skip
KINDS: dict[str, tuple[dict[str, Any] | None, Shapes]] = {
    "plain": (None, {WEIGHT: ("F32", (64, 64)), "h.0.attn.bias": ("U8", (1, 1, 8, 8))}),
    "fp8": (IN_FP8, FP8),
    "nf4": (IN_NF4, NF4),
}


def kind_of(described: dict[str, Any] | None, here: Shapes, index: Collection[str]) -> str:
    config = LlamaConfig() if described is None else LlamaConfig(quantization_config=described)
    return find_weight_format(config, here, index).name


@pytest.mark.parametrize("strange", [
    {EXPERTS: ("F8_E4M3", (4, 64, 64)), f"{EXPERTS}_scale_inv": ("F32", (4, 1, 1))},
    {EXPERTS: ("F8_E5M2", (4, 64, 64))},
    {EXPERTS: ("I8", (4, 64, 64))},
    {f"{EXPERTS}_blocks": ("U8", (4, 64, 2, 16)), f"{EXPERTS}_scales": ("U8", (4, 64, 2))},
    {"model.layers.0.attn.bias": ("U8", (64,))},
    {"model.layers.1.mlp.up_proj.weight.absmax": ("U8", (64,))},
    {f"{WEIGHT}.quant_state.bitsandbytes__fp4": ("U8", (90,))},
])  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_narrow_tensors_are_refused_whatever_their_names(kind: str, strange: Shapes) -> None:
    described, stored = KINDS[kind]
    assert kind_of(described, stored, stored) == kind, "the control"
    both = {**stored, **strange}
    with pytest.raises(Unreadable, match=re.escape(next(iter(strange)))):
        kind_of(described, both, both)


@pytest.mark.parametrize("kind", ["fp8", "nf4"])
def test_a_matrix_and_its_scales_may_be_in_two_files_of_which_one_is_here(kind: str) -> None:
    described, stored = KINDS[kind]
    for name in stored:
        assert kind_of(described, {name: stored[name]}, stored) == kind
    assert kind_of(described, {"model.norm.weight": ("F32", (64,))}, [*stored, "model.norm.weight"]) == kind
    with pytest.raises(Unreadable, match=r"scales|absmax"):
        kind_of(described, {WEIGHT: stored[WEIGHT]}, [WEIGHT, "model.norm.weight"])


def test_a_part_of_a_float8_model_is_read_without_its_other_files(alone: Path) -> None:
    quantised(alone, "blocks")
    tensors = load_file(alone / SINGLE)
    (alone / SINGLE).unlink()
    scales = {name for name in tensors if name.endswith("_scale_inv") and ".layers.3." in name}
    files = {"a.safetensors": tensors.keys() - scales, "b.safetensors": scales}
    for file, names in files.items():
        save_file({name: tensors[name] for name in names}, alone / file)
    places = {name: file for file, names in files.items() for name in names}
    (alone / INDEX).write_text(json.dumps({"weight_map": places}))
    (alone / "b.safetensors").unlink()
    folder = ModelFolder(alone)
    assert folder.weight_format(folder.config()) is WeightFormat.fp8


def small(name: str, place: Path) -> Path:
    twin_model(config_of(name)).save_pretrained(place / name)
    conversion.byte_tokenizer().save_pretrained(place / name)
    edit(place / name / "config.json", eos_token_id=None, bos_token_id=None, pad_token_id=None)
    return place / name


@pytest.mark.parametrize("name", ["falcon", "mixtral", "llama"])
def test_nf4_that_leaves_most_or_all_unpacked(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Falcon's linear modules are of a class of its own; Mixtral's experts are in none."""
    settings = settings_of(small(name, tmp_path), quantization=Quantization.nf4)
    if name == "falcon":
        with pytest.raises(UserError, match=r"split inference in nf4, got falcon: none of its matrices is packed$"):
            load_layers(settings, CPU, range(1, 2), embedding=False, head=False)
        return
    with caplog.at_level("WARNING", "lab.models.quantized"):
        load_layers(settings, CPU, range(1, 2), embedding=False, head=False)
        load_layers(settings, CPU, range(3, 4), embedding=False, head=True)
    said = [record.getMessage() for record in caplog.records if "unpacked" in record.getMessage()]
    assert len(said) == (2 if name == "mixtral" else 0)
    assert all(line.startswith("nf4 leaves 50 % of the weights unpacked") for line in said)


def test_a_whole_model_of_which_nf4_packs_nothing_is_refused(tmp_path: Path) -> None:
    sizes = {"vocab_size": 264, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    ends = {"bos_token_id": None, "eos_token_id": None}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("falcon", **sizes, **ends)).save_pretrained(tmp_path / "own")
    conversion.byte_tokenizer().save_pretrained(tmp_path / "own")
    assert refusal(tmp_path / "own", quantization=Quantization.nf4) == (
        "model.quantization must be none for a model of which nf4 packs nothing, got nf4 for a falcon"
    )
    assert logits(tmp_path / "own").isfinite().all(), "the control"


REFUSED = {
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "got quant_method='gptq'"),
    "int8": ({"quantization_config": {"quant_method": "compressed-tensors"}}, "got quant_method='compressed-tensors'"),
    "8 bits": ({"quantization_config": {"load_in_8bit": True}}, "got bitsandbytes in 8 bits, where"),
    "nobody's": ({"quantization_config": {"quant_method": "foo"}}, "got quant_method='foo'"),
    "older": ({"compression_config": {"quant_method": "x"}}, "got a compression_config"),
    "no object": ({"quantization_config": "fp8"}, ""),
}


@pytest.mark.parametrize(("values", "found"), REFUSED.values(), ids=REFUSED)
def test_other_quantised_folders_are_refused_by_name(alone: Path, values: dict[str, Any], found: str) -> None:
    edit(alone / "config.json", **values)
    assert found in refusal(alone)
    with pytest.raises(UserError):  # a client, which reads no weights, says so too
        models.load_tokenizer_only(settings_of(alone))


# tokenizer and ends


def _without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def _add_token(folder: Path) -> None:
    tokenizer = conversion.byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<{number}>" for number in range(7)]})
    tokenizer.save_pretrained(folder)


TOKENIZERS: dict[str, tuple[Change, str]] = {
    "none": (_without_tokenizer, "model.path must have a tokenizer"),
    "only its config": (lambda folder: (folder / "tokenizer.json").unlink(), "model.path must have a tokenizer"),
    "broken": (lambda folder: (folder / "tokenizer.json").write_text("{"), "model.path must have a tokenizer that"),
    "code": (
        lambda folder: edit(
            folder / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", "own.Own"]}
        ),
        "model.path must have a tokenizer that transformers can read",
    ),
    "too large": (_add_token, "model.path must have a row of its embedding for each id of its tokenizer, got id 264"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "rule"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_tokenizer_that_cannot_be_used_is_refused(folder: Path, change: Change, rule: str) -> None:
    change(folder)
    assert refusal(folder).startswith(rule)
    with pytest.raises(UserError, match="tokenizer"):
        models.load_tokenizer_only(settings_of(folder))


def test_a_placeholder_for_pictures_needs_no_row(folder: Path) -> None:
    tokenizer = conversion.byte_tokenizer()
    tokenizer.add_tokens([*(f"<{number}>" for number in range(6)), "<image>"])
    tokenizer.save_pretrained(folder)
    edit(folder / "tokenizer_config.json", extra_special_tokens={"image_token": "<image>"})
    assert models.load_tokenizer_only(settings_of(folder)).convert_tokens_to_ids("<image>") == 264


@pytest.mark.parametrize(
    ("stored", "found"),
    [
        (7, [7]), ([7, 8, 7], [7, 8]), (None, []), ("", None), ("7", None), (True, None), (-1, None),
        ([1, 264], None), (1.5, None), ({"a": 1}, None),
    ],
)  # fmt: skip
def test_ends_of_a_text(folder: Path, stored: Any, found: list[int] | None) -> None:
    edit(folder / "generation_config.json", eos_token_id=stored)
    if found is not None:
        assert models.end_ids_of(settings_of(folder)) == found
        return
    with pytest.raises(UserError, match=r"^model.path must "):
        models.end_ids_of(settings_of(folder))


def test_ends_without_a_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"^model.path must have a generation_config.json that is JSON"):
        models.end_ids_of(settings_of(folder))
    (folder / "generation_config.json").unlink()
    edit(folder / "config.json", eos_token_id=[5, 6])
    assert models.end_ids_of(settings_of(folder)) == [5, 6]


# all of it at once


def test_changed_folders_are_the_same_model_or_one_line() -> None:
    found = fuzz_folders(12, seed=3)
    assert found.faults == []
    assert found.inputs == sum(found.outcomes.values()) == 12


def test_the_oracle_would_find_another_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: weights changed on their way, an error that is no UserError."""
    assert judge(folder, folder.parent) == ("the same", None)
    load = ModelFolder.load

    def changed(self: ModelFolder, *arguments: Any, **options: Any) -> Any:
        model: Any = load(self, *arguments, **options)
        model.lm_head.weight.data[5] += 1
        return model

    monkeypatch.setattr(ModelFolder, "load", changed)
    assert str(judge(folder, folder.parent)[1]).startswith("another model")
    monkeypatch.setattr(ModelFolder, "load", lambda *arguments, **options: {}["a"])
    assert judge(folder, folder.parent) == ("raised", "KeyError: 'a'")
