"""Every YAML in conf/ composes into typed settings, and none escapes this test."""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

import conf
from fl.bench.settings import FederatedBenchSettings, FederatedMeanBenchSettings, FederatedNaturalBenchSettings
from fl.settings import FederatedSettings
from lab.bench_engine import EngineBenchSettings
from lab.command.entry import compose_settings
from lab.decode import DecodeSettings
from lab.doctor import DoctorSettings
from lab.models.conversion import random_config
from lab.settings import LabSettings, ModelSource
from matrix.settings import MatrixSettings
from serve.bench.settings import ServeBenchSettings
from serve.chat.settings import ChatSettings
from serve.settings import ServeSettings
from simulations.bench_settings import BenchSettings
from simulations.demo_settings import DemoSettings
from simulations.link_settings import LinkRunSettings
from speculative.settings import SpeculativeSettings
from split.bench.settings import SplitBenchSettings, SplitTrainBenchSettings
from split.merge import MergeSettings
from split.plan import PlanSettings
from split.settings import SplitSettings
from split.training.settings import SplitTrainSettings

CONF = Path(conf.__file__).parent
FILES = sorted(CONF.rglob("*.y*ml"))
FOUND = {"": 22, "matrix": 5, "model": 6, "tracking": 3}
"""How many files each group has: raise the number when you add one, and see that it is composed below."""
COMMANDS: dict[str, type[LabSettings]] = {
    "fed_learn": FederatedSettings,
    "doctor": DoctorSettings,
    "spec_decoding": SpeculativeSettings,
    "link": LinkRunSettings,
    "fed_bench": FederatedBenchSettings,
    "fed_mean_bench": FederatedMeanBenchSettings,
    "fed_natural_bench": FederatedNaturalBenchSettings,
    "split_inf": SplitSettings,
    "split_plan": PlanSettings,
    "split_bench": SplitBenchSettings,
    "engine_bench": EngineBenchSettings,
    "split_train": SplitTrainSettings,
    "split_merge": MergeSettings,
    "split_train_bench": SplitTrainBenchSettings,
    "demo": DemoSettings,
    "decode": DecodeSettings,
    "serve": ServeSettings,
    "serve_bench": ServeBenchSettings,
    "chat": ChatSettings,
    "bench": BenchSettings,
    "matrix": MatrixSettings,
}
"""The settings of each file of a command."""


def compose_file(file: Path) -> LabSettings:
    """The file as that of a command, or as the choice of its group. `main.yaml` is in all of them."""
    group, choice = file.parent.relative_to(CONF).as_posix(), file.stem
    if group == ".":
        command = "doctor" if choice == "main" else choice
        return compose_settings(command, "", COMMANDS[command])
    command = "matrix" if group == "matrix" else "doctor"
    return compose_settings(command, f"{group}={choice}", COMMANDS[command])


def test_every_file_is_counted() -> None:
    found = [file.parent.relative_to(CONF).as_posix().replace(".", "") for file in FILES]
    assert {group: found.count(group) for group in found} == FOUND


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(CONF).as_posix())
def test_composes(file: Path) -> None:
    settings = compose_file(file)
    assert settings.model.architecture.layers >= 1
    if file.parent.name == "model":
        assert settings.model.name == yaml.safe_load(file.read_text())["name"]


def test_a_file_that_does_not_compose_fails(tmp_path: Path) -> None:
    """The negative control: the same function, on a YAML that gives a key nobody has."""
    (tmp_path / "conf" / "model").mkdir(parents=True)
    broken = tmp_path / "conf" / "model" / "broken.yaml"
    broken.write_text((CONF / "model" / "random.yaml").read_text() + "bogus: 1\n")
    overrides = f"'hydra.searchpath=[file://{tmp_path}/conf]' model=broken"
    with pytest.raises(ValueError, match=r"^In 'model/broken': model\.bogus must be a setting \("):
        compose_settings("fed_learn", overrides, FederatedSettings)


@pytest.mark.parametrize("file", sorted((CONF / "model").glob("*.yaml")), ids=lambda file: file.stem)
def test_model_numbers_make_a_model(file: Path) -> None:
    """Each YAML says where the model comes from, and the numbers fit each other."""
    model = compose_file(file).model
    numbers = model.architecture
    assert model.repo if model.source is ModelSource.hub else model.path or model.source is ModelSource.random
    assert numbers.heads % numbers.kv_heads == 0
    assert numbers.head_dim % 2 == 0, "rotary embeddings turn pairs"
    assert set(model.lora_targets) <= {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    if model.source is ModelSource.random:
        config = random_config(model)
        assert (config.num_hidden_layers, config.vocab_size) == (numbers.layers, numbers.vocabulary)


def test_values_stand_in_yaml_only() -> None:
    """No settings field has a default of its own: it would be a second place for the same value."""
    seen: list[str] = []

    def look(schema: Any) -> None:
        for field in fields(schema):
            seen.append(f"{schema.__name__}.{field.name}")
            assert field.default is MISSING, f"{seen[-1]} has a default"
            assert field.default_factory is MISSING, f"{seen[-1]} has a default"
            annotation = get_type_hints(schema)[field.name]
            if is_dataclass(annotation):
                look(annotation)

    for schema in COMMANDS.values():
        look(schema)
    assert len(seen) > 100
