"""`make clients`: what people own, against a real server. Each of them in a virtual environment of its own.

    python -m tests.clients [stock npm openai_tests lm_eval]

Prints one line of JSON with the rows, as benchmarks do. Exit code 1 when a row does not hold.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import venv
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lab.command.entry import compose_settings
from lab.models.sources import fetch
from serve.settings import ServeSettings
from tests.speculative.processes import Role, role, wait_until

HERE = Path(__file__).resolve().parent
BUILD = Path("build/clients").resolve()
STOCK = ("openai", "litellm", "langchain-openai", "llm", "instructor")
NPM = ("openai", "ai", "@ai-sdk/openai-compatible")
OPENAI_TESTS = ("pytest", "pytest-asyncio", "aiohttp", "httpx-aiohttp", "rich")
MODULES = {
    "test_models.py": "gpt-6-astra",
    "test_completions.py": "gpt-3.5-turbo-instruct",
    "chat/test_completions.py": "gpt-6-astra",
}
"""Tests of openai-python, each with the model that it asks for."""
SECONDS = 1800
SERVER = ("tracking=none", "network.port=0", "project.context=1024", "project.max_new_tokens=24")
FLOAT32_DIGIT = 2.0**-23
"""Relative step of float32."""

Row = dict[str, Any]


def stock() -> Iterator[Row]:
    """Stock clients of Python, each with a stream and without one; instructor with a schema."""
    python = environment("stock", STOCK)
    own = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    with serving() as server:
        yield from _as_rows(run([python, HERE / "stock.py", *_where(server)], env=own))


def npm() -> Iterator[Row]:
    """Stock clients of npm, where node is."""
    if shutil.which("npm") is None:
        return
    folder = BUILD / "npm"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "package.json").write_text("{}", encoding="utf-8")
    run(["npm", "install", "--silent", "--no-audit", "--no-fund", *NPM], cwd=folder)
    shutil.copy(HERE / "stock.mjs", folder)
    with serving() as server:
        yield from _as_rows(run(["node", "stock.mjs", *_where(server)], cwd=folder))


def openai_tests() -> Iterator[Row]:
    """openai-python's own tests, against this server and against `transformers serve`."""
    python = environment("openai", ("openai", *OPENAI_TESTS))
    sources = openai_sources(python)
    refused = json.loads((HERE / "refused.json").read_text(encoding="utf-8"))
    ours: list[tuple[str, str, bool]] = []
    for name, model in MODULES.items():
        with serving(f"project.model_id={model}") as server:
            ours += tested(python, sources, name, str(server.ready["base_url"]))
    theirs: list[tuple[str, str, bool]] = []
    with transformers_serve() as base:
        for name in MODULES:
            theirs += tested(python, sources, name, base)
    failed = {(name, case) for name, case, passed in ours if not passed}
    unlisted = sorted(
        f"{name}: {case}" for name, case in failed if not any(f"_{part}" in case for part in refused[name])
    )
    shares = [sum(passed for *_, passed in cases) / len(cases) for cases in (ours, theirs)]
    yield {
        "part": "openai_tests",
        "client": "openai",
        "version": sources.name.rpartition("-")[2],
        "cases": len(ours),
        "passed_share": shares[0],
        "refused": len(failed),
        "failed_without_a_reason": unlisted,
        "transformers_serve_share": shares[1],
        "target": "failed_without_a_reason none, passed_share over transformers_serve_share",
        "holds": not unlisted and shares[0] > shares[1],
    }


def lm_eval() -> Iterator[Row]:
    """lm-eval over HTTP, and on the same weights in process."""
    python = environment("lm_eval", ("lm-eval[api]", "datasets"), sees_lab=True)
    settings = compose_settings("serve", "tracking=none", ServeSettings)
    folder = fetch(settings.model, None).path
    with serving() as server:
        served = json.loads(run([python, HERE / "evaluate.py", "local-completions", *_where(server)]))
    whole = json.loads(run([python, HERE / "evaluate.py", "hf", folder, "-"]))
    pairs = [
        (ours, theirs)
        for one, other in zip(served["scores"], whole["scores"], strict=True)
        for ours, theirs in zip(one, other, strict=True)
    ]
    digits = max(abs(ours[0] - theirs[0]) / abs(theirs[0]) / FLOAT32_DIGIT for ours, theirs in pairs)
    equal = served["acc"] == whole["acc"] and served["acc_norm"] == whole["acc_norm"]
    yield {
        "part": "lm_eval",
        "items": len(whole["scores"]),
        "acc": served["acc"],
        "acc_in_process": whole["acc"],
        "acc_norm": served["acc_norm"],
        "acc_norm_in_process": whole["acc_norm"],
        "greedy_differs": sum(ours[1] != theirs[1] for ours, theirs in pairs),
        "largest_difference": max(abs(ours[0] - theirs[0]) for ours, theirs in pairs),
        "largest_difference_in_float32_steps": digits,
        "target": "acc and acc_norm equal, greedy_differs 0",
        "holds": equal and all(ours[1] == theirs[1] for ours, theirs in pairs),
    }


PARTS: dict[str, Callable[[], Iterator[Row]]] = {part.__name__: part for part in (stock, npm, openai_tests, lm_eval)}


def environment(name: str, packages: Sequence[str], *, sees_lab: bool = False) -> Path:
    """The Python of a virtual environment with these packages, made if it is not there."""
    folder = BUILD / name
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        run([python, "-m", "pip", "install", "--quiet", *packages])
        if sees_lab:  # torch and transformers are ours, not a second copy of them
            [site] = (folder / "lib").glob("python*/site-packages")
            (site / "lab.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
        (folder / "ready").touch()
    return python


def openai_sources(python: Path) -> Path:
    """The sources of the openai package that is installed there, its tests among them."""
    asked = "import importlib.metadata as m; print(m.version('openai'))"
    version = run([python, "-c", asked]).strip()
    folder = BUILD / f"openai-{version}"
    if not folder.exists():
        build = ("hatchling", "hatch-fancy-pypi-readme")
        run([python, "-m", "pip", "install", "--quiet", *build])
        options = ("--quiet", "--no-binary", ":all:", "--no-deps", "--no-build-isolation", "--dest", BUILD)
        run([python, "-m", "pip", "download", *options, f"openai=={version}"])
        with tarfile.open(BUILD / f"openai-{version}.tar.gz") as archive:
            archive.extractall(BUILD, filter="data")
    return folder


def tested(python: Path, sources: Path, name: str, base: str) -> list[tuple[str, str, bool]]:
    """Each case of one module of tests, and whether it passed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ("-q", "-o", "addopts=", "-p", "no:cacheprovider", f"--junitxml={report}")
        command = [python, "-m", "pytest", *options, f"tests/api_resources/{name}"]
        own = os.environ | {"TEST_API_BASE_URL": base}
        subprocess.run(list(map(str, command)), cwd=sources, env=own, stdout=sys.stderr, timeout=SECONDS, check=False)
        cases = list(ET.parse(report).iter("testcase"))
    assert cases, f"no test of {name} ran"
    return [(name, case.get("name", ""), not list(case.iter("failure")) + list(case.iter("error"))) for case in cases]


@contextmanager
def serving(*words: str) -> Iterator[Role]:
    """Our server over SmolLM2."""
    with tempfile.TemporaryDirectory() as folder, role("serve", *SERVER, f"project.journal={folder}", *words) as one:
        yield one


@contextmanager
def transformers_serve() -> Iterator[str]:
    """`transformers serve` over the same weights; yields where its API begins."""
    import socket

    settings = compose_settings("serve", "tracking=none", ServeSettings)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", fetch(settings.model, None).path]
    options = ["--host", "127.0.0.1", "--port", port, "--device", "cpu", "--dtype", "float32"]
    process = subprocess.Popen(list(map(str, [*command, *options])), stdout=sys.stderr, stderr=sys.stderr)

    def is_ready() -> bool:
        assert process.poll() is None, "transformers serve ended"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    try:
        wait_until(is_ready, "transformers serve", 300)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def run(command: Sequence[object], **options: Any) -> str:
    """The last line that a command prints on stdout."""
    done = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, text=True, timeout=SECONDS, check=True, **options
    )
    return (done.stdout.strip().splitlines() or [""])[-1]


def _where(server: Role) -> tuple[str, str]:
    return str(server.ready["base_url"]), str(server.ready["models"][0])


def _as_rows(line: str) -> Iterator[Row]:
    for found in json.loads(line):
        yield {"part": "stock_clients", **found, "target": "fault none", "holds": not found["fault"]}


def main(names: Sequence[str]) -> int:
    names = [name for name in names if not name.startswith("hydra.run.dir=")]  # `make bench` says it to everyone
    if unknown := set(names) - set(PARTS):
        print(f"error: part must be one of {', '.join(PARTS)}, got {min(unknown)}", file=sys.stderr)
        return 2
    rows = [row for name in names or PARTS for row in PARTS[name]()]
    print(json.dumps({"rows": rows}))
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
