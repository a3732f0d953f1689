"""A real SuperLink with TLS and keys and real SuperNodes, each with a file of its own: what it gives, whom it refuses.

The commands are those that `python -m fl.certificates` prints. One deployment serves all tests: every message costs a
new client process, most of whose time are its imports. The last test ends it.
"""

from __future__ import annotations

import io
import json
import logging
import re
import signal
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from flwr.app import Context, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.clientapp import ClientApp

from fl import certificates
from fl.client import Site, read_split
from fl.client_app import site_of
from fl.run.folders import claim
from fl.server_app import deployed
from fl.settings import FederatedSettings
from lab.command.entry import compose_settings
from lab.models.conversion import byte_tokenizer
from lab.settings import UserError
from tests.federated import InProcessGrid
from tests.fl.deployment import Deployment, Program, adapters, copy_checkout, wait_for
from tests.fl.deployment import deployed as deployed_sites
from tests.fl.two_sites import ROOT, SITES


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_checkout(tmp_path_factory.mktemp("app") / "checkout")


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, checkout: Path) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("deployment")
    with deployed_sites(folder, checkout) as here:
        here.watch(folder / "watched", f"project.num_clients={len(SITES)}")
        yield here


@pytest.mark.real
@pytest.mark.timeout(600)
def test_strangers_are_refused(deployment: Deployment, tmp_path: Path) -> None:
    """The nodes of the run below are started in the same way, but for a key or a certificate, and take part."""
    certificates.make_site(deployment.folder, "mallory")
    other = certificates.make_server(tmp_path, ["localhost"], deployment.port)
    refused = [
        (deployment.node("mallory"), "Failed to activate SuperNode"),
        (deployment.node("mallory", key=False), "must be registered"),
        (deployment.node("mallory", "--max-retries", "1", authority=other.authority), "CERTIFICATE_VERIFY_FAILED"),
    ]
    try:
        for node, reason in refused:
            assert node.wait() == 1, node.text
            assert reason in node.text
    finally:
        for node, _ in refused:
            node.kill()
    assert deployment.flwr("list", "lab", server=other).returncode == 1
    assert deployment.flwr("list", "lab").returncode == 0


@pytest.mark.real
@pytest.mark.timeout(600)
def test_deployed_is_simulated(deployment: Deployment, simulated: Path) -> None:
    """Same settings and seed, every site taking part: the same bytes in every round, although the server is killed
    after the first one. What watches the run submits it again, and says so with its last line and exit code."""
    [watched], folder = deployment.watching, deployment.folder / "watched"
    first = folder / "attempt-1/adapters/round-0001"
    wait_for("round 1", first.exists, watched, deployment.superlink)
    (server,) = [member for member in deployment.superlink.family() if "flwr-serverapp" in "".join(member.cmdline())]
    server.kill()
    assert watched.wait() == 0, watched.text
    expected, got = adapters(simulated), adapters(folder)
    assert list(got) == ["round-0000", "round-0001", "round-0002"]
    assert len(set(got.values())) == 3, "training changes the adapter in every round"
    assert got == expected
    last = json.loads(watched.text.splitlines()[-1])
    assert last == json.loads((folder / "result.json").read_text())
    assert (last["status"], last["rounds_completed"], last["num_clients"], last["attempts"]) == ("ok", 2, 2, 2)
    assert re.fullmatch(r"the server's process of run \d+ is gone", last["failures"][0])
    assert Path(last["adapter_path"], "adapter_model.safetensors").read_bytes() == got["round-0002"]
    assert not list(folder.glob("attempt-*/")), "all is where the user asked for it"
    assert "round 1 of 2" in watched.text, "the log was streamed"
    assert len(deployment.workers()) == len(SITES), "each site has kept its model and data"
    assert deployment.leaking() == []
    (folder / "leak").write_bytes((deployment.folder / "alice.jsonl").read_bytes())
    assert deployment.leaking() == ["watched/leak"], "a negative control"
    theirs = json.loads((simulated / "result.json").read_text())
    assert last["eval_loss_by_round"] == theirs["eval_loss_by_round"]


@pytest.mark.real
@pytest.mark.timeout(600)
def test_a_failed_run_keeps_its_rounds_and_nobody_leaves_a_process_behind(deployment: Deployment) -> None:
    alice, bob = (deployment.nodes[site] for site in SITES)
    assert len(bob.family()) >= 2, "a SuperNode starts others"
    assert bob.end(signal.SIGTERM) == []
    run_id = deployment.run("project.num_clients=1")
    wait_for("round 1", lambda: "round-0001" in deployment.adapters(run_id), alice, deployment.superlink)
    wait_for("client of round 2", lambda: clients(alice), alice, deployment.superlink)
    assert alice.end(signal.SIGTERM) == []

    log, status, details = deployment.finished(run_id)
    assert status == "finished:failed", log
    assert "train round 2 ended without one good reply" in details
    assert [line for line in log.splitlines() if "the run failed: train round 2 ended without" in line]
    kept, whole = deployment.adapters(run_id), adapters(deployment.folder / "watched")
    assert list(kept) == ["round-0000", "round-0001"]
    assert kept["round-0000"] == whole["round-0000"], "same seed, same start"
    assert kept["round-0001"] != whole["round-0001"], "one site is not two"

    assert len(deployment.superlink.family()) >= 2
    assert deployment.superlink.end(signal.SIGINT) == []
    wait_for("end of the workers", lambda: not deployment.workers())
    assert [path for path in (deployment.server.flower_home / "warm").rglob("*") if path.is_file()] == [], (
        "their keys are gone"
    )


def clients(node: Program) -> list[psutil.Process]:
    """The client processes of a SuperNode that are at work."""
    return [member for member in node.family() if any("flwr-clientapp" in word for word in member.cmdline())]


def run_context(overrides: str, **node: Any) -> Context:
    return Context(
        run_id=7,
        node_id=1,
        node_config={key.replace("_", "-"): value for key, value in node.items()},
        state=RecordDict(),
        run_config={"config-name": "fed_learn", "overrides": overrides},
    )


@pytest.fixture
def _logging_as_before() -> Iterator[None]:
    """The app sets up the logging of a process that is its own."""
    root, flower = logging.getLogger(), logging.getLogger("flwr")
    before = root.handlers[:], root.level, flower.propagate
    yield
    root.handlers[:], root.level, flower.propagate = before


@pytest.mark.usefixtures("_logging_as_before")
@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ("project.rounds=0", "project.rounds must be at least 1, got 0"),
        ("project.round=1", "project.round must be "),
        ("project.data.source=hub", "project.data.repo must be set for source=hub"),
    ],
)
def test_a_bad_override_ends_the_run_with_one_line(
    overrides: str, line: str, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower puts what is raised here into `flwr list`, as the failed run above shows."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(line)):
        deployed(InProcessGrid(ClientApp(), 1), run_context(overrides))
    printed = capfd.readouterr().err
    assert f"the run failed: {line}" in printed
    assert printed.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_logging_as_before")
def test_a_run_does_not_begin_in_the_folder_of_another(tmp_path: Path) -> None:
    """`python -m fl.run` may have submitted it twice."""
    claim(tmp_path, "6")
    context = run_context("model=random")
    context.run_config["folder"] = str(tmp_path)
    with pytest.raises(UserError, match="folder must be of no other run, got"):
        deployed(InProcessGrid(ClientApp(), 1), context)
    assert [file.name for file in tmp_path.iterdir()] == ["process.json"], "no result.json in place of the other's"


@pytest.mark.parametrize("value", ["zero", -1, 0.5, None])
def test_a_node_says_which_site_it_is(value: object) -> None:
    with pytest.raises(UserError, match="partition-id of --node-config must be a whole number from 0 on, got"):
        site_of(run_context("", partition_id=value))


def test_a_file_of_its_own_is_not_passed_over(tmp_path: Path) -> None:
    """The default source is the Python library: a node that names a file must not train on that instead."""
    settings = compose_settings("fed_learn", "model=random", FederatedSettings)
    with pytest.raises(UserError, match="must be jsonl or text for sites' own files, got 'python_stdlib'"):
        read_split(settings, Site(0, str(tmp_path / "own.jsonl")), byte_tokenizer())


def test_the_app_bundle_is_small_and_whole(checkout: Path) -> None:
    assert (checkout / "tests").is_dir(), "there is more than travels"
    bundle = build_fab_from_disk(checkout)
    assert len(bundle) < 1_500_000  # Flower takes ten times as much
    names = set(zipfile.ZipFile(io.BytesIO(bundle)).namelist())
    sources = {
        file.relative_to(ROOT).as_posix() for package in ("fl", "lab") for file in ROOT.glob(f"{package}/**/*.py")
    }
    configs = {file.relative_to(ROOT).as_posix() for file in ROOT.glob("conf/**/*.yaml")}
    assert len(sources) > 20
    assert len(configs) > 8
    assert names == sources | configs | {"conf/__init__.py", "pyproject.toml", ".info/CONTENT"}
