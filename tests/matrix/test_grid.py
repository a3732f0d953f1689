"""Overrides become axes, axes become cells, cells have signatures."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lab.command.entry import compose_settings
from lab.settings import UserError
from matrix.contents import sources_digest
from matrix.grid import Cell, as_word, look_up, make_cells, sort_overrides
from matrix.settings import MatrixSettings, SweepSettings
from matrix.sweep import plan

ROOT = Path(__file__).resolve().parents[2]


ONE = ("project.context=128", "project.sessions=1")
"""A grid of one cell."""


def sweep_settings(*words: str) -> SweepSettings:
    told = " ".join(f"'{word}'" for word in sort_overrides(words).sweep)
    return compose_settings("matrix", told, MatrixSettings).matrix


def cells(*words: str) -> list[Cell]:
    return make_cells(sweep_settings(*words), sort_overrides(words))


def points(*words: str) -> list[list[Any]]:
    return [list(cell.point.values()) for cell in cells(*words)]


@pytest.mark.parametrize("option", [("--config-dir",), ("-cd",), ("--config-dir=",)])
def test_cells_find_what_stands_in_a_config_folder_of_ones_own(tmp_path: Path, option: tuple[str]) -> None:
    (tmp_path / "conf" / "model").mkdir(parents=True)
    ours = (ROOT / "conf" / "model" / "random.yaml").read_text().replace("name: random-1M", "name: mine")
    (tmp_path / "conf" / "model" / "mine.yaml").write_text(ours)
    place = str(tmp_path / "conf")
    told = [f"{option[0]}{place}"] if option[0].endswith("=") else [*option, place]
    axes = ("model=mine", "project.context=64", "project.sessions=1")
    (cell,) = make_cells(sweep_settings("matrix=decode"), words := sort_overrides(["matrix=decode", *told, *axes]))
    assert cell.settings["model"]["name"] == "mine"
    assert cell.words[0] == f'hydra.searchpath=["file://{place}"]', "its command finds it, too"
    assert words.sweep == ["matrix=decode", *told, "model=mine"]
    with pytest.raises(UserError, match=r"^model must be one of .*, got 'mine'"):
        cells("matrix=decode", *axes)


def test_words_go_to_whoever_reads_them() -> None:
    words = sort_overrides(
        ["matrix=decode", "model=random", "seed=3", "project.context=64,128", "project.cache_bucket=8", "tracking=none",
         "device.threads=1,2", "--cfg", "job", "+project.x=1", "prompt=one, two", "hydra.run.dir=x"]
    )  # fmt: skip
    own = ["matrix=decode", "model=random", "seed=3", "tracking=none", "--cfg", "job", "hydra.run.dir=x"]
    assert words.sweep == own
    assert words.cells == ["model=random", "seed=3", "project.cache_bucket=8", "+project.x=1", "prompt=one, two"]
    assert words.axes == {
        "project.context": ["project.context=64", "project.context=128"],
        "device.threads": ["device.threads=1", "device.threads=2"],
    }


PACKAGE = """
from dataclasses import replace
from lab.command.entry import compose_settings
from matrix.grid import make_cells, sort_overrides
from matrix.settings import MatrixSettings
words = sort_overrides(["matrix.command=fl.bench", "matrix.config=fed_bench", "model=random"])
settings = compose_settings("matrix", " ".join(words.sweep), MatrixSettings).matrix
print(len(make_cells(replace(settings, axes={"seed": [1, 2]}), words)))
"""


def test_a_command_that_is_a_package_is_composed_too() -> None:
    words = [sys.executable, "-c", PACKAGE]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "2\n", done.stderr


def test_the_default_axes_are_context_and_batch() -> None:
    assert points() == [[c, b] for c in (128, 512, 1024) for b in (1, 2, 4)]
    cell = cells("model=random")[-1]
    assert cell.words == ["model=random", "project.context=1024", "project.sessions=4"]
    assert cell.settings["project"]["context"] == 1024
    assert cell.settings["model"]["name"] == "random-1M"
    assert cell.settings["tracking"]["wandb"] == "disabled"


def test_the_command_line_replaces_adds_and_takes_away_axes() -> None:
    assert points("project.context=32,64", "project.sessions=1") == [[32], [64]]
    assert points("project.context=32", "project.sessions=2", "device.threads=range(1,3)") == [[1], [2]]
    added = cells("project.context=32,64", "project.sessions=1", "model=random,smollm2_135m")
    assert [cell.point["model"] for cell in added] == ["random", "smollm2_135m"] * 2
    assert added[1].settings["model"]["name"] == "SmolLM2-135M-Instruct"


def test_values_of_every_kind_survive() -> None:
    typed = ["project.context=32", "project.sessions=1"]
    assert points(*typed, "model.seed=1,2", "model.path='a b','c,d'")[1] == [1, "c,d"]
    assert points(*typed, "device.name=cpu,auto") == [["cpu"], ["auto"]]


def test_a_value_that_is_there_twice_is_one_cell(caplog: pytest.LogCaptureFixture) -> None:
    one = ["project.sessions=1", "model=random"]
    assert points(*one, "project.context=32,32,64,'32',+64") == [[32], [64]]
    assert "3 cells of this grid equal other cells, and run once" in caplog.text
    assert points(*one, "project.context=32", "network.connect_timeout_seconds=1,1.0") == [[1.0]]
    assert points(*one, "project.context=32", "model.lora_targets=[a,b],[b],[a, b]") == [[["a", "b"]], [["b"]]]
    assert points(*one, "project.context=32", "++seed=1,2") == [[1], [2]], "a key is the same with a + before it"


def test_a_combination_that_the_command_refuses_is_a_cell_while_its_values_are_good_for_others() -> None:
    words = ["model=random", "project.sessions=1", "project.context=32,512", "project.max_new_tokens=16,64"]
    assert points(*words) == [[32, 16], [32, 64], [512, 16], [512, 64]], "64 tokens have no room in 32"


def test_a_folder_is_taken_as_typed_and_texts_that_look_like_something_else_are_texts(tmp_path: Path) -> None:
    folder = "/home/José/my lab (2)"
    (cell,) = cells("model=random", "project.context=32", "project.sessions=1", f"model.cache_dir={folder}")
    assert cell.settings["model"]["cache_dir"] == folder
    assert [as_word("a", value) for value in ("null", None, "x y", 'a"b', ["1", 1], True)] == [
        'a="null"', "a=null", 'a="x y"', 'a="a\\"b"', 'a=["1",1]', "a=true"
    ]  # fmt: skip
    text, null = cells("model=random", "project.context=32", "project.sessions=1", "model.adapter='null',null")
    assert [text.point, null.point] == [{"model.adapter": "null"}, {"model.adapter": None}]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["project.contxt=1,2"], r"^project.contxt must be a setting \(did you mean project.context\?\), got '1'$"),
        (["projct.context=1,2"], r"^projct must be a setting \(did you mean project\?\), got"),
        (["matrix.axes={project.context: []}"], r"^matrix.axes.project.context must have at least one value, got \[]$"),
        (["matrix.max_cells=8"], r"^matrix.max_cells must be at least the 9 cells of this grid, got 8$"),
        (["project.context=a,b"], r"^project.context must be an integer, got 'a'$"),
        (["model=random,nope"], r"^model must be one of .*random.*, got 'nope'$"),
        (["matrix.command=lab.nope"], r"^matrix.command must be a module, got 'lab.nope'"),
        (["matrix=nope"], r"^matrix must be one of decode, .*, got 'nope'$"),
        (["project.context=1,(2"], r"project.context=1,\(2' must be key=value"),
        (["project.context=(2"], r"^project.context must be an integer, got '\(2'$"),
        (["project.context=32,-64"], r"^project.context must be .*, got -64$"),
        (["project.context=-64"], r"^project.context must be .*, got -64$"),
        ([*ONE, "seed=0,-1"], r"^seed must be in \[0, 2\*\*31\), got -1$"),
        ([*ONE, "device.name=cpu,mps"], r"^device.name must be one of auto, .*, got mps$"),
        ([*ONE, "+bogus=1,2"], r"^bogus must be a setting \(.*\), got 1$"),
        (["seed=1,2", "seed=3"], r"^seed must be given once where it is an axis, got 'seed=3', too$"),
        (["seed=3", "++seed=1,2"], r"^seed must be given once where it is an axis, got '\+\+seed=1,2', too$"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        plan(sweep_settings(*words), cells(*words))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("a.b", 1), ("a", {"b": 1}), ("c.-1", 3), ("c.0", 2), ("c.2", None), ("c.x", None), ("a.b.c", None)],
)
def test_figures_are_looked_up_by_dotted_key(key: str, value: object) -> None:
    assert look_up({"a": {"b": 1}, "c": [2, 3]}, key) == value


@pytest.fixture(scope="module")
def presets() -> dict[str, list[Cell]]:
    """Each preset's cells."""
    files = sorted((ROOT / "conf" / "matrix").glob("*.yaml"))
    return {file.stem: cells(f"matrix={file.stem}", "model=random") for file in files}


def test_every_preset_names_its_pillars_context_and_batch(presets: dict[str, list[Cell]]) -> None:
    """Each composes, and its cells take a context window and a batch size."""
    assert len(presets) > 4
    for preset, found in presets.items():
        assert len(found) == 9
        labels = [sweep_settings(f"matrix={preset}").labels[key] for key in found[0].point]
        assert labels[0] == "context window (tokens)"
        assert labels[1].startswith("batch size (")


def signatures(*words: str) -> list[str]:
    return [run.signature for run in plan(sweep_settings(*words), cells(*words))]


TWO = ("model=random", "project.context=128,512", "project.sessions=1")
"""A grid of two cells."""


def test_a_changed_value_changes_the_cells_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signatures(*TWO)
    assert len(set(before)) == 2
    assert signatures(*TWO) == before
    wider = signatures("model=random", "project.context=128,512,2048", "project.sessions=1")
    assert wider[:2] == before
    assert set(wider[2:]).isdisjoint(before)
    assert set(signatures(*TWO, "seed=1")).isdisjoint(before)
    with monkeypatch.context() as patch:
        patch.setattr("matrix.sweep.hardware", lambda device: "a GPU")
        assert set(signatures(*TWO)).isdisjoint(before)


def test_what_changes_no_figure_changes_no_signature() -> None:
    before = signatures(*TWO)
    assert signatures(*TWO, "tracking=online", "network.port=7", "model.cache_dir=/tmp/x") == before
    assert signatures(*TWO, "matrix.time_limit_seconds=5", "matrix.launcher=ray") == before
    assert signatures(*TWO, "matrix.unsigned=[]") != before, "the list is what leaves them out"


def test_a_changed_file_changes_the_cells_that_name_it(tmp_path: Path) -> None:
    """One cell per adapter: a file of the first gets another byte, the same length and the same time."""
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "weights").write_bytes(b"0123")
    words = ["model=random", "project.context=64", "project.sessions=1", f"model.adapter={folders[0]},{folders[1]}"]
    before = signatures(*words)
    assert signatures(*words) == before
    weights = folders[0] / "deep" / "weights"
    when = weights.stat().st_mtime_ns
    weights.write_bytes(b"0124")
    os.utime(weights, ns=(when, when))
    changed = signatures(*words)
    assert changed[0] != before[0]
    assert changed[1] == before[1]
    weights.rename(weights.with_name("other"))
    assert signatures(*words)[0] != changed[0], "a name is content, too"
    unread = [*words, "matrix.contents=[]"]
    before = signatures(*unread)
    weights.write_bytes(b"0125")
    assert signatures(*unread) == before, "it is the list that has them read"


def test_a_draft_model_and_messages_are_files_that_cells_name(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    words = ["matrix=speculative", "model=random", "project.context=64", "project.sessions=1"]
    for key, file in {"project.draft.model": tmp_path / "model", "project.messages": tmp_path / "chat.json"}.items():
        changed = file / "weights" if file.is_dir() else file
        asked = [*words, f"{key}={file}"]
        changed.write_text("[0]")
        before = signatures(*asked)
        changed.write_text("[1]")
        assert signatures(*asked) != before, f"{key}: a kept cell would be one of other content"


def test_the_settings_that_name_files_are_those_that_the_commands_have(presets: dict[str, list[Cell]]) -> None:
    """Each key stands in at least one preset's cells, so that a renamed setting cannot fall out of the list."""
    settings = [found[0].settings for found in presets.values()]
    for key in sweep_settings().contents:
        group, _, name = key.rpartition(".")
        assert any(name in (look_up(one, group) or {}) for one in settings), key


def test_repeats_are_interleaved_and_each_has_its_own_result() -> None:
    words = ["project.context=32,64", "project.sessions=1", "matrix.repeats=3"]
    runs = plan(sweep_settings(*words), cells(*words))
    assert [(run.repeat, run.cell.point["project.context"]) for run in runs] == [
        (repeat, context) for repeat in range(3) for context in (32, 64)
    ]
    assert len({run.folder for run in runs}) == 6


def test_sources_are_code_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "simulations", tmp_path / "a_package", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.syspath_prepend(tmp_path)
    before = sources_digest(["a_package"])
    (tmp_path / "a_package" / "README.md").write_text("changed")
    (tmp_path / "a_package" / "page.html").write_text("changed")
    assert sources_digest(["a_package"]) == before
    file = tmp_path / "a_package" / "demo.py"
    file.write_text(file.read_text() + "\n")
    assert sources_digest(["a_package"]) != before
    with pytest.raises(UserError, match=r"^matrix.sources must name packages, got 'no_package'$"):
        sources_digest(["no_package"])
