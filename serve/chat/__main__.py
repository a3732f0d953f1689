"""Chat in a terminal with any OpenAI-compatible server. `python -m serve.chat project.base_url=http://127.0.0.1:8000/v1`."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from lab.command import entry
from serve.chat.settings import ChatSettings

if TYPE_CHECKING:
    from serve.chat.conversation import Conversation
    from serve.chat.screen import Screen


class AnswerStopped(BaseException):
    """Ctrl+C during an answer."""


def run(settings: ChatSettings, place: entry.Run) -> dict[str, Any]:
    """Chat until the input ends; return the figures of the last line."""
    from serve.chat.connection import Connection
    from serve.chat.conversation import Conversation
    from serve.chat.screen import Screen

    screen = Screen()
    with Connection(settings) as connection:
        conversation = Conversation(settings, connection, screen)
        place.so_far = conversation.figures
        try:
            _chat(settings.prompt, conversation, screen)
        except KeyboardInterrupt:
            if not screen.is_terminal:
                raise
            screen.end_line()
        return conversation.figures()


def _chat(first: str, conversation: Conversation, screen: Screen) -> None:
    if screen.is_terminal:
        screen.note(conversation.greeting())
    line: str | None = first or screen.line()
    while line is not None:
        text = line if line == first else line.rstrip("\r\n")
        if conversation.is_over(text):
            return
        if text.strip() and not conversation.obeys(text):
            with _stoppable(screen):
                conversation.ask(text)
        line = screen.line()


@contextmanager
def _stoppable(screen: Screen) -> Iterator[None]:
    """Within the block Ctrl+C ends the block, not the command: at a terminal, where a person can press it again."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise AnswerStopped

    is_main = threading.current_thread() is threading.main_thread()
    if not screen.is_terminal or not is_main or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield
        return
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    except AnswerStopped:
        screen.note("(stopped)")
    finally:
        signal.signal(signal.SIGINT, before)


main = entry.command("chat", ChatSettings, run)

if __name__ == "__main__":
    main()
