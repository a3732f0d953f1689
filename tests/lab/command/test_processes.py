"""Roles as processes: what they say first and last, and names of folders with every sign on the way to them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lab.command.overrides import override
from lab.command.processes import NotReady, first_line, last_line, listening, run_to_end, start
from lab.settings import UserError

SIGNS = "-José, (a)=[b] {c} 'd' \"e\" $f%d #g\t\n."
"""A folder's name; all signs that a shell, Hydra, YAML or a format string reads something from."""


def test_a_role_that_is_not_ready_in_time_is_told_from_one_that_ended(tmp_path: Path) -> None:
    with start("lab.ping_pong", [], None, follows_stdin=True) as slow:
        with pytest.raises(NotReady, match=r"not ready within 0\.001 s") as caught:
            first_line(slow, 0.001)
        slow.kill()
    assert not caught.value.ended
    with (
        start("lab.command.explain", [], None) as silent,
        pytest.raises(NotReady, match="ended before it was ready") as caught,
    ):
        first_line(silent, 60)
    assert caught.value.ended


def test_a_role_that_follows_its_standard_input_ends_with_it() -> None:
    with start("lab.ping_pong", [], None, follows_stdin=True) as role:
        assert first_line(role, 60).keys() == {"raw", "frames"}
        assert role.stdin is not None
        role.stdin.close()
        assert role.wait(20) == 0


def test_a_role_that_does_not_start_has_its_last_words(tmp_path: Path) -> None:
    for module, words, kind, line in (
        (
            "simulations.link",
            ["seed=-1"],
            UserError,
            r"simulations\.link did not start: seed must be in \[0, 2\*\*31\), ",
        ),
        ("lab.command.explain", [], NotReady, r"lab\.command\.explain: it ended before it was ready \((?s:.*)says why"),
    ):
        with pytest.raises(kind, match=f"^{line}"), listening(module, words, tmp_path / SIGNS, 60):
            pytest.fail("must not listen")
        assert last_line(tmp_path / SIGNS) == "error: seed must be in [0, 2**31), got -1"


def test_a_last_line_is_not_taken_for_the_line_of_a_role_that_listens(tmp_path: Path) -> None:
    """As of a role that meets a full disk, or a signal, before it listens."""
    with (
        pytest.raises(NotReady, match=r"^split\.plan: it ended before it was ready \(.*says why\)$"),
        listening("split.plan", [], tmp_path, 60),
    ):
        pytest.fail("must not listen")


def test_names_with_every_sign_reach_all_processes_of_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainer and shards each have the results, cache, data, key and checkpoints where the words say; then a merge."""
    home = tmp_path / SIGNS
    home.mkdir()
    (home / "d.jsonl").write_text(
        "".join(json.dumps({"text": f"line {number} of these"}) + "\n" for number in range(6))
    )
    (home / "key").write_text("0123456789abcdef0123")
    (home / "key").chmod(0o600)
    cache = Path("~/.cache/distributed-llm-lab/models").expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    (home / "models").symlink_to(cache)  # what is proved of the model already
    monkeypatch.chdir(home)
    model = ["model=random", override("model.cache_dir", home / "models"), "device.threads=1", "tracking=none"]
    words = [
        *model, "project.local_shards=2", "project.steps=1", "project.data.source=jsonl",
        *("project.optimization.batch_size=2", "project.micro_batches=1", "project.data.sequence_length=16"),
        override("project.data.path", home / "d.jsonl"), override("network.key_file", home / "key"),
        f"project.checkpoints={home}/parts",  # as one would type it
    ]  # fmt: skip
    _, trained = run_to_end("split.train", words, home / "results", 120)
    assert Path(trained["run_folder"]) == home / "results"
    [step] = (home / "parts").glob("*/step-00000001")
    assert {path.name for path in step.iterdir()} == {"manifest.json", "shard-1", "shard-2"}
    merge = [*model, override("project.checkpoint", step), override("project.output", home / "merged")]
    _, merged = run_to_end("split.merge", merge, home / "merging", 120)
    assert Path(merged["output"]) == home / "merged"
    assert (home / "merged" / "adapter_model.safetensors").exists()
    assert {path.name for path in home.iterdir()} == {
        "d.jsonl",
        "key",
        "models",
        "parts",
        "results",
        "merged",
        "merging",
    }
    assert [path.name for path in tmp_path.iterdir()] == [SIGNS], "no second tree of folders with an escaped name"
