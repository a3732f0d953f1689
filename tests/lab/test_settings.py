"""Each bad value is one line with dotted key, rule and value; good ones become typed settings."""

from __future__ import annotations

import math
import shlex
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest

from fl.settings import FederatedProjectSettings, FederatedSettings, PartitionBy
from lab.command.entry import compose_settings
from lab.doctor import DoctorSettings
from lab.settings import Dtype, Quantization, UserError, WandbMode, digest, to_plain

PROJECT = f"project must be a group of settings ({', '.join(get_type_hints(FederatedProjectSettings))})"

BAD = {
    # out of range
    "seed=-1": "seed must be in [0, 2**31), got -1",
    "seed=2147483648": "seed must be in [0, 2**31), got 2147483648",
    "device.threads=-1": "device.threads must be in [0, 1024], got -1",
    "network.port=70000": "network.port must be in [0, 65535], got 70000",
    "network.connect_timeout_seconds=0": "network.connect_timeout_seconds must be greater than 0, got 0.0",
    "network.dead_after_seconds=0.5": "network.dead_after_seconds must be greater than heartbeat_seconds=1.0, got 0.5",
    "network.max_handshake_bytes=1": "network.max_handshake_bytes must be in [512, 2**32), got 1",
    "network.max_frame_bytes=1": "network.max_frame_bytes must be in [4096, 2**32), got 1",
    "model.lora_targets=[]": "model.lora_targets must name at least one module, got []",
    "model.source=hub": "model.repo must be set for source=hub, got None",
    "model.source=path model.path=null": "model.path must be set for source=path, got None",
    "model.path=null": "model.path must be set for source=gguf, got None",
    "model.architecture.layers=0": "model.architecture.layers must be at least 1, got 0",
    "model.architecture.kv_heads=4": "model.architecture.heads must be a multiple of kv_heads=4, got 9",
    "project.num_clients=0": "project.num_clients must be at least 1, got 0",
    "project.rounds=0": "project.rounds must be at least 1, got 0",
    "project.local_steps=0": "project.local_steps must be at least 1, got 0",
    "project.fraction=0": "project.fraction must be in (0, 1], got 0.0",
    "project.fraction=1.01": "project.fraction must be in (0, 1], got 1.01",
    "project.fraction=nan": "project.fraction must be in (0, 1], got nan",
    "project.proximal_mu=-1": "project.proximal_mu must be at least 0, got -1.0",
    "project.proximal_mu=inf": "project.proximal_mu must be finite, got inf",
    "project.reply_timeout_seconds=0": "project.reply_timeout_seconds must be greater than 0, got 0.0",
    "project.workers=-1": "project.workers must be at least 0, got -1",
    "project.worker_retries=-1": "project.worker_retries must be at least 0, got -1",
    "project.lora.rank=0": "project.lora.rank must be at least 1, got 0",
    "project.lora.alpha=0": "project.lora.alpha must be greater than 0, got 0.0",
    "project.lora.dropout=1": "project.lora.dropout must be in [0, 1), got 1.0",
    "project.optimization.learning_rate=0": "project.optimization.learning_rate must be greater than 0, got 0.0",
    "project.optimization.learning_rate=inf": "project.optimization.learning_rate must be finite, got inf",
    "project.optimization.final_learning_rate_fraction=2": (
        "project.optimization.final_learning_rate_fraction must be in [0, 1], got 2.0"
    ),
    "project.optimization.warmup_steps=-1": "project.optimization.warmup_steps must be at least 0, got -1",
    "project.optimization.weight_decay=-1": "project.optimization.weight_decay must be at least 0, got -1.0",
    "project.optimization.beta2=1": "project.optimization.beta2 must be in [0, 1), got 1.0",
    "project.optimization.max_gradient_norm=-1": "project.optimization.max_gradient_norm must be at least 0, got -1.0",
    "project.optimization.batch_size=0": "project.optimization.batch_size must be at least 1, got 0",
    "project.optimization.accumulation=0": "project.optimization.accumulation must be at least 1, got 0",
    "project.data.sequence_length=7": "project.data.sequence_length must be at least 8, got 7",
    "project.data.held_out_fraction=1": "project.data.held_out_fraction must be in (0, 1), got 1.0",
    "project.data.max_examples=-1": "project.data.max_examples must be at least 0, got -1",
    "project.data.source=hub": "project.data.repo must be set for source=hub, got None",
    # wrong type
    "project.rounds=abc": "project.rounds must be an integer, got 'abc'",
    "project.rounds=1.5": "project.rounds must be an integer, got 1.5",
    "project.rounds=true": "project.rounds must be an integer, got True",
    "project.rounds=null": "project.rounds must be an integer, got null",
    "project.rounds=": "project.rounds must be an integer, got ''",
    "project.rounds=[1]": "project.rounds must be an integer, got [1]",
    "project.rounds.deeper=1": "project.rounds must be an integer, got {}",
    "project.fraction=half": "project.fraction must be a number, got 'half'",
    "tracking.progress=maybe": "tracking.progress must be true or false, got 'maybe'",
    "model.name=null": "model.name must be text, got null",
    "seed=[a]": "seed must be an integer, got ['a']",
    "model.lora_targets=q_proj": "model.lora_targets must be a list, each text, got 'q_proj'",
    "project.lora=3": "project.lora must be a group of settings (rank, alpha, dropout), got 3",
    # no member of a closed choice
    "model.dtype=int8": "model.dtype must be one of auto, float64, float32, bfloat16, float16, got 'int8'",
    "model.quantization=int3": "model.quantization must be one of none, nf4, int8, int4, got 'int3'",
    "model.quantization=int4": "model.quantization must be none or nf4 to learn on, got 'int4'",
    "device.compile=maybe": "device.compile must be true, false or auto, got 'maybe'",
    "device.compile=0": "device.compile must be true, false or auto, got 0",
    "device.compile=true": (
        "device.compile must be false or auto for this command, which compiles no layers, got True"
    ),
    "model.adapter=folder": "model.adapter must be null for this command, which loads none, got 'folder'",
    "device.name=gpu": "device.name must be one of auto, cuda, mps, cpu, got 'gpu'",
    "project.partition_by=unit": "project.partition_by must be one of package, iid, natural, "
    "dirichlet, shards, linear, got 'unit'",
    "project.data.source=csv": "project.data.source must be one of python_stdlib, jsonl, text, hub, got 'csv'",
    # no such key
    "project.rouds=3": "project.rouds must be a setting (did you mean project.rounds?), got '3'",
    "projct.rounds=3": "projct must be a setting (did you mean project?), got '3'",
    "project.lora.r=4": "project.lora.r must be a setting (there are rank, alpha, dropout), got '4'",
    "+project.lora.alhpa=4": "project.lora.alhpa must be a setting (did you mean project.lora.alpha?), got 4",
    "++device.thread=4": "device.thread must be a setting (did you mean device.threads?), got 4",
    "+device.cores.count=4": "device.cores must be a setting (there are name, threads, compile), got {'count': 4}",
    "+bogus=1": "bogus must be a setting (there are prompt, seed, model, network, device, tracking, project), got 1",
    "nope=3": "nope must be a setting (there are prompt, seed, model, network, device, tracking, project), got '3'",
    "+project.rounds=5": "project.rounds exists already, write it without +, got '5'",
    "+model=random": "model exists already, write it without +, got 'random'",
    # no such choice of a group
    "model=nope": (
        "model must be one of llama3_70b, llama3_8b, qwen3_0_6b, random, smollm2_135m, tinyllama, got 'nope'"
    ),
    "tracking=nope": "tracking must be one of none, offline, online, got 'nope'",
    "project=doctor": f"{PROJECT}, got 'doctor'",
    "project=null": f"{PROJECT}, got null",
    # not set
    "seed=???": "seed must be set, got ???",
    "model.architecture.layers=???": "model.architecture.layers must be set, got ???",
    "model=???": "model must be one of llama3_70b, llama3_8b, qwen3_0_6b, random, smollm2_135m, tinyllama, got nothing",
    "project=???": "project must be set, got ???",
    "~project": "project must be set, got ~project",
    "+project=3": "project exists already, write it without +, got '3'",
    "~seed": "seed must be set, got ~seed",
    "~project.rounds": "project.rounds must be set, got ~project.rounds",
    # no override at all
    "project.rounds=1,2": "project.rounds must be one value (a list is written [a,b]), got '1,2'",
    "model=random,tinyllama": "model must be one value (a list is written [a,b]), got 'random,tinyllama'",
    "seed": "'seed' must be key=value (missing EQUAL at '<EOF>'",
    "seed=[": "'seed=[' must be key=value (no viable alternative at input '['",
    "seed='${nope}'": "seed must not refer to what cannot be read, got: Interpolation key 'nope' not found",
}


@pytest.mark.parametrize("overrides", BAD)
def test_bad_value_names_key_rule_and_value(overrides: str) -> None:
    with pytest.raises(UserError) as caught:
        compose_settings("fed_learn", overrides, FederatedSettings)
    line, expected = str(caught.value), BAD[overrides]
    assert line == expected or (expected.startswith("'") and line.startswith(expected))
    assert "\n" not in line


def test_primary_config_that_is_none() -> None:
    with pytest.raises(UserError, match=r"^Cannot find primary config 'nope'\."):
        compose_settings("nope", "", FederatedSettings)


def test_good_values_become_typed_settings() -> None:
    overrides = (
        "seed=7 model=random model.dtype=bfloat16 project.fraction=1 project.partition_by=iid "
        "project.lora.alpha=4 tracking=none 'model.lora_targets=[q_proj]' project.data.path=null"
    )
    settings = compose_settings("fed_learn", overrides, FederatedSettings)
    assert (settings.seed, settings.model.dtype, settings.model.lora_targets) == (7, Dtype.bfloat16, ["q_proj"])
    assert settings.project.partition_by is PartitionBy.iid
    assert settings.tracking.wandb is WandbMode.disabled
    assert (type(settings.project.fraction), type(settings.project.lora.alpha)) == (float, float)
    assert settings.project.data.path is None
    assert type(settings.model.lora_targets) is list


def test_primary_config_overrides_main() -> None:
    assert compose_settings("fed_learn", "", FederatedSettings).model.quantization is Quantization.nf4
    assert compose_settings("doctor", "", DoctorSettings).model.quantization is Quantization.none


def test_composing_does_not_depend_on_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = compose_settings("fed_learn", "seed=3", FederatedSettings)
    monkeypatch.chdir(tmp_path)
    assert compose_settings("fed_learn", "seed=3", FederatedSettings) == here


def test_overrides_are_split_like_a_shell_does() -> None:
    settings = compose_settings("fed_learn", shlex.join(["model.name=two words", "seed=1"]), FederatedSettings)
    assert (settings.model.name, settings.seed) == ("two words", 1)


def test_digest_covers_every_value() -> None:
    settings = compose_settings("fed_learn", "", FederatedSettings)
    same = compose_settings("fed_learn", "", FederatedSettings)
    other = replace(settings, project=replace(settings.project, lora=replace(settings.project.lora, dropout=0.1)))
    assert digest(settings) == digest(same)
    assert len({digest(settings), digest(other), digest(replace(settings, seed=1))}) == 3


class Colour(Enum):
    red = "#f00"


def test_to_plain_gives_json_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    value: dict[Any, Any] = {
        Colour.red.name: [Colour.red, (1, None, True)],
        3: Path("a"),
        "numpy": np.float32(0.5),
        "count": np.int64(3),
        "array": np.zeros(2),
    }
    assert to_plain(value) == {
        "red": ["red", [1, None, True]],
        "3": str(tmp_path / "a"),
        "numpy": 0.5,
        "count": 3,
        "array": "[0. 0.]",
    }
    assert math.isnan(to_plain(math.nan))
