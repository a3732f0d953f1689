"""SIGINT or SIGTERM to every role at a random moment of its life: the last line is there, the text so far in it, and
nothing is left running.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from lab.command.processes import run_to_end
from tests.serve.chat_server import base_url, chat_server
from tests.speculative.processes import verifier

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 120.0
LEFT_SECONDS = 15.0
"""For processes that end when they see that their parent has: Ray's agents."""
AT_WORK = 2 / 3
"""The share of kills that wait for the first text or figures."""
WORK_SECONDS = 3.0
MARK = "LAB_TEST_MARK"
SMALL = ("model=random", "tracking=none", "device.threads=1")
DATA = ("project.data.sequence_length=32", "project.data.max_examples=32", "project.data.max_held_out=2")
KEPT = ("model.cache_dir={cache}", "project.checkpoints={checkpoints}")
SYNTHETIC = ("project.engine=synthetic", "project.synthetic.vocabulary_size=258", "project.context=4096")


@dataclass(frozen=True)
class RoleKind:
    """A command, and the time within which it is killed."""

    command: tuple[str, ...]
    """Of the interpreter."""
    words: tuple[str, ...]
    """With the names of `_places` in braces, and `{folder}`, a folder of its own."""
    seconds: float
    """From when it hears signals; loading and ending included."""
    serves: bool = False
    """Ends when it is told to, and well."""
    has_text: bool = False


ROLES: dict[str, RoleKind] = {
    "drafter": RoleKind(
        ("-m", "speculative.drafter"),
        ("prompt=first", "project.max_new_tokens=600", "tracking=none", "model=random", "network.port={port}"),
        8,
        has_text=True,
    ),
    "verifier": RoleKind(("-m", "speculative.verifier"), ("network.port=0", *SMALL), 8, serves=True),
    "infer": RoleKind(
        ("-m", "split.infer"),
        (*SMALL, "prompt=Hello", "project.local_shards=2", "project.max_new_tokens=900", "project.temperature=0.9"),
        20,
        has_text=True,
    ),
    "serve": RoleKind(("-m", "split.serve"), (*SMALL, "project.layers=0:2", "network.port=0"), 8, serves=True),
    "learn": RoleKind(("-m", "split.learn"), (*SMALL, "project.layers=0:2", "network.port=0"), 8, serves=True),
    "train": RoleKind(("-m", "split.train"), (*SMALL, *DATA, "project.local_shards=2", "project.steps=500"), 25),
    "split_decode": RoleKind(
        ("-m", "split.decode"), (*SMALL, "project.local_shards=2", "project.max_new_tokens=200"), 20
    ),
    "speculative_decode": RoleKind(
        ("-m", "speculative.decode"),
        (*SMALL, "project.context=1024", "project.sessions=2", "project.max_new_tokens=600"),
        25,
    ),
    "decode": RoleKind(("-m", "lab.decode"), (*SMALL, "project.context=1024", "project.max_new_tokens=600"), 10),
    "federated": RoleKind(
        ("simulations/fed_sim.py",),
        (*SMALL, *DATA, "project.num_clients=2", "project.rounds=500", "project.local_steps=1", "project.workers=1"),
        40,
    ),
    "central": RoleKind(
        ("simulations/fed_sim.py",),
        (*SMALL, *DATA, "project.baseline=central", "project.num_clients=2", "project.rounds=500"),
        12,
    ),
    "matrix": RoleKind(
        ("run_matrix.py",),
        ("matrix=decode", "model=random", "project.context=64,128", "matrix.results={folder}/cells"),
        20,
    ),
    "http": RoleKind(("-m", "serve"), ("network.port=0", "project.journal={folder}/journal", *SMALL), 8, serves=True),
    "chat": RoleKind(("-m", "serve.chat"), ("prompt=first", "project.base_url={url}", "tracking=none"), 8),
    "merge": RoleKind(
        ("-m", "split.merge"), (*SMALL, "project.checkpoint={checkpoints}", "project.output={folder}/merged"), 5
    ),
    "doctor": RoleKind(("-m", "lab.doctor"), SMALL, 5),
    "run": RoleKind(("-m", "fl.run"), (*SMALL, *DATA, "project.num_clients=2", "project.rounds=2"), 10),
    "bench": RoleKind(("-m", "speculative.bench"), ("project.bench.engine=synthetic", "tracking=none"), 20),
    "link": RoleKind(
        ("simulations/link.py",), ("network.port=0", "project.target_port=9", "tracking=none"), 5, serves=True
    ),
}


@dataclass
class Killed:
    """What came of the kills."""

    kills: int = 0
    with_text: int = 0
    """Whose text had begun."""
    by_role: dict[str, int] = field(default_factory=dict)
    end_seconds: dict[str, float] = field(default_factory=dict)
    """The longest, by role, from the signal."""
    faults: list[str] = field(default_factory=list)


def kill_roles(count: int, seed: int, names: Sequence[str] = tuple(ROLES)) -> Killed:
    """`count` processes, a role after the other, each killed once."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job, and its children with it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    rng, killed = random.Random(seed), Killed()
    with ExitStack() as stack:
        places = _places(stack, names)
        for turn in range(count):
            name = names[turn % len(names)]
            number = rng.choice([signal.SIGINT, signal.SIGTERM])
            is_at_work = rng.random() < AT_WORK
            delay = rng.uniform(0, WORK_SECONDS if is_at_work else ROLES[name].seconds)
            kill_one(name, places, number, delay, killed, is_at_work=is_at_work)
    return killed


def _places(stack: ExitStack, names: Sequence[str]) -> dict[str, str]:
    """What the roles of these names need from others: a verifier, an HTTP server, a checkpoint."""
    root = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
    places = {"cache": str(root / "cache"), "checkpoints": str(root / "checkpoints"), "flower": str(root)}
    (root / "config.toml").write_text('[superlink.lab]\naddress = "127.0.0.1:9"\ninsecure = true\n')  # no answer
    if "drafter" in names:
        places["port"] = str(stack.enter_context(verifier("model=random", *SYNTHETIC)).port)
    if "chat" in names:
        places["url"] = base_url(stack.enter_context(chat_server(root)))
    if "merge" in names:
        run_to_end(
            "split.train",
            [*SMALL, *DATA, "project.local_shards=2", "project.steps=1", *filled(KEPT, places)],
            root / "trained",
            SECONDS,
        )
        [places["checkpoints"]] = map(str, Path(places["checkpoints"]).iterdir())  # one run's
    return places


def filled(words: Sequence[str], places: Mapping[str, str]) -> list[str]:
    """The words of a role with their places."""
    return [word.format_map(places) for word in words]


def kill_one(
    name: str, places: Mapping[str, str], number: signal.Signals, delay: float, killed: Killed, *, is_at_work: bool
) -> None:
    """One process, killed `delay` after it hears signals, or after its first text or figures; what is wrong with its
    end is in `killed.faults`."""
    role, mark = ROLES[name], uuid.uuid4().hex
    where = f"{name}, {number.name} after {delay:.2f} s{' of work' if is_at_work else ''}"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        out_path, err_path = Path(folder) / "out", Path(folder) / "err"
        words = filled([*role.words, "model.cache_dir={cache}"], {**places, "folder": folder})
        with out_path.open("wb") as out, err_path.open("wb") as err:
            process = subprocess.Popen(
                [sys.executable, *role.command, *words, f"hydra.run.dir={folder}/run"],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT), "FLWR_HOME": places["flower"], MARK: mark},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )
        try:
            _wait_until_it_hears(process)
            if is_at_work:
                _wait_until_it_works(process, out_path, Path(folder) / "run" / "metrics.jsonl")
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(delay)
            process.send_signal(number)
            told = time.monotonic()
            process.wait(SECONDS)
            killed.end_seconds[name] = max(killed.end_seconds.get(name, 0.0), time.monotonic() - told)
        except subprocess.TimeoutExpired:
            killed.faults.append(f"{where}: it did not end")
        finally:
            process.kill()
            process.wait()
            left = _left(mark)
            for one in left:
                with contextlib.suppress(psutil.Error):
                    one.kill()
        if left:
            killed.faults.append(f"{where}: {len(left)} processes were left")
        killed.kills += 1
        killed.by_role[name] = killed.by_role.get(name, 0) + 1
        for wrong in wrong_of(role, process.returncode, number, out_path, err_path, killed):
            killed.faults.append(f"{where}: {wrong}")


def _wait_until_it_hears(process: subprocess.Popen[bytes]) -> None:
    """Until the process has a handler for SIGTERM (Linux)."""
    deadline = time.monotonic() + SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{process.pid}/status").read_text()
            caught = int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")), 16)
            if caught >> (signal.SIGTERM - 1) & 1:
                return
        time.sleep(0.01)


def _wait_until_it_works(process: subprocess.Popen[bytes], *signs: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if any(path.exists() and path.stat().st_size for path in signs):
            return
        time.sleep(0.02)


def _left(mark: str) -> list[psutil.Process]:
    """Processes that carry our mark still, after a while."""
    deadline = time.monotonic() + LEFT_SECONDS
    while (left := list(_marked(mark))) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def _marked(mark: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def wrong_of(role: RoleKind, code: int, number: signal.Signals, out: Path, err: Path, killed: Killed) -> Iterator[str]:
    """What is wrong with the end of a process, from its exit code, what it wrote, and the signal that it got."""
    errors = err.read_text(encoding="utf-8", errors="replace")
    if "Traceback" in errors or "Exception ignored" in errors:
        yield f"a traceback: {errors.strip().splitlines()[-1][:300]}"
    text = out.read_bytes().decode()
    *shown, line = text.removesuffix("\n").split("\n")
    try:
        last: dict[str, Any] = json.loads(line)
    except ValueError:
        yield f"no last line, code {code}: {line[:100]!r}; {errors[-300:]!r}"
        return
    word = "interrupted" if number == signal.SIGINT else "terminated"
    good = last.get("status") == "ok"
    if code == -number and last.get("ended_by") != word:  # all was said, and only the interpreter was still about
        return
    if last.get("ended_by") != word and not (good and not role.serves):
        yield f"ended_by {last.get('ended_by')!r}, not {word!r}"
    if code != (0 if good else 128 + number) or (role.serves and "role" in last and not good):
        yield f"exit code {code}, status {last.get('status')!r}"
    if role.has_text and "token_ids" in last:
        said = "\n".join(shown)
        killed.with_text += bool(said)
        if not (last["text"] + "\n").startswith(said):
            yield f"shown {said[-40:]!r}, kept {last['text'][-40:]!r}"
    elif role.has_text and shown:
        yield f"shown {shown!r}, nothing kept"
