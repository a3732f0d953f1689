"""When processes were started, on a clock that nobody sets.

The number of a process comes again when it has ended; number and start together do not, until the machine starts again.
psutil's `create_time` does not serve for this on Linux: it follows the wall clock, so the start of a running process
changes when the clock is set.
"""

import os
import sys
import time
from pathlib import Path

import psutil


def start_of(process: psutil.Process) -> int:
    """When a process was started, in milliseconds, in steps of 10 on Linux. NoSuchProcess if it is no more."""
    if sys.platform != "linux":
        return int(1000 * process.create_time())
    try:
        stat = Path(f"/proc/{process.pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        raise psutil.NoSuchProcess(process.pid) from None
    # Field 22; the second one is the program's name in brackets, which may itself hold brackets and spaces.
    ticks = int(stat.rpartition(b")")[2].split()[19])
    return 1000 * ticks // os.sysconf("SC_CLK_TCK")


def now() -> int:
    """The time on the clock of `start_of`."""
    seconds = time.clock_gettime(time.CLOCK_BOOTTIME) if sys.platform == "linux" else time.time()
    return int(1000 * seconds)
