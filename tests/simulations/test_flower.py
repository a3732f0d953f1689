"""The seam around Flower's simulation; the simulation itself runs in tests/simulations/test_fed_sim.py."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from lab.settings import UserError
from simulations import worker_log
from simulations.flower import WorkerOutput, check, end_workers
from tests.federated import small_settings, write_dialogues


def test_workers_are_ended_and_nothing_else_whatever_state_a_process_is_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's processes carry their role as a name; one that is exiting has none, here or ever after."""
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    worker = subprocess.Popen(["ray::ClientAppActor.run", *sleep[1:]], executable=sys.executable)
    other = subprocess.Popen(sleep)
    nameless = subprocess.Popen(sleep)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    try:
        wait_until_zombie(ended)
        with pytest.raises(psutil.ZombieProcess):
            psutil.Process(ended.pid).cmdline()
        named = psutil.Process.cmdline
        monkeypatch.setattr(psutil.Process, "cmdline", lambda p: [] if p.pid == nameless.pid else named(p))
        stop, done = threading.Event(), threading.Event()
        stop.set()
        ending = threading.Thread(
            target=end_workers, args=(stop, done), daemon=True
        )  # imports Ray, which may take seconds
        ending.start()
        assert worker.wait(30) != 0
        done.set()
        ending.join(10)
        assert not ending.is_alive()
        assert (other.poll(), nameless.poll()) == (None, None)
    finally:
        for process in (worker, other, nameless, ended):
            process.kill()
            process.wait()


def wait_until_zombie(process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_ray_prints_goes_to_stderr_until_we_end_its_workers(capsys: pytest.CaptureFixture[str]) -> None:
    ending = threading.Event()
    out = WorkerOutput(ending.is_set)
    print("a worker died", file=out)
    ending.set()
    print("a worker ended", file=out)
    assert capsys.readouterr() == ("", "a worker died\n")


def test_malformed_lines_of_all_sites_are_named_before_ray_starts(tmp_path: Path) -> None:
    data = write_dialogues(tmp_path / "d.jsonl", 40)
    lines = data.read_text().splitlines()
    lines[6] = '{"prompt": "x", "response": null}'
    lines[30] = '{"prompt": "half \\ud83d", "response": "y"}'
    data.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError) as caught:
        check(small_settings(data, 4))
    said = sorted(str(caught.value).split("; "))
    assert said == [
        f"{data}:31 prompt must be text, got half a character (\\ud83d) at offset 5",
        f"{data}:7 response must be text that is not empty, got null",
    ]


def test_a_file_of_nothing_but_cut_prompts_is_refused_with_the_length_that_would_do(tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    rows = [{"prompt": f"{n} " * 90, "response": "a"} for n in range(10, 40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"masked whole: no answer within the first 64 tokens; .*sequence_length=273"):
        check(small_settings(data, 2))
    check(small_settings(data, 2, "project.data.sequence_length=273"))


WORKER = """
import logging, sys, warnings
from pathlib import Path
from simulations.worker_log import send_warnings
for _ in range(2):
    send_warnings(Path(sys.argv[1]))
logging.getLogger("lab.learning.data").info("not worth a word")
logging.getLogger("lab.learning.data").warning("3 files\\nleft out")
warnings.warn("old")
"""


def test_warnings_of_workers_reach_the_log_here_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / worker_log.FILE
    with worker_log.warnings_from(path):
        for _ in range(2):
            subprocess.run([sys.executable, "-c", WORKER, str(path)], check=True, timeout=60)
    said = [(record.levelname, record.message) for record in caplog.records if record.name == "simulations.worker_log"]
    assert said[0] == ("WARNING", "a worker says (lab.learning.data): 3 files\nleft out")
    assert len(said) == 2
    assert said[1][1].startswith("a worker says (py.warnings): ")
    assert len(path.read_text().splitlines()) == 4
