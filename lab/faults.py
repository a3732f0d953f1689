"""Faults that were foreseen: a command that raises one prints its text as one line, without a traceback, and exits."""

from enum import Enum
from typing import ClassVar


class EndedBy(Enum):
    """The reason for the end of a run, `ended_by` in the last line. A whole text has `end_token`, `length` or
    `stop`."""

    done = "done"
    """It did all that was asked."""
    interrupted = "interrupted"
    """Ctrl+C (SIGINT)."""
    terminated = "terminated"
    """SIGTERM, SIGHUP."""
    closed = "closed"
    """Standard output, which a text was written to, was closed by its reader."""
    lost = "lost"
    """A peer that is needed is gone."""
    disk_full = "disk_full"
    refused = "refused"
    """The user asked for something impossible: exit code 2."""
    failed = "failed"
    """Any other fault; the message names it."""


class Fault(RuntimeError):
    """Something that the command needs has failed. Its last line has the figures so far (`Run.so_far`)."""

    ended_by: ClassVar[EndedBy] = EndedBy.failed
    exit_code: int = 1
    """2 where the user can mend it with other settings; `ended_by` is then `refused`."""


class Lost(Fault):
    """A peer that is needed is gone."""

    ended_by = EndedBy.lost
