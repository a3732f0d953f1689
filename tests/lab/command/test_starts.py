"""The start of a process: the same whatever happens to the wall clock."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from lab.command.ending import CLOCK_TICK, end_children
from lab.command.starts import now, start_of

SLEEP = "import time; time.sleep(600)"


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", SLEEP])
    yield process
    process.kill()
    process.wait()


def test_a_start_lies_between_the_times_before_and_after_it() -> None:
    before = now()
    with subprocess.Popen([sys.executable, "-c", SLEEP]) as process:
        start = start_of(psutil.Process(process.pid))
        assert before - CLOCK_TICK <= start <= now()
        process.kill()


def test_a_start_stays_when_the_clock_is_set(
    child: subprocess.Popen[bytes], set_clock: Callable[[float], None]
) -> None:
    start = start_of(psutil.Process(child.pid))
    set_clock(3600.0)
    assert start_of(psutil.Process(child.pid)) == start


@pytest.mark.skipif(sys.platform != "linux", reason="a field of /proc")
def test_a_start_is_found_whatever_the_program_is_called(tmp_path: Path) -> None:
    program = tmp_path / "a) R 1 (b"
    program.symlink_to("/bin/sleep")
    before = now()
    with subprocess.Popen([str(program), "600"]) as process:
        assert ") R 1 (" in Path(f"/proc/{process.pid}/stat").read_text()
        assert before - CLOCK_TICK <= start_of(psutil.Process(process.pid)) <= now()
        process.kill()


def test_a_process_that_is_no_more_has_no_start(child: subprocess.Popen[bytes]) -> None:
    process = psutil.Process(child.pid)
    child.kill()
    child.wait()
    with pytest.raises(psutil.NoSuchProcess):
        start_of(process)


def test_the_children_of_a_command_end_with_it_after_the_clock_was_put_back(set_clock: Callable[[float], None]) -> None:
    since = now()
    with subprocess.Popen([sys.executable, "-c", SLEEP]) as child:
        try:
            set_clock(-3600.0)
            end_children(now() + 2 * CLOCK_TICK)
            assert child.poll() is None, "a negative control: it began earlier"
            end_children(since)
            assert child.poll() is not None
        finally:
            child.kill()
