"""An engine without a model, for tests and for measurements of everything around an engine."""

import math
import time
from collections.abc import Callable, Sequence

from typing_extensions import override

from lab.engine.base import (
    Engine,
    Request,
    Session,
    TargetStep,
    Want,
    check_open,
    check_reopen,
    check_requests,
    check_set_aside,
)
from lab.engine.kv import CacheFull
from lab.engine.sampling import Sampling, mix64


class SyntheticEngine(Engine):
    """An engine without a model: text from a hash, and passes that take a set time.

    The token at a position is a hash of the seed, the position and all tokens before it, so that a wrong token changes
    everything behind it, as in a model. A second engine with ``agreement`` below 1 is a drafter for it: after any
    prefix it predicts the same token with that probability, independently at each prefix, and another one otherwise.

    Args:
        vocabulary_size: Ids are in [0, vocabulary_size); at least 2.
        context: The most tokens of a session.
        sessions: The most sessions open at once.
        step_seconds: Time of a pass over one row.
        row_seconds: Time of each further row in a pass, of any session.
        agreement: Probability of the target's own prediction; 1 is the target itself.
        sleep: Waits for a number of seconds; a test passes its own.
    """

    has_logits = False

    def __init__(
        self,
        *,
        vocabulary_size: int,
        context: int,
        sessions: int,
        step_seconds: float,
        row_seconds: float,
        agreement: float,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if vocabulary_size < 2:
            raise ValueError(f"vocabulary_size must be at least 2, got {vocabulary_size}")
        if not 0 <= agreement <= 1:
            raise ValueError(f"agreement must be in [0, 1], got {agreement}")
        if step_seconds < 0 or row_seconds < 0:
            raise ValueError(f"step_seconds and row_seconds must be at least 0, got {step_seconds} and {row_seconds}")
        self.vocabulary_size, self.context, self.longest = vocabulary_size, context, context
        self._sessions, self._agreement = sessions, agreement
        self._step_seconds, self._row_seconds = step_seconds, row_seconds
        self._sleep = sleep
        self._opened = 0
        self._hashes: dict[int, list[int]] = {}
        """By session: [n] is the hash of its first n tokens."""

    @override
    def open(self, prompt_ids: Sequence[int], sampling: Sampling, most_tokens: int | None = None) -> Session:
        most = check_open(self, prompt_ids, sampling, most_tokens)
        if len(self._hashes) == self._sessions:
            raise CacheFull(f"all {self._sessions} sessions of the synthetic engine are taken")
        self._opened += 1
        session = Session(self, self._opened, sampling, most)
        self._hashes[session.key] = _hashes(sampling, [])
        return session.with_prompt(prompt_ids)

    @override
    def extend(self, requests: Sequence[Request], want: Want) -> list[TargetStep]:
        # Cross-entropies are 0 for the ids that this engine predicts itself, and log V for all others.
        began = time.monotonic()
        check_requests(self, requests)
        steps = [session.advance(ids, self._predict(session, ids, want)) for session, ids in requests]
        rows = sum(len(ids) for _, ids in requests)
        pass_seconds = self._step_seconds + self._row_seconds * (rows - 1)
        self._sleep(max(0.0, began + pass_seconds - time.monotonic()))
        return steps

    @override
    def close(self, session: Session) -> None:
        del self._hashes[session.key]
        session.closed = True

    @override
    def set_aside(self, session: Session) -> None:
        check_set_aside(session)

    @override
    def reopen(self, session: Session, ids: Sequence[int], sampling: Sampling, most_tokens: int) -> Session:
        check_reopen(self, session, ids, sampling, most_tokens)
        self._hashes[session.key] = _hashes(sampling, ids)
        return session.continued(ids, sampling, most_tokens)

    @override
    def shutdown(self) -> None:
        """Forget all sessions."""
        self._hashes.clear()

    def _predict(self, session: Session, ids: Sequence[int], want: Want) -> TargetStep:
        hashes = self._hashes[session.key]
        del hashes[session.position + 1 :]
        before = self._next_id(hashes[-1])
        _extend(hashes, ids)
        next_ids = [self._next_id(prefix) for prefix in hashes[-len(ids) if want == "all" else -1 :]]
        surprise = math.log(self.vocabulary_size)
        said = [before, *next_ids[:-1]] if want == "all" else []
        nll = [0.0 if token == expected else surprise for token, expected in zip(ids, said)]
        return TargetStep(next_ids, [0.0] * len(next_ids), [1.0] * len(next_ids), nll)

    def _next_id(self, prefix: int) -> int:
        """The next id, from the hash of a prefix, which depends on seed, tokens and position."""
        target = mix64(prefix + 1) % self.vocabulary_size
        if mix64(prefix + 2) < self._agreement * 2**64:
            return target
        return (target + 1 + mix64(prefix + 3) % (self.vocabulary_size - 1)) % self.vocabulary_size


def _hashes(sampling: Sampling, ids: Sequence[int]) -> list[int]:
    """[n] is the hash of the first n ids, and of the seed."""
    hashes = [mix64(sampling.seed)]
    _extend(hashes, ids)
    return hashes


def _extend(hashes: list[int], ids: Sequence[int]) -> None:
    for token in ids:
        hashes.append(mix64(hashes[-1] ^ token))
