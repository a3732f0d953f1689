"""One conversation: its messages, the commands of its user, and the figures of all answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lab.faults import Fault, Lost
from lab.files import path_of, write_whole
from lab.settings import UserError
from serve.chat.connection import Connection, Message, Refused, Stream
from serve.chat.screen import Screen
from serve.chat.settings import ChatSettings

HELP = """\
/new           begin a new conversation
/system TEXT   set the system message; without TEXT: none
/save FILE     write the conversation as JSON
/help          this list
/quit          end; so do Ctrl+D, and Ctrl+C here. Ctrl+C during an answer stops the answer only
A line that is to begin with / begins with a space."""
QUIT = "/quit"


class Conversation:
    """Messages so far.

    Args:
        settings: Of the chat.
        connection: To the server.
        screen: Where answers go.
    """

    def __init__(self, settings: ChatSettings, connection: Connection, screen: Screen) -> None:
        self._connection, self._screen, self._url = connection, screen, settings.project.base_url
        self._system = settings.project.system
        self._messages: list[Message] = []
        self._answers = self._stopped = self._breaks = self._new_tokens = self._drafts = 0

    def greeting(self) -> str:
        """The line that a chat begins with."""
        return f"{self._connection.model} at {self._url} (/help: commands)"

    def figures(self) -> dict[str, Any]:
        """The figures of the last line. Tokens are counted where the server says them."""
        return {
            "device": None,
            "base_url": self._url,
            "model": self._connection.model,
            "answers": self._answers,
            "stopped": self._stopped,
            "breaks": self._breaks,
            "new_tokens": self._new_tokens,
            "accepted_drafts": self._drafts,
        }

    def is_over(self, line: str) -> bool:
        """Whether a line ends the chat."""
        return line.strip() == QUIT

    def obeys(self, line: str) -> bool:
        """Obey a command; False if the line is none. UserError for an unknown one, but at a terminal."""
        if not line.startswith("/"):
            return False
        command, _, rest = line.strip().partition(" ")
        try:
            self._obey(command, rest.strip())
        except UserError as error:
            if not self._screen.is_terminal:
                raise
            self._screen.note(f"error: {error}")
        return True

    def ask(self, text: str) -> None:
        """Send a message, and write its answer. A stopped answer stays in the conversation, as far as it came.

        Raises:
            Fault: the server refuses, or is gone; at a terminal it is a note.
            UserError: the server asks for another key.
        """
        self._messages.append({"role": "user", "content": text})
        stream, said = Stream(), ""
        breaks = 0
        try:
            for piece in self._connection.answer(self._told(), stream):
                if stream.breaks > breaks and self._screen.is_terminal:
                    self._screen.note("(the connection broke; the answer goes on)")
                breaks = stream.breaks
                said += piece.text
                self._screen.write(piece.text, piece.is_guess)
        except Fault as fault:
            if not self._screen.is_terminal or not isinstance(fault, Refused | Lost):
                raise
            if said:
                self._screen.end_line()
            self._screen.note(str(fault))
        else:
            self._screen.end_line()
        finally:
            self._count(stream, said)

    def _count(self, stream: Stream, said: str) -> None:
        self._breaks += stream.breaks
        self._new_tokens += int(stream.usage.get("completion_tokens") or 0)
        details = stream.usage.get("completion_tokens_details") or {}
        self._drafts += int(details.get("accepted_prediction_tokens") or 0)
        self._answers += stream.is_complete
        self._stopped += not stream.is_complete
        if said or stream.is_complete:
            self._messages.append({"role": "assistant", "content": said})
        else:
            self._messages.pop()  # nothing was answered: the next message is the first again

    def _told(self) -> list[Message]:
        system = [{"role": "system", "content": self._system}] if self._system else []
        return [*system, *self._messages]

    def _obey(self, command: str, rest: str) -> None:
        if command == "/new" and not rest:
            self._messages.clear()
        elif command == "/system":
            self._system = rest
        elif command == "/save" and rest:
            self._save(path_of(rest, "/save FILE"))
        elif command == "/help":
            for line in HELP.splitlines():
                self._screen.note(line)
        else:
            raise UserError(f"a line that begins with / must be a command (/help), got {command!r}")

    def _save(self, path: Path) -> None:
        document = {"model": self._connection.model, "messages": self._told()}
        try:
            write_whole(path, json.dumps(document, ensure_ascii=False, indent=1) + "\n")
        except OSError as error:
            raise UserError(
                f"/save must name a file that can be written, got {str(path)!r} ({error.strerror})"
            ) from None
