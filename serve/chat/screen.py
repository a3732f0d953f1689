"""What a chat reads and writes: lines of a person or of a pipe, answers with colours, notes on standard error."""

from __future__ import annotations

import sys

from lab.command.streams import StreamLeft, is_left
from lab.command.terminal import PLAIN, masked, one_line, takes_colours
from lab.settings import UserError

DRAFTED, OWN = "\x1b[32m", "\x1b[33m"
MARK = "> "


class Screen:
    """Standard input and output. In a pipe an answer is exactly its text, and there are no marks."""

    def __init__(self) -> None:
        self.is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._is_masked, self._has_colours = sys.stdout.isatty(), takes_colours(sys.stdout)
        if self.is_terminal:
            try:
                import readline  # noqa: F401 (input() then has a history and keys to edit with)
            except ImportError:  # not on Windows
                return

    def line(self) -> str | None:
        """The next line; None at the end of the input. UserError for one that is not UTF-8."""
        try:
            if self.is_terminal:
                return input(MARK)
            found = sys.stdin.readline()
        except EOFError:
            print(flush=True)
            return None
        except UnicodeDecodeError as error:
            raise UserError(f"standard input must be UTF-8 text, got {error.reason}") from None
        return found or None

    def write(self, text: str, is_guess: bool | None) -> None:
        """Write characters of an answer. StreamLeft when the reader is gone."""
        if self._is_masked:
            text = masked(text)
        if self._has_colours and is_guess is not None:
            text = f"{DRAFTED if is_guess else OWN}{text}{PLAIN}"
        sys.stdout.write(text)
        self.flush()

    def end_line(self) -> None:
        """End an answer."""
        sys.stdout.write("\n")
        self.flush()

    def note(self, text: str) -> None:
        """Say something to the person, beside the chat."""
        print(one_line(text), file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Write out. StreamLeft when the reader is gone."""
        sys.stdout.flush()
        if is_left(sys.stdout):
            raise StreamLeft
