"""What makes the requests of part load: guidellm, or threads of ours."""

from __future__ import annotations

import json
import math
import os
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from typing_extensions import override

from lab.settings import UserError
from serve.bench.client import Answer, Client
from serve.bench.rig import Rig

PERCENTILE = 0.95


@dataclass(frozen=True)
class Load:
    """Figures of one server under so many concurrent requests."""

    tokens_per_second: float
    first_token_p95_seconds: float


class Generator(Protocol):
    """Makes requests: each stream begins its next one when its last one has ended."""

    name: str
    """With its version."""

    def load(self, client: Client, streams: int, number: int, *, speculative: bool) -> Load:
        """Load a server. Prompts of other numbers are different, so that no cache has them; `speculative`: ours may
        use its own draft tokens."""


class OwnGenerator(Generator):
    """Threads of this process."""

    name = "threads of ours over httpx"

    def __init__(self, rig: Rig) -> None:
        self._rig, self._project = rig, rig.project

    @override
    def load(self, client: Client, streams: int, number: int, *, speculative: bool) -> Load:
        project = self._project
        fields = {} if speculative else {"speculative": False}
        prompts = prose(self._rig, streams, number)

        def stream(place: int) -> list[Answer]:
            own = prompts[place::streams]
            return [client.complete(prompt, project.load_new_tokens, **fields) for prompt in own]

        began = time.perf_counter()
        with ThreadPoolExecutor(streams) as pool:
            answers = [one for done in pool.map(stream, range(streams)) for one in done]
        seconds = time.perf_counter() - began
        tokens = sum(one.tokens for one in answers)
        return Load(tokens / seconds, nearest_rank([one.first_seconds for one in answers], PERCENTILE))


class Guidellm(Generator):
    """guidellm (https://github.com/vllm-project/guidellm), in processes of its own."""

    def __init__(self, executable: str, rig: Rig) -> None:
        self._executable, self._rig, self._project = executable, rig, rig.project
        self.name = self._run("--version").replace(" version:", "").strip()

    @override
    def load(self, client: Client, streams: int, number: int, *, speculative: bool) -> Load:
        project, folder = self._project, self._rig.new_folder("guidellm")
        folder.mkdir(parents=True)
        prompts = [{"prompt": prompt} for prompt in prose(self._rig, streams, number)]
        (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in prompts), encoding="utf-8")
        fields = {"temperature": 0.0} | ({} if speculative else {"speculative": False})
        report = folder / "report.json"
        # A length from the data would be sent with ignore_eos, which only some of the servers obey.
        spec = {
            "backend": {
                "kind": "openai_http",
                "target": client.address,
                "model": client.model,
                "request_format": "/v1/completions",
                "max_tokens": project.load_new_tokens,
                "timeout": project.request_seconds,
                "extras": {"body": fields},
            },
            "profile": {"kind": "concurrent"},
            "data": [{"kind": "json_file", "path": str(folder / "prompts.jsonl")}],
            "constraints": [{"kind": "max_requests", "count": len(prompts)}],
            "outputs": [{"kind": "json", "path": str(report)}],
        }
        scenario = {"metadata": {"name": "load"}, "spec": spec, "benchmarks": [{"profile.streams": streams}]}
        (folder / "scenario.json").write_text(json.dumps(scenario), encoding="utf-8")
        self._run("run", "--config", str(folder / "scenario.json"), "--disable-progress")
        [found] = json.loads(report.read_text(encoding="utf-8"))["benchmarks"]
        metrics = found["metrics"]
        if metrics["request_totals"]["successful"] != len(prompts):
            raise RuntimeError(f"guidellm reports {metrics['request_totals']} for {len(prompts)} requests ({report})")
        first = metrics["time_to_first_token_ms"]["successful"]["percentiles"][f"p{PERCENTILE:.0%}"[:-1]]
        return Load(metrics["output_tokens_per_second"]["successful"]["mean"], first / 1000)

    def _run(self, *arguments: str) -> str:
        """What it prints. UserError where it cannot run."""
        try:
            done = subprocess.run(
                [self._executable, *arguments],
                capture_output=True,
                encoding="utf-8",
                timeout=self._project.start_seconds + self._project.request_seconds,
                env=os.environ | {"HF_HUB_OFFLINE": "1"},
                check=False,
            )
        except OSError as error:
            rule = "project.guidellm must be an executable or null"
            raise UserError(f"{rule}, got {self._executable!r} ({error.strerror})") from None
        if done.returncode:
            raise RuntimeError(f"guidellm ended with code {done.returncode}: {(done.stderr or done.stdout)[-1000:]}")
        return done.stdout


def prose(rig: Rig, streams: int, number: int) -> list[str]:
    """The prompts of one load, all different."""
    count = streams * rig.project.load_turns
    return [rig.prose(rig.project.load_prompt_tokens, number * 1000 + place) for place in range(count)]


def nearest_rank(readings: Sequence[float], share: float) -> float:
    """The smallest reading that this share of all does not exceed."""
    return sorted(readings)[math.ceil(share * len(readings)) - 1]


def open_generator(rig: Rig) -> Generator:
    """The generator that the settings name. UserError for an executable that cannot run."""
    return OwnGenerator(rig) if rig.project.guidellm is None else Guidellm(rig.project.guidellm, rig)
