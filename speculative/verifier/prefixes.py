"""Sessions of sequences that have ended, kept for a prompt that begins as theirs did: the next turn of a chat.

A prompt is cut into chunks, and how a chunk is rounded depends on its length; new tokens are computed row by row. So a
session is kept up to the last whole chunk before its prompt's last token, which draws the first new one: another prompt
that begins with these tokens, and is longer, has the same cuts and so the same bits (`lab.engine.base.pieces_of`).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from lab.engine.base import Engine, Session, SessionLost
from lab.engine.kv import CacheFull
from lab.engine.sampling import Sampling
from speculative.acceptance import common_length

log = logging.getLogger(__name__)

LEAST_SHARE = 0.5
"""A prompt takes a session only if it shares so much of it: the chat that it is kept for loses the rest."""


@dataclass(frozen=True)
class _Kept:
    session: Session
    ids: list[int]
    """What it holds."""


class KeptPrefixes:
    """Sessions that are kept, of one engine.

    Args:
        engine: Owner of the sessions.
        chunk: Most tokens of a prompt in one pass.
        most_tokens: Most tokens of all sessions; 0: none is kept.
    """

    def __init__(self, engine: Engine, chunk: int, most_tokens: int) -> None:
        self._engine, self._chunk, self._most_tokens = engine, chunk, most_tokens
        self._kept: list[_Kept] = []
        """The one that ended last is the last."""

    def keep(self, session: Session, prompt_ids: Sequence[int]) -> None:
        """Keep a session up to the last whole chunk of its prompt, or close it if there is none, or no room. It must
        have been fed the prompt in chunks from its beginning on."""
        whole = self._whole(min(session.position, len(prompt_ids) - 1))
        if session.fault or not 0 < whole <= self._most_tokens:
            session.close()
            return
        try:
            session.position = whole
            self._engine.set_aside(session)
        except BaseException:
            session.close()
            raise
        self._kept.append(_Kept(session, list(prompt_ids[:whole])))
        while sum(len(kept.ids) for kept in self._kept) > self._most_tokens:
            self.drop_oldest()

    def open(self, prompt_ids: Sequence[int], sampling: Sampling, most_tokens: int) -> Session | None:
        """A session that holds the first chunks of a prompt, or None: then no kept session begins like this one."""
        shared = [self._shared(kept, prompt_ids) for kept in self._kept]
        count = max(shared, default=0)
        if not count:
            return None
        best = self._kept.pop(shared.index(count))
        while True:
            try:
                return self._engine.reopen(best.session, prompt_ids[:count], sampling, most_tokens)
            except CacheFull:
                if not self.drop_oldest():
                    break
            except SessionLost as lost:
                log.info("a prompt is read from its beginning: %s", lost)
                break
            except BaseException:
                best.session.close()
                raise
        best.session.close()
        return None

    def drop_oldest(self) -> bool:
        """Give the room of the session that ended first back to the engine; False if none is kept."""
        if not self._kept:
            return False
        self._kept.pop(0).session.close()
        return True

    def _shared(self, kept: _Kept, prompt_ids: Sequence[int]) -> int:
        """Tokens that the prompt can take from it."""
        count = self._whole(min(common_length(kept.ids, prompt_ids), len(prompt_ids) - 1))
        return count if count >= LEAST_SHARE * len(kept.ids) else 0

    def _whole(self, count: int) -> int:
        return count // self._chunk * self._chunk
