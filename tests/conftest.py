"""For every test."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator

import psutil
import pytest

# Test processes share the cores: a thread that spins while it waits for another keeps that one from running, and 4-bit
# training takes four times as long. OpenMP reads this when torch is loaded, here and in every process that is started.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# As our commands set it (lab/command/entry.py), for processes that are not started by one of them.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
# A shell's background job ignores SIGINT, and so would every process that tests start and interrupt there.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch computes on one thread: on several, a row's place may decide how it is rounded."""
    import torch  # here, after the environment that it reads

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Puts the wall clock forward by so many seconds, as psutil sees it: the start of every process moves with it."""
    if sys.platform != "linux":
        pytest.skip("elsewhere the lab takes psutil's word for the start of a process")
    read = psutil.Process.create_time

    def put_forward(seconds: float) -> None:
        monkeypatch.setattr(psutil.Process, "create_time", lambda process: read(process) + seconds)

    return put_forward
