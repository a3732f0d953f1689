"""Places that cannot be used, files that others may not read, and what a command says of itself."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

import lab.decode
import split.plan
import split.train
from lab.command.entry import LONGEST_LINE, for_owner_alone
from lab.environment import version
from lab.files import share_like_parent, whole_folder, whose_place, write_whole
from tests.settings_fuzz import Command, run_of

TINY = (
    "model=random",
    "tracking=none",
    "device.threads=1",
    "hydra.run.dir=run",
    "project.context=32",
    "project.max_new_tokens=2",
)
DECODE = Command("decode", lab.decode.main, ())
PLAN = Command("split_plan", split.plan.main, ())


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()


@pytest.mark.parametrize(
    ("word", "line"),
    [
        (
            "model.cache_dir=file/x",
            "error: model.cache_dir must be a folder that can be written, got '{here}/file/x' (Not a directory)",
        ),
        (
            "hydra.run.dir=file/x",
            "error: hydra.run.dir must be a folder that can be written, got 'file/x' (Not a directory)",
        ),
    ],
)
def test_a_place_that_cannot_be_written_is_one_line_with_its_key(word: str, line: str, tmp_path: Path) -> None:
    assert run_of(DECODE, [*TINY, word]) == (line.format(here=tmp_path), None)


def test_a_home_that_is_a_file_or_none_is_the_caches_affair(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    line, fault = run_of(DECODE, TINY)
    assert (line or fault).startswith("error: model.cache_dir must be a folder that can be written, got ")
    monkeypatch.delenv("HOME")

    def nobody(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert run_of(DECODE, TINY) == (
        "error: model.cache_dir must be a path without ~ where HOME is not set, got "
        "'~/.cache/distributed-llm-lab/models'",
        None,
    )


def test_checkpoints_that_cannot_be_kept_are_refused_before_the_first_step(tmp_path: Path) -> None:
    words = [word for word in TINY if "project" not in word]
    local = ["project.transport=inproc", "project.local_shards=2", "project.checkpoints=file/x"]
    line, _ = run_of(Command("split_train", split.train.main, ()), [*words, *local])
    assert (
        line
        == f"error: project.checkpoints must be a folder that can be written, got '{tmp_path}/file/x' (Not a directory)"
    )


def test_an_error_belongs_to_the_innermost_place_that_it_is_about() -> None:
    places = {"hydra.run.dir": "/a", "model.cache_dir": "/a/b", "project.x": "/c"}
    read_only = OSError(30, "Read-only file system", "/a/b/c.json")
    assert str(whose_place(read_only, places)) == (
        "model.cache_dir must be a folder that can be written, got '/a/b' (Read-only file system)"
    )
    assert whose_place(OSError(30, "Read-only file system", "/ab/c"), places) is None
    assert whose_place(OSError(28, "No space left on device"), places) is None


def test_what_a_command_writes_is_for_its_owner_alone(tmp_path: Path) -> None:
    os.umask(before := os.umask(0o022))
    assert run_of(PLAN, ["model=random", "tracking=none", "hydra.run.dir=run"]) == (None, None)
    made = [tmp_path / "run", *(tmp_path / "run").rglob("*")]
    assert {"result.json", "config.yaml", "overrides.yaml", "hydra.yaml"} <= {path.name for path in made}
    assert not [path for path in made if path.stat().st_mode & 0o077]
    assert os.umask(before) == before, "the command has not changed what comes after it"


def test_a_model_may_be_read_by_whoever_may_read_its_cache(tmp_path: Path) -> None:
    for mode in (0o755, 0o750, 0o700):
        tmp_path.chmod(mode)
        with for_owner_alone():
            with whole_folder(tmp_path / "model") as folder:
                (folder / "weights").touch()
            write_whole(tmp_path / "proof", "{}", share=True)
            write_whole(tmp_path / "result", "{}")
            share_like_parent(tmp_path / "model")
        modes = {
            path.name: path.stat().st_mode & 0o777 for path in [*tmp_path.iterdir(), tmp_path / "model" / "weights"]
        }
        assert (modes["model"], modes["weights"], modes["proof"], modes["result"]) == (
            mode,
            mode & 0o666,
            mode & 0o666,
            0o600,
        )


def test_the_version_is_ours_whatever_stands_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--version"], ["seed=nonsense", "--version", "--cfg", "job"]):
        assert run_of(PLAN, words) == (None, None)
    assert version().startswith("distributed-llm-lab ")
    assert "Hydra" not in version()


def test_what_hydra_cannot_compose_and_a_value_without_end_are_one_line() -> None:
    assert run_of(PLAN, ["model.lora_targets.deeper=1"])[0] == (
        "error: the overrides of the command line must make settings: invalid literal for int() with base 10: 'deeper'"
    )
    line, fault = run_of(PLAN, [f"seed={'x' * 20_000}"])
    assert fault is None
    assert line is not None
    assert line.startswith("error: seed must be an integer, got 'xxx")
    assert len(line) < LONGEST_LINE + 20


def test_a_device_that_this_machine_lacks_is_one_line_where_nothing_is_computed_too() -> None:
    line, fault = run_of(PLAN, ["model=random", "tracking=none", "hydra.run.dir=run", "device.name=mps"])
    assert fault is None
    assert (line or "").startswith("error: device.name must be one of ")


def test_a_group_that_refers_elsewhere_is_one_line() -> None:
    assert run_of(PLAN, ["network=${seed}"]) == ("error: network must be a group of settings, got ${seed}", None)
