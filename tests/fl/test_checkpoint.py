import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from fl.adapters import load_into, lora_parameters, read_from
from fl.checkpoint import AdapterFolders, BaseModel, latest_adapter, load_adapter
from fl.server import adapter_folders, first_adapter
from fl.settings import FederatedSettings
from lab.command.entry import Run, compose_settings
from lab.models.peft_folder import check_base, find_folder
from lab.settings import UserError

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["v_proj", "q_proj"], task_type="CAUSAL_LM")
BASE = BaseModel(name="acme/tiny", digest="aa11")


CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    vocab_size=64,
)


def small_base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG)


def trained_model() -> PeftModel:
    model = get_peft_model(small_base(), LORA)
    assert isinstance(model, PeftModel)
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.normal_()
    return model.eval()


def folders_in(root: Path, base: BaseModel = BASE) -> AdapterFolders:
    return AdapterFolders(
        root, lora=LORA, base=base, data_source="python_stdlib", num_clients=4, weighting="examples", commit="c0ffee"
    )


STRANGER = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
for folder in sys.argv[2:]:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), folder).eval()
    with torch.no_grad():
        torch.save(model(torch.arange(9)[None]).logits, folder + ".logits")
assert not any(name.split(".")[0] in ("fl", "lab", "conf") for name in sys.modules), "it must not know of us"
"""


def test_a_process_that_knows_nothing_of_us_loads_the_folder_and_says_the_same(tmp_path: Path) -> None:
    small_base().save_pretrained(tmp_path / "base")
    torch.set_num_threads(1)
    folders = folders_in(tmp_path / "adapters", BaseModel(name=str(tmp_path / "base"), digest="aa11"))
    expected = {}
    for server_round, dtype in enumerate((torch.float32, torch.bfloat16)):
        model = trained_model()
        load_into(model, {name: tensor.to(dtype) for name, tensor in read_from(model).items()})
        adapter = {name: tensor.to(dtype) for name, tensor in read_from(model).items()}
        with torch.no_grad():
            expected[folders.write(server_round, adapter, {"train_loss": 1.25})] = model(torch.arange(9)[None]).logits
    command = [sys.executable, "-c", STRANGER, str(tmp_path / "base"), *map(str, expected)]
    subprocess.run(command, check=True, timeout=120, cwd=tmp_path, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    with torch.no_grad():
        plain = small_base()(torch.arange(9)[None]).logits
    for folder, logits in expected.items():
        got = torch.load(f"{folder}.logits", weights_only=True)
        torch.testing.assert_close(got, logits, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(plain, logits, atol=1e-3), "an adapter that changes nothing proves nothing"


def test_the_code_on_the_card_runs_and_the_folder_names_its_base(tmp_path: Path) -> None:
    """With a folder, and with a model that this lab makes."""
    small_base().save_pretrained(tmp_path / "base")
    for number, model in enumerate(
        (
            ["model.source=path", f"model.path={tmp_path / 'base'}", "model.lora_targets=[q_proj,v_proj]"],
            [f"model.cache_dir={tmp_path / 'cache'}"],
        )
    ):
        words = ["model=random", "model.quantization=none", "model.dtype=float32", "project.lora.rank=4", *model]
        settings = compose_settings("fed_learn", " ".join(words), FederatedSettings)
        adapter = {name: tensor + 1 for name, tensor in first_adapter(settings).items()}
        folder = adapter_folders(settings, Run(tmp_path / str(number))).write(3, adapter, {})
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert Path(base, "config.json").is_file()
        card = (folder / "README.md").read_text()
        code = card.split("```python\n")[1].split("```")[0]
        scope: dict[str, Any] = {}
        exec(code, scope)  # what the card tells people to do
        loaded = lora_parameters(scope["model"])
        assert all(torch.equal(loaded[name], adapter[name]) for name in adapter)
        assert ("made from the seed 0" in card) == (number == 1)
        assert ("a copy of it elsewhere does as well" in card) == (number == 0)
        assert isinstance(AutoPeftModelForCausalLM.from_pretrained(folder), PeftModel)


def test_a_folder_holds_the_tensors_their_configuration_a_card_and_a_record(tmp_path: Path) -> None:
    adapter = read_from(trained_model())
    folder = folders_in(tmp_path).write(12, adapter, {"train_loss": 1.25, "eval_loss": 2.5})
    assert folder == tmp_path / "round-0012"
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "lab_adapter.json",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["round-0012"]
    saved = load_file(folder / "adapter_model.safetensors")
    assert saved.keys() == adapter.keys()
    assert all(torch.equal(saved[name], adapter[name]) for name in adapter)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"], config["inference_mode"]) == (4, "acme/tiny", True)
    assert config["target_modules"] == ["q_proj", "v_proj"]
    card = (folder / "README.md").read_text()
    for part in (
        'base_model: "acme/tiny"',
        "python_stdlib",
        "4 clients",
        "12 ",
        "c0ffee",
        "aa11",
        "| eval_loss | 2.5 |",
    ):
        assert part in card


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    adapter = read_from(trained_model())
    first = folders_in(tmp_path / "a").write(1, adapter, {})
    second = folders_in(tmp_path / "b").write(1, dict(reversed(adapter.items())), {})
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_latest_is_the_highest_round_and_nothing_else(tmp_path: Path) -> None:
    assert latest_adapter(tmp_path / "nowhere") is None
    adapter = read_from(trained_model())
    folders = folders_in(tmp_path)
    for server_round in (0, 9, 10):
        folders.write(server_round, adapter, {})
    (tmp_path / ".round-0011.1").mkdir()
    (tmp_path / "round-0012.old").mkdir()
    assert latest_adapter(tmp_path) == tmp_path / "round-0010"


def test_a_round_is_never_overwritten(tmp_path: Path) -> None:
    adapter = read_from(trained_model())
    folder = folders_in(tmp_path).write(1, adapter, {})
    before = (folder / "adapter_model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="round-0001"):
        folders_in(tmp_path).write(1, {name: tensor + 1 for name, tensor in adapter.items()}, {})
    assert (folder / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("step", ["lab.models.adapter.save_file", "lab.files.sync"])
@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_fault_while_writing_leaves_no_half_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, fault: BaseException
) -> None:
    adapter = read_from(trained_model())
    folders = folders_in(tmp_path)
    good = folders.write(1, adapter, {})

    def fail(*args: Any, **kwargs: Any) -> None:
        raise fault

    monkeypatch.setattr(step, fail)
    with pytest.raises(type(fault)):
        folders.write(2, adapter, {})
    assert [path.name for path in tmp_path.iterdir()] == ["round-0001"]
    assert latest_adapter(tmp_path) == good
    assert load_adapter(good, BASE, LORA, CONFIG).keys() == adapter.keys()


WRITER = """
import sys, torch
from pathlib import Path
from peft import LoraConfig
from fl.checkpoint import AdapterFolders, BaseModel
lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])
base = BaseModel(name="acme/tiny", digest="aa11")
said = dict(data_source="d", num_clients=1, weighting="examples", commit="c")
folders = AdapterFolders(Path(sys.argv[1]), lora=lora, base=base, **said)
tensors = {f"layers.{i}.lora_A.weight": torch.full((64, 4096), float(i)) for i in range(8)}
server_round = 0
while True:
    folders.write(server_round, tensors, {})
    server_round += 1
    print(server_round, flush=True)
"""


def test_a_writer_killed_at_any_moment_leaves_only_whole_folders(tmp_path: Path) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert writer.stdout is not None
        for _ in range(4):
            assert writer.stdout.readline(), "the writer died before it wrote"
        time.sleep(0.013)  # wherever it is by now
        writer.send_signal(signal.SIGKILL)
        writer.wait(timeout=30)
    finally:
        writer.kill()
        writer.wait(timeout=30)
    written = sorted(tmp_path.glob("round-*"))
    assert len(written) >= 4
    for folder in written:
        assert len(load_file(folder / "adapter_model.safetensors")) == 8
    assert latest_adapter(tmp_path) == written[-1]


def test_a_warm_start_reads_what_was_written(tmp_path: Path) -> None:
    adapter = read_from(trained_model())
    folder = folders_in(tmp_path).write(1, adapter, {})
    loaded = load_adapter(folder, BaseModel(name="/elsewhere/tiny", digest="aa11"), LORA, CONFIG)
    assert all(torch.equal(loaded[name], adapter[name]) for name in adapter)
    load_into(trained_model(), loaded)


def test_an_adapter_of_another_model_is_refused_by_digest_naming_both(tmp_path: Path) -> None:
    folder = folders_in(tmp_path).write(1, read_from(trained_model()), {})
    with pytest.raises(ValueError, match=r"for acme/tiny \(digest aa11\), the run uses acme/tiny \(digest bb22\)"):
        load_adapter(folder, BaseModel(name="acme/tiny", digest="bb22"), LORA, CONFIG)


def test_a_folder_that_we_did_not_write_is_compared_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = trained_model()
    model.peft_config["default"].base_model_name_or_path = "acme/tiny"
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    assert load_adapter(tmp_path, BASE, LORA, CONFIG).keys() == read_from(model).keys()
    assert "records no digest" in caplog.text
    with pytest.raises(ValueError, match=r"is for acme/tiny, the run uses acme/big"):
        load_adapter(tmp_path, BaseModel(name="acme/big", digest="aa11"), LORA, CONFIG)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 8}, "has a LoRA of rank 8 at .*, the run 4"),
        ({"lora_alpha": 16}, r"has a scale 4\.0 at .*, the run 2\.0"),
        ({"use_rslora": True}, r"has a scale 4\.0 at .*, the run 2\.0"),
        ({"alpha_pattern": {"v_proj": 16}}, r"has a scale 4\.0 at .*layers\.0.*v_proj, the run 2\.0"),
        ({"rank_pattern": {"layers.1.self_attn.q_proj": 2}}, r"rank 2 at .*layers\.1.*q_proj.*, the run 4"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, r"has a LoRA of rank 4 at .*k_proj.*, the run none"),
        ({"target_modules": ["q_proj"]}, r"has a LoRA of rank none at .*v_proj.*, the run 4"),
        ({"layers_to_transform": [0]}, r"has a LoRA of rank none at .*layers\.1.*, the run 4"),
        ({"use_dora": True}, r"has the weights .* at .*lora_magnitude_vector, the run none"),
        ({"modules_to_save": ["model.norm"]}, r"has the weights .* at .*model\.norm\.weight, the run none"),
        ({"bias": "all"}, None),  # this model has no biases
        ({"init_lora_weights": "pissa"}, "^project.warm_start must have init_lora_weights of .*, got 'pissa'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_folder_that_computes_something_else_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str | None
) -> None:
    kind = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | changes
    model = get_peft_model(small_base(), LoraConfig(**kind))
    model.peft_config["default"].base_model_name_or_path = "acme/tiny"
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    if message is None:
        load_adapter(tmp_path, BASE, LORA, CONFIG)
        return
    with pytest.raises(ValueError, match=message):
        load_adapter(tmp_path, BASE, LORA, CONFIG)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("kind", ["missing", "cut", "empty", "of another kind"])
def test_a_folder_with_a_broken_file_is_refused(tmp_path: Path, name: str, kind: str) -> None:
    folder = folders_in(tmp_path).write(1, read_from(trained_model()), {})
    whole = (folder / name).read_bytes()
    (folder / name).unlink()
    if kind != "missing":
        (folder / name).write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "of another kind": b"[1]"}[kind])
    with pytest.raises(UserError, match=r"^project\.warm_start must .*, got "):
        load_adapter(folder, BASE, LORA, CONFIG)


def test_a_written_folder_is_refused_as_model_adapter_on_another_base(tmp_path: Path) -> None:
    written = folders_in(tmp_path).write(1, read_from(trained_model()), {})
    check_base(find_folder(written), BASE.digest)
    with pytest.raises(UserError, match=r"model\.adapter must belong to base model random:other, got .*round-0001"):
        check_base(find_folder(written), "random:other")


def test_a_folder_with_another_runs_adapters_is_refused(tmp_path: Path) -> None:
    settings = compose_settings("fed_learn", "model=random", FederatedSettings)
    (tmp_path / "adapters" / "round-0001").mkdir(parents=True)
    with pytest.raises(UserError, match=r"^hydra\.run\.dir must be a folder without another run's adapters, got '/"):
        adapter_folders(settings, Run(tmp_path))
