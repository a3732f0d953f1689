"""The commit and versions that stand beside every figure are the true ones."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from lab import environment


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """Both functions remember their answer."""
    environment.commit.cache_clear()
    environment.describe_environment.cache_clear()
    yield
    environment.commit.cache_clear()
    environment.describe_environment.cache_clear()


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit, that `lab/environment.py` seems to live in."""
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "environment.py").write_text("one\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "first", "--no-verify")
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "lab" / "environment.py"))
    return tmp_path


def test_commit_of_a_clean_checkout(checkout: Path) -> None:
    assert environment.commit() == git(checkout, "rev-parse", "HEAD")[:12]


def test_changed_files_are_marked_and_new_ones_are_not(checkout: Path) -> None:
    (checkout / "new.txt").write_text("results of a run\n")
    assert environment.commit() == git(checkout, "rev-parse", "HEAD")[:12]
    (checkout / "lab" / "environment.py").write_text("two\n")
    environment.commit.cache_clear()
    assert environment.commit() == git(checkout, "rev-parse", "HEAD")[:12] + "+"


def test_a_report_that_was_written_again_is_no_change(checkout: Path) -> None:
    page = checkout / "benchmarks" / "RESULTS.md"
    page.parent.mkdir()
    page.write_text("old\n")
    git(checkout, "add", ".")
    git(checkout, "commit", "--quiet", "--message", "a page", "--no-verify")
    page.write_text("new\n")
    assert environment.commit() == git(checkout, "rev-parse", "HEAD")[:12]


def test_commit_is_null_without_a_checkout_or_git(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    assert environment.commit() is None
    environment.commit.cache_clear()
    monkeypatch.setattr(environment, "__file__", str(checkout / "site" / "lab" / "environment.py"))
    assert environment.commit() is None


def test_environment_is_json_and_true() -> None:
    found = json.loads(json.dumps(environment.describe_environment()))
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["torch"] == metadata.version("torch")
    assert found["machine"]["cores"] == os.cpu_count()
    assert found["machine"]["processor"]


def test_absent_package_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "LIBRARIES", ("no-such-package-anywhere",))
    assert environment.describe_environment()["versions"]["no-such-package-anywhere"] is None


def test_processor_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(self: Path, *arguments: object, **options: object) -> str:
        raise OSError

    monkeypatch.setattr(Path, "read_text", absent)
    assert environment._processor() == (platform.processor() or platform.machine())
