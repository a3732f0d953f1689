"""The text as it is verified: what a drafter guessed right and what the target put, in two colours on a terminal."""

from __future__ import annotations

from lab.command import terminal
from speculative.drafter.loop import Round

ACCEPTED, CORRECTED = "\x1b[32m", "\x1b[33m"


class TextStream(terminal.TextStream):
    """Writes rounds."""

    def show(self, done: Round) -> None:
        """Accepted guesses in one colour, what the target put in the other. Raises StreamLeft."""
        self.add(done.tokens[: done.accepted], ACCEPTED)
        self.add(done.tokens[done.accepted :], CORRECTED)
