"""No code that comes with a model is run: the sources pass trust_remote_code=False, a `y` on stdin changes nothing."""

from __future__ import annotations

import ast
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from lab import decode
from lab.command.entry import compose_settings
from lab.models.sources import prepare_checkpoint
from speculative import decode as speculative_decode
from split import infer, plan, train
from split.settings import SplitSettings
from tests.in_process import exit_code
from tests.test_safety import PACKAGES, ROOT

WITHOUT_CODE = {"PeftModel", "LoraConfig", "PeftConfig"}
"""Read JSON and safetensors into a model that is there already: they have no such word."""


def calls_without(source: str) -> list[str]:
    """Calls that load something of transformers and leave it open whose code may run."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if node.func.attr not in ("from_pretrained", "from_config") or ast.unparse(node.func.value) in WITHOUT_CODE:
            continue
        words = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if words.get("trust_remote_code") != "False":
            found.append(ast.unparse(node.func))
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_every_call_says_no(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    found = {str(file): calls for file in files if (calls := calls_without(file.read_text(encoding="utf-8")))}
    assert found == {}


@pytest.mark.parametrize(
    "line",
    [
        "AutoConfig.from_pretrained(x)",
        "AutoModelForCausalLM.from_config(c)",
        "A.from_pretrained(x, trust_remote_code=y)",
    ],
)
def test_each_of_them_would_be_found(line: str) -> None:
    assert calls_without(line)


def _with_code(folder: Path, mark: Path) -> None:
    """A folder whose config and tokenizer have code of their own, which leaves a mark."""
    (folder / "own.py").write_text(
        f"open({str(mark)!r}, 'w').close()\nfrom transformers import PretrainedConfig, PreTrainedTokenizerFast\n"
        "class Config(PretrainedConfig):\n    model_type = 'foo'\nclass Tokenizer(PreTrainedTokenizerFast): pass\n"
    )


def _edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    return prepare_checkpoint(
        compose_settings("split_inf", f"model=random model.cache_dir='{cache}'", SplitSettings).model
    ).folder


SPLIT = ["project.local_shards=2", "project.transport=inproc"]
COMMANDS: list[tuple[Callable[[], NoReturn], list[str], str]] = [
    (infer.main, SPLIT, "config"),
    (infer.main, SPLIT, "tokenizer"),
    (train.main, SPLIT, "config"),
    (plan.main, [], "config"),
    (decode.main, [], "tokenizer"),
    (speculative_decode.main, [], "config"),
    (speculative_decode.main, [], "tokenizer"),
]


@pytest.mark.parametrize(("main", "words", "part"), COMMANDS, ids=lambda value: getattr(value, "__module__", ""))
def test_a_yes_runs_no_code(
    main: Callable[[], NoReturn],
    words: list[str],
    part: str,
    good: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    _with_code(folder, tmp_path / "ran")
    if part == "config":
        _edit(folder / "config.json", model_type="foo", auto_map={"AutoConfig": "own.Config"})
    else:
        names = {"AutoTokenizer": ["own.Tokenizer", "own.Tokenizer"]}
        _edit(folder / "tokenizer_config.json", tokenizer_class="Tokenizer", auto_map=names)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    monkeypatch.chdir(tmp_path)
    common = ["model=random", "model.source=path", f"model.path='{folder}'", "tracking=none", "prompt=hi"]
    assert exit_code(main, *common, *words) == 2
    output = capsys.readouterr()
    assert not (tmp_path / "ran").exists(), "the folder's own code ran"
    assert "[y/N]" not in output.out + output.err
    assert f"error: model.path must have a {part}" in output.err
