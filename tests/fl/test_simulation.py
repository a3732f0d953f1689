"""The seam around Flower's simulation; the simulation itself runs in tests/simulations/test_fed_sim.py."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import psutil
import pytest

from fl.simulation import UntilEnding, end_workers


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
        done = threading.Event()
        ending = threading.Thread(target=end_workers, args=(done,), daemon=True)  # imports Ray, which may take seconds
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
    out = UntilEnding(ending.is_set)
    print("a worker died", file=out)
    ending.set()
    print("a worker ended", file=out)
    assert capsys.readouterr() == ("", "a worker died\n")
