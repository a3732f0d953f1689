"""`make clients`: what people own, against a real server. Each of them in a virtual environment of its own.

    python -m tests.clients [stock npm openai_tests schemathesis lm_eval]

Prints one line of JSON with the rows, as benchmarks do. Exit code 1 when a row does not hold.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import venv
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any, TypedDict

from lab.command.entry import compose_settings
from lab.models.sources import fetch
from serve.settings import ServeSettings
from tests.serve import http_fuzz
from tests.serve.chat_server import chat_server
from tests.speculative.processes import Role, role, wait_until

HERE = Path(__file__).resolve().parent
BUILD = Path("build/clients").resolve()
STOCK = ("openai", "litellm", "langchain-openai", "llm", "instructor")
NPM = ("openai", "ai", "@ai-sdk/openai-compatible")
OPENAI_TESTS = ("pytest", "pytest-asyncio", "aiohttp", "httpx-aiohttp", "rich")
MODULES = {
    "gpt-6-astra": ("test_models.py", "chat/test_completions.py"),
    "gpt-3.5-turbo-instruct": ("test_completions.py",),
}
"""Tests of openai-python by the model that they ask for."""
SECONDS = 1800
NEW_TOKENS = 24
MOST_NEW = f"project.max_new_tokens={NEW_TOKENS}"
SERVER = ("tracking=none", "network.port=0", "project.context=1024", MOST_NEW)
EXAMPLES = 100
"""Most requests of schemathesis for each path, besides those at the edges of each rule."""
FLOATS = ("float32", "float64")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""As our server has: two threads wait for each other on a busy machine."""
MOST_ROUNDING = 2.0
"""Most rounding error of the server's scores over that of the model in process: both are largest ones of 200 draws."""

Row = dict[str, Any]
Score = tuple[float, bool]
"""Log probability of a choice in nats, and whether it is the greedy answer."""


class Outcome(Enum):
    """How a case of openai-python's tests ended."""

    passed = "passed"
    failed = "failed"
    skipped = "skipped"
    unstarted = "unstarted"
    """A fixture or an import failed: it says nothing of the server."""


@dataclass(frozen=True)
class Case:
    """One case of openai-python's tests."""

    name: str
    """module::class::function[parameters]."""
    outcome: Outcome
    fault: str = ""


class Refusal(TypedDict):
    """Cases that this server refuses (`refused.json`)."""

    reason: str
    says: str
    """Part of the message with which each of them fails."""
    cases: list[str]


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
    """openai-python's own tests, against this server and against `transformers serve`, over the same small random
    model: they judge types and not texts."""
    python = environment("openai", ("openai", *OPENAI_TESTS))
    sources = openai_sources(python)
    ours: list[Case] = []
    theirs: list[Case] = []
    with tempfile.TemporaryDirectory() as folder:
        for model, names in MODULES.items():
            with chat_server(Path(folder), f"project.model_id={model}", MOST_NEW) as server:
                for name in names:
                    ours += tested(python, sources, name, str(server.ready["base_url"]))
        for model, names in MODULES.items():
            with transformers_serve(Path(folder) / "model", model) as base:
                for name in names:
                    theirs += tested(python, sources, name, base)
    yield {
        "part": "openai_tests",
        "client": "openai",
        "version": sources.name.rpartition("-")[2],
        "transformers": version("transformers"),
        **judged(ours, theirs, json.loads((HERE / "refused.json").read_text(encoding="utf-8"))),
        "target": "passed_share over transformers_serve_share; every case that fails is listed with its reason, fails "
        "for it, and every listed case fails; every case starts on both servers",
    }


def judged(ours: Sequence[Case], theirs: Sequence[Case], refused: Sequence[Refusal]) -> Row:
    """What the cases of both servers say: figures, and whether they hold."""
    reasons = {name: refusal for refusal in refused for name in refusal["cases"]}
    failed = {case.name: case.fault for case in ours if case.outcome is Outcome.failed}
    unlisted = sorted(set(failed) - set(reasons))
    stale = sorted(set(reasons) - set(failed))
    other = sorted(name for name in set(failed) & set(reasons) if reasons[name]["says"] not in failed[name])
    unstarted = [sorted(case.name for case in cases if case.outcome is Outcome.unstarted) for cases in (ours, theirs)]
    shares = [_share(cases) for cases in (ours, theirs)]
    same_cases = {case.name for case in ours} == {case.name for case in theirs}
    return {
        "cases": len(ours),
        "skipped": sum(case.outcome is Outcome.skipped for case in ours),
        "passed_share": shares[0],
        "transformers_serve_share": shares[1],
        "refused": {refusal["reason"]: len(refusal["cases"]) for refusal in refused},
        "failed_without_a_reason": unlisted,
        "failed_for_another_reason": other,
        "listed_but_not_failed": stale,
        "not_started": unstarted[0],
        "transformers_serve_not_started": unstarted[1],
        "same_cases": same_cases,
        "holds": not any((unlisted, other, stale, *unstarted)) and same_cases and shares[0] > shares[1],
    }


def _share(cases: Sequence[Case]) -> float:
    """The passed ones among those that ran."""
    ran = [case for case in cases if case.outcome in (Outcome.passed, Outcome.failed)]
    return sum(case.outcome is Outcome.passed for case in ran) / len(ran)


def schemathesis() -> Iterator[Row]:
    """Requests that schemathesis makes from the OpenAPI document, right and wrong ones, to a small random model."""
    python = environment("schemathesis", ("schemathesis",))
    words = (*http_fuzz.WORDS, "project.context=128")  # a request may ask for as many tokens as there is room for
    with tempfile.TemporaryDirectory() as name, chat_server(Path(name), *words) as server:
        report = Path(name) / "report.json"
        checks = ("--checks", "not_a_server_error", "--phases", "examples,coverage,fuzzing", "--continue-on-failure")
        options = ("--max-examples", EXAMPLES, "--seed", 1, "--generation-database", "none")
        deadline = ("--request-timeout", http_fuzz.ANSWER_SECONDS)
        written = ("--report", "json", "--report-json-path", report)
        address = f"http://127.0.0.1:{server.port}/openapi.json"
        command = [python.with_name("schemathesis"), "run", *checks, *options, *deadline, *written, address]
        known = http_fuzz.Fuzzer(server).known_text
        before = known()
        subprocess.run(list(map(str, command)), cwd=name, stdout=sys.stderr, timeout=SECONDS, check=False)
        found = json.loads(report.read_text(encoding="utf-8"))
        same_text, tracebacks = before == known(), server.stderr().count("Traceback")
    yield {
        "part": "schemathesis",
        "client": "schemathesis",
        "version": found["schemathesis_version"],
        "paths": found["operations"]["tested"],
        "requests": found["test_cases"]["generated"],
        "failures": found["test_cases"]["unique_failures"],
        "errors": [error["title"] for error in found["errors"]],
        "tracebacks": tracebacks,
        "same_text_after": same_text,
        "target": "every path tested, no 5xx, no traceback, the same text afterwards",
        "holds": found["exit_code"] == 0 and found["complete"] and not tracebacks and same_text,
    }


def lm_eval() -> Iterator[Row]:
    """lm-eval over HTTP, and on the same weights in process, in float32 and in float64."""
    python = environment("lm_eval", ("lm-eval[api]", "datasets"), sees_lab=True)
    settings = compose_settings("serve", "tracking=none", ServeSettings)
    folder = fetch(settings.model, None).path
    with serving() as server:
        served = json.loads(run([python, HERE / "evaluate.py", "local-completions", *_where(server)]))
    hf = [python, HERE / "evaluate.py", "hf", folder]
    whole, exact = (json.loads(run([*hf, dtype], env=os.environ | ONE_THREAD)) for dtype in FLOATS)
    yield {
        "part": "lm_eval",
        "client": "lm-eval",
        "version": served["version"],
        "transformers": version("transformers"),
        **compared(served, whole, exact, _same_choices()),
        "target": "acc, acc_norm and greedy answers equal, no tie broken, rounding at most "
        f"{MOST_ROUNDING:g} x rounding_in_process",
    }


def compared(served: Row, whole: Row, exact: Row, same_choices: Sequence[tuple[int, int, int]]) -> Row:
    """The scores of a server against those of the same model in process, and whether they agree.

    Both add the same float32 numbers, in different orders: the server attends to a cache that is filled up to a whole
    bucket, over which kernels add in other blocks. So neither is exact. Float64 shows how many digits float32 gives:
    the scores in process differ from it by their rounding, and the server's must be as near to it.

    Args:
        served, whole, exact: What `evaluate.py` prints, over HTTP, in process in float32, in process in float64.
        same_choices: Items with the same word twice, and the two choices: ties.
    """
    ours, theirs, true = ([one for item in found["scores"] for one in item] for found in (served, whole, exact))
    rounding, rounding_in_process = _largest(ours, true), _largest(theirs, true)
    greedy = sum(one[1] != other[1] for one, other in zip(ours, theirs, strict=True))
    untied = sum(served["scores"][item][one] != served["scores"][item][other] for item, one, other in same_choices)
    equal = served["acc"] == whole["acc"] and served["acc_norm"] == whole["acc_norm"]
    return {
        "items": len(served["scores"]),
        "acc": served["acc"],
        "acc_in_process": whole["acc"],
        "acc_norm": served["acc_norm"],
        "acc_norm_in_process": whole["acc_norm"],
        "greedy_differs": greedy,
        "ties": len(same_choices),
        "ties_broken": untied,
        "largest_difference": _largest(ours, theirs),
        "rounding": rounding,
        "rounding_in_process": rounding_in_process,
        "holds": equal and not greedy and not untied and rounding <= MOST_ROUNDING * rounding_in_process,
    }


def _largest(scores: Sequence[Score], others: Sequence[Score]) -> float:
    """The largest difference of two log probabilities of the same choice, in nats."""
    return max(abs(one[0] - other[0]) for one, other in zip(scores, others, strict=True))


def _same_choices() -> list[tuple[int, int, int]]:
    """Of each item with a word twice among its choices: the item, and these two."""
    items = [json.loads(line) for line in (HERE / "cloze.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        (number, one, other)
        for number, item in enumerate(items)
        for one, other in combinations(range(len(item["choices"])), 2)
        if item["choices"][one] == item["choices"][other]
    ]


PARTS: dict[str, Callable[[], Iterator[Row]]] = {
    part.__name__: part for part in (stock, npm, openai_tests, schemathesis, lm_eval)
}


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
    found = run([python, "-c", asked]).strip()
    folder = BUILD / f"openai-{found}"
    if not folder.exists():
        build = ("hatchling", "hatch-fancy-pypi-readme")
        run([python, "-m", "pip", "install", "--quiet", *build])
        options = ("--quiet", "--no-binary", ":all:", "--no-deps", "--no-build-isolation", "--dest", BUILD)
        run([python, "-m", "pip", "download", *options, f"openai=={found}"])
        with tarfile.open(BUILD / f"openai-{found}.tar.gz") as archive:
            archive.extractall(BUILD, filter="data")
    return folder


def tested(python: Path, sources: Path, name: str, base: str) -> list[Case]:
    """The cases of one module of tests."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ("-q", "-o", "addopts=", "-p", "no:cacheprovider", f"--junitxml={report}")
        command = [python, "-m", "pytest", *options, f"tests/api_resources/{name}"]
        own = os.environ | {"TEST_API_BASE_URL": base}
        subprocess.run(list(map(str, command)), cwd=sources, env=own, stdout=sys.stderr, timeout=SECONDS, check=False)
        found = list(ET.parse(report).iter("testcase"))
    assert found, f"no test of {name} ran"
    return [_case(name, case) for case in found]


def _case(module: str, case: ET.Element) -> Case:
    """A case of a report in JUnit's format, in which an error is one before or after the case itself."""
    name = f"{module}::{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
    for kind, outcome in (("error", Outcome.unstarted), ("failure", Outcome.failed), ("skipped", Outcome.skipped)):
        if (fault := case.find(kind)) is not None:
            return Case(name, outcome, f"{fault.get('message')} {fault.text}")
    return Case(name, Outcome.passed)


@contextmanager
def serving(*words: str) -> Iterator[Role]:
    """Our server over SmolLM2."""
    with tempfile.TemporaryDirectory() as folder, role("serve", *SERVER, f"project.journal={folder}", *words) as one:
        yield one


@contextmanager
def transformers_serve(folder: Path, model: str) -> Iterator[str]:
    """`transformers serve` over a model's folder; yields where its API begins.

    It serves requests for one name only, that of its folder: so it gets the folder under the name that is asked for. It
    lists the models of a cache, and fails where there is no folder for one. Where a request names no number, it makes
    1024 tokens at least, and no option says otherwise: so the model's own configuration makes a text end soon after
    the number of tokens that our server makes then.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    generation = folder / "generation_config.json"
    ends = {"exponential_decay_length_penalty": [NEW_TOKENS, 100.0]}
    generation.write_text(json.dumps(json.loads(generation.read_text(encoding="utf-8")) | ends), encoding="utf-8")
    (folder.parent / model).symlink_to(folder, target_is_directory=True)
    command = [Path(sys.executable).with_name("transformers").absolute(), "serve", model]
    options = ["--host", "127.0.0.1", "--port", port, "--device", "cpu", "--dtype", "float32"]
    own = os.environ | ONE_THREAD | {"HF_HUB_CACHE": str(folder.parent), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        list(map(str, [*command, *options])), cwd=folder.parent, stdout=sys.stderr, stderr=sys.stderr, env=own
    )

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
        wait_until(is_ready, "transformers serve, after the tests,", 60)
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
