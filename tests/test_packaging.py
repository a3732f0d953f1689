"""What is installed is whole: a wheel's console scripts find conf/ far from any checkout."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from lab import environment
from tests.test_safety import PACKAGES, ROOT

DEADLINE = 180.0
INSTALLED = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
"""Where the dependencies are."""


def test_every_list_of_our_packages_is_the_same() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    found = sorted(place.parent.name for place in ROOT.glob("*/__init__.py"))
    assert sorted(PACKAGES) == found
    assert sorted(tools["hatch"]["build"]["targets"]["wheel"]["packages"]) == found
    assert sorted(tools["mypy"]["packages"]) == found
    matrix = yaml.safe_load((ROOT / "conf" / "matrix.yaml").read_text(encoding="utf-8"))["matrix"]
    assert sorted(matrix["sources"]) == sorted(environment.PACKAGES), "all code, and no values"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a wheel is built from, without the results and caches of this checkout."""
    place = tmp_path_factory.mktemp("sources")
    for name in (*PACKAGES, "tests"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place)
    return place


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("wheel")
    # pip fetches the build backend where it is not installed.
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *isolation, "--wheel-dir", str(place)]
    done = subprocess.run([*command, str(sources)], capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = place.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked as an installation has it."""
    place = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    return place


def test_wheel_holds_the_packages_their_values_and_types(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    sources = {
        file.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for pattern in ("*.py", "*.yaml", "*.html", "py.typed")
        for file in (ROOT / package).rglob(pattern)
    }
    assert sources <= names
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert "conf/__init__.py" in names
    assert len([name for name in names if name.endswith(".yaml")]) >= 10
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == set(PACKAGES), "no tests, no results"
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def run_script(site: Path, elsewhere: Path, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What a console script does: import the module, call its main.

    -P keeps the working folder off sys.path, -S an editable installation of this checkout.
    """
    body = f"import sys, {module} as m; sys.argv[0] = 'script'; m.main()"
    return subprocess.run(
        [sys.executable, "-P", "-S", "-c", body, *arguments],
        cwd=elsewhere,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(site), *INSTALLED])},
        check=False,
    )


def test_console_script_finds_conf_outside_the_checkout(site: Path, tmp_path: Path) -> None:
    done = run_script(site, tmp_path, "simulations.demo", "--cfg", "job", "model=random", "seed=7")
    assert done.returncode == 0, done.stderr
    assert "seed: 7\n" in done.stdout
    assert "name: random-1M\n" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_conf_of_the_installation_is_the_one_that_is_read(site: Path, tmp_path: Path) -> None:
    """A value that only the installed copy has: the checkout's conf/ is not what answers."""
    marked = tmp_path / "site"
    shutil.copytree(site, marked)
    file = marked / "conf" / "model" / "random.yaml"
    file.write_text(file.read_text().replace("name: random-1M", "name: installed-copy"))
    done = run_script(marked, tmp_path, "simulations.demo", "--cfg", "job", "model=random")
    assert "name: installed-copy\n" in done.stdout, done.stderr


@pytest.mark.parametrize("missing", ["conf/__init__.py", "conf/model/random.yaml"])
def test_an_incomplete_wheel_is_noticed(site: Path, tmp_path: Path, missing: str) -> None:
    """The negative control: without these files an installed script fails."""
    broken = tmp_path / "site"
    shutil.copytree(site, broken)
    (broken / missing).unlink()
    done = run_script(broken, tmp_path, "simulations.demo", "--cfg", "job", "model=random")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")


def test_every_script_names_a_function(site: Path) -> None:
    (entry_points,) = site.glob("*.dist-info/entry_points.txt")
    lines = [line for line in entry_points.read_text().splitlines() if "=" in line]
    assert len(lines) >= 2
    for line in lines:
        module, _, function = line.partition("=")[2].strip().partition(":")
        file = site / Path(*module.split(".")).with_suffix(".py")
        defined = rf"^(def {function}\(|{function} = entry\.command\()"
        assert re.search(defined, file.read_text(), re.MULTILINE), line
