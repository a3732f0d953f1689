"""What the figures of a real deployment are made of, without the deployment."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from tests.fl.deployment import running
from tests.fl.warm.figures import Kill, all_replied_again, kill

BOTH, BOB = ("alice", "bob"), ("bob",)
ALICE_IN_ROUND_1 = Kill("alice", before=0, after=1)
"""She is back during round 2, and must reply in round 3."""


@pytest.mark.parametrize(
    ("kills", "replied", "rounds", "expected"),
    [
        ([ALICE_IN_ROUND_1], {1: BOB, 2: BOB, 3: BOTH}, 3, True),
        ([ALICE_IN_ROUND_1], {1: BOTH, 2: BOTH, 3: BOB, 4: BOTH}, 4, False),
        ([ALICE_IN_ROUND_1], {1: BOB, 2: BOTH, 4: BOTH}, 4, False),  # the row is missing
        ([ALICE_IN_ROUND_1], {1: BOB, 2: BOB}, 2, True),  # the run has ended
        ([ALICE_IN_ROUND_1, Kill("alice", 2, 4)], {3: BOB, 4: BOB, 6: BOTH}, 6, True),
        ([ALICE_IN_ROUND_1, Kill("alice", 2, 4)], {3: BOB, 4: BOB, 6: BOB}, 6, False),
        ([ALICE_IN_ROUND_1, Kill("bob", 2, 4)], {3: BOB, 6: BOTH}, 6, False),  # her loss is not of his kill
        ([ALICE_IN_ROUND_1, Kill("alice", 3, 5)], {3: BOB, 7: BOTH}, 7, False),  # killed again, but later
    ],
)
def test_a_killed_site_must_reply_in_the_first_round_that_begins_with_it_back(
    kills: list[Kill], replied: dict[int, tuple[str, ...]], rounds: int, expected: bool
) -> None:
    assert all_replied_again(kills, replied, rounds) is expected


CARELESS = """
import subprocess, sys, time
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid, flush=True)
time.sleep(600)
"""


def test_a_killed_process_that_nobody_reaps_is_not_waited_for() -> None:
    with subprocess.Popen([sys.executable, "-c", CARELESS], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        process = psutil.Process(int(parent.stdout.readline()))
        try:
            kill(process, seconds=20)
            assert not running(process)
            assert process.status() == psutil.STATUS_ZOMBIE
        finally:
            parent.kill()
