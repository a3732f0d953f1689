"""The interface of a target model: an engine takes the token ids of texts, and predicts the next ones.

Logits stay where they are computed. A whole model in this process, a model split over machines and a synthetic engine
with configurable speeds are all engines; verifiers, drafters and benchmarks do not know which one they use. An engine
and its sessions belong to one thread.

Knows nothing about tokenizers, texts or networks.

Shapes: B sessions, T positions in this call, V vocabulary, K rows of logits kept of each session.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Literal, Protocol, Self, TypeVar

import torch
from torch import Tensor

from lab.engine.history import History
from lab.engine.not_finite import NotFinite
from lab.engine.sampling import Sampling, choose, nll, widened
from lab.text.grammars import Grammars

Want = Literal["last", "all"]
"""`all`: a step for every id given; `last`: only for the last one, so that a long prompt costs the head once."""

SWEEP_ROWS = 16
"""A pass is mostly one sweep over the weights, which costs about as much as this many rows more (a CPU, bfloat16):
sessions whose lengths would need more padding than this in one pass get two passes."""


@dataclass(frozen=True, slots=True)
class TargetStep:
    """The predictions of the target for the ids of one `extend`: T entries; with want=last only one, and no `nll`."""

    next_ids: list[int]
    """[t] is the id that the target predicts after ids[t]."""
    next_nll: list[float]
    """[t] is the cross-entropy, in nats, of next_ids[t]: plain softmax of the logits, without temperature."""
    margin: list[float]
    """[t] is the lead of next_ids[t] over the second best, in units of the logits, noise included: `Choice.margins`."""
    nll: list[float]
    """[t] is the cross-entropy, in nats, of ids[t] under the step before it. NaN at t = 0 unless ids[0] is the
    id that the target predicted there in the extend just before: no other logits are kept between calls."""
    fault: str = ""
    """Part of the model and position of the first NaN or infinity, for people. With a fault the lists are
    meaningless."""
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    """[t] are the best tokens after ids[t], as many as the sampling asks for, with their cross-entropies
    (`Choice.top`). Empty if it asks for none, and with a fault."""

    def then(self, later: TargetStep) -> TargetStep:
        """This step and a later one, which continues it, as one step."""
        return TargetStep(
            self.next_ids + later.next_ids,
            self.next_nll + later.next_nll,
            self.margin + later.margin,
            self.nll + later.nll,
            self.fault or later.fault,
            self.top + later.top,
        )


NOTHING = TargetStep([], [], [], [])


class Session:
    """One text in one engine: its sampling, and the number of its tokens that the engine holds.

    ``session.position = n`` forgets everything from token n on, in O(1). A context manager: leaving it closes it.
    """

    def __init__(self, engine: Engine, key: int, sampling: Sampling, most_tokens: int) -> None:
        self.key = key
        """The engine's own handle."""
        self.most_tokens = most_tokens
        """The most tokens that it will ever hold; room for them is reserved."""
        self.sampling = sampling
        self.history = History(sampling.logit_rules, engine.grammars) if sampling.logit_rules else None
        """The text, for the logit rules of its sampling; None without any. Kept by engines that have the logits."""
        self.prompt_tokens: int | None = None
        """Tokens of its prompt: `pieces_of` cuts by it. None: unknown."""
        self.step: TargetStep | None = None
        """The result of the latest extend, after `open` that of the prompt; None if the prompt was empty."""
        self.closed = False
        self.fault = ""
        """Part of the model and position of the first NaN or infinity; with a fault it can only be closed."""
        self._engine = engine
        self._position = 0

    @property
    def position(self) -> int:
        """Number of tokens held: the position of the next id."""
        return self._position

    @position.setter
    def position(self, position: int) -> None:
        if not 0 <= position <= self._position:
            raise ValueError(f"position must be in [0, {self._position}], got {position}")
        self._position = position

    def advance(self, ids: Sequence[int], step: TargetStep) -> TargetStep:
        """Called by engines once they hold the ids, with their predictions. Fills in ``nll[0]`` where it is known."""
        if step.nll and math.isnan(step.nll[0]):
            step = replace(step, nll=[self._own_nll(ids[0]), *step.nll[1:]])
        self.fault = self.fault or step.fault
        self._position += len(ids)
        self._first_next = self._position - len(step.next_ids) + 1
        self.step = step
        return step

    def with_prompt(self, prompt_ids: Sequence[int]) -> Self:
        """For engines: run the prompt, if there is one, and return the session. It is closed again if that fails."""
        try:
            if prompt_ids:
                self.prompt_tokens = len(prompt_ids)
                self._engine.extend([(self, prompt_ids)], want="last")
        except BaseException:
            self.close()
            raise
        return self

    def continued(self, ids: Sequence[int], sampling: Sampling, most_tokens: int) -> Session:
        """For engines: a session in the place of this one, which counts as closed, with its first tokens, `ids`."""
        session = Session(self._engine, self.key, sampling, most_tokens)
        session._position = len(ids)
        if session.history is not None:
            session.history.hold(0, ids)
        self.closed = True
        return session

    def close(self) -> None:
        """Free its slot in the engine. A second call does nothing."""
        if not self.closed:
            self._engine.close(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _own_nll(self, first_id: int) -> float:
        if self.step is None:
            return math.nan
        at = self._position - self._first_next
        known = 0 <= at < len(self.step.next_ids) and self.step.next_ids[at] == first_id
        return self.step.next_nll[at] if known else math.nan


Request = tuple[Session, Sequence[int]]


class SessionLost(RuntimeError):
    """An engine no longer holds the tokens of a session that was set aside: it can only be closed."""


class Engine(Protocol):
    """A target model, wherever it runs."""

    vocabulary_size: int
    """Ids are in [0, vocabulary_size)."""
    context: int
    """The most tokens that a text may have."""
    longest: int
    """The most tokens that can be reserved for a session: the context, or fewer if the cache cannot hold one such
    text."""
    has_logits: bool = True
    """Whether it can apply min_p, penalties, word lists and schemas, which change logits."""
    grammars: Grammars | None = None
    """Compiles schemas for its model's tokenizer, the one thing that an engine knows of it; None: it takes none."""

    @property
    def row_invariant(self) -> bool:
        """Whether its results for a token do not depend on what else is in the pass."""
        return False

    def open(self, prompt_ids: Sequence[int], sampling: Sampling, most_tokens: int | None = None) -> Session:
        """Start a text and run its prompt; ``session.step.next_ids[-1]`` is the first new token.

        The prompt may be empty: then the caller passes it to `extend`, in any pieces.

        Args:
            prompt_ids: The beginning of the text.
            sampling: How the next tokens are drawn.
            most_tokens: The most that the session will ever hold, prompt included: room for them is reserved. None: the
                whole context.

        Raises:
            ValueError: an id outside the vocabulary, or a prompt longer than the context or than `most_tokens`.
            CacheFull: no slot is free, or other reservations leave too little room.
            NotFinite: see `extend`; the session is closed again.
        """
        ...

    def extend(self, requests: Sequence[Request], want: Want) -> list[TargetStep]:
        """Append ids to several sessions, each at its own position, in one batched pass.

        Raises:
            ValueError: no ids, ids outside the vocabulary, a session twice, closed, or beyond its reservation. No
                session has changed.
            NotFinite: the logits of some sessions, or hidden states on the way to them, hold NaN or infinity. These
                sessions must be closed: their cache would make every later pass wrong. The others have advanced, and
                their steps are in the exception.
        """
        ...

    def close(self, session: Session) -> None:
        """Forget a session; its slot is free again."""
        ...

    def set_aside(self, session: Session) -> None:
        """Keep a session only in case it is reopened, with no more room than its tokens take. Where an engine serves
        others as well, they may have its room.

        Raises:
            ValueError: it is closed or met NaN or infinity, or holds no token.
        """
        ...

    def reopen(self, session: Session, ids: Sequence[int], sampling: Sampling, most_tokens: int) -> Session:
        """Begin another text with the first tokens of a session, which counts as closed from then on.

        The new session has the position behind `ids`, which are not computed again; everything else is that of a new
        one, and its `prompt_tokens` are to be set.

        Args:
            session: An open one; it may have been set aside.
            ids: Its first tokens, which the new text begins with; at least one.
            sampling: As in `open`.
            most_tokens: As in `open`.

        Raises:
            ValueError: as `open` and `extend`, or the session holds fewer tokens.
            CacheFull: other reservations leave too little room. The session is as it was.
            SessionLost: the tokens are not held any more. The session can only be closed.
        """
        ...

    def shutdown(self) -> None:
        """Release all memory and connections."""
        ...


MOST_ROWS = 24
"""Most tokens of a piece that compiled layers compute row by row: 16 draft tokens, the token before them, and some to
spare. A longer piece is part of a prompt, which transformers' own forward computes faster, rounded by its length."""


def pieces_of(position: int, count: int, prompt_tokens: int | None, chunk: int) -> Iterator[tuple[int, int]]:
    """Cut an extend into pieces that do not depend on how its sequence came to be.

    A prompt is cut into chunks up to its last token, which draws the first new one. That one and all later tokens are
    in short pieces. So a sequence that is computed anew, from its prompt and its new tokens in one extend, gets the
    same bits as the first time, token by token, where its engine's rows stand alone (`Engine.row_invariant`).

    Args:
        position: Tokens that the engine holds.
        count: Tokens that are appended.
        prompt_tokens: Tokens of the prompt; None where they are not known: chunks only.
        chunk: Most tokens of a piece.

    Yields:
        First and end of each piece, counted from the first appended token.
    """
    at, end = position, position + count
    while at < end:
        prompt_end = end + 1 if prompt_tokens is None else prompt_tokens
        stop = min(at + chunk, prompt_end - 1) if prompt_end - at > MOST_ROWS else at + min(chunk, MOST_ROWS)
        yield at - position, min(stop, end) - position
        at = stop


def is_long(count: int) -> bool:
    """Whether a piece of so many tokens is too long to be computed row by row."""
    return count > MOST_ROWS


def check_sound(session: Session) -> None:
    """ValueError for a session that is closed, or that can only be closed."""
    if session.closed:
        raise ValueError(f"session must be open, got one closed at position {session.position}")
    if session.fault:
        raise ValueError(f"session must be sound, got one that met NaN or infinity: {session.fault}")


def check_set_aside(session: Session) -> None:
    """Raise the ValueErrors that every engine's `set_aside` has in common."""
    check_sound(session)
    if not session.position:
        raise ValueError("session must hold a token to be set aside, got none")


def check_reopen(engine: Engine, session: Session, ids: Sequence[int], sampling: Sampling, most_tokens: int) -> None:
    """Raise the ValueErrors that every engine's `reopen` has in common."""
    check_sound(session)
    check_open(engine, ids, sampling, most_tokens)
    if not 1 <= len(ids) <= session.position:
        raise ValueError(f"ids must be 1 to {session.position} of those that the session holds, got {len(ids)}")


def check_requests(engine: Engine, requests: Sequence[Request]) -> None:
    """Raise the ValueErrors that every engine's `extend` has in common."""
    if len({id(session) for session, _ in requests}) < len(requests):
        raise ValueError(f"sessions must be different from each other, got one twice in {len(requests)} requests")
    for session, ids in requests:
        check_sound(session)
        if not ids:
            raise ValueError(f"ids must not be empty, got none at position {session.position}")
        if session.position + len(ids) > session.most_tokens:
            raise ValueError(
                f"position + ids must be at most the {session.most_tokens} tokens that were promised, "
                f"got {session.position} + {len(ids)}"
            )
        check_ids(ids, engine.vocabulary_size)


def check_finite(steps: list[TargetStep]) -> list[TargetStep]:
    """The steps of an `extend`, whose sessions have advanced. Raises `NotFinite` if one of them has a fault."""
    if any(step.fault for step in steps):
        raise NotFinite(steps)
    return steps


def check_open(engine: Engine, prompt_ids: Sequence[int], sampling: Sampling, most_tokens: int | None) -> int:
    """Raise the ValueErrors that every engine's `open` has in common. Returns the most tokens of the session."""
    check_logit_rules(engine, sampling)
    if len(prompt_ids) > engine.context:
        raise ValueError(f"prompt must be at most the context of {engine.context} tokens, got {len(prompt_ids)}")
    most = engine.context if most_tokens is None else most_tokens
    if not max(1, len(prompt_ids)) <= most <= engine.context:
        raise ValueError(f"most_tokens must be in [{max(1, len(prompt_ids))}, {engine.context}], got {most}")
    check_ids(prompt_ids, engine.vocabulary_size)
    return most


def check_logit_rules(engine: Engine, sampling: Sampling) -> None:
    """ValueError for logit rules and top tokens if the engine has no logits, and for rules that it cannot apply: it
    lacks one of their ids, or cannot compile their schema."""
    if not engine.has_logits and (sampling.logit_rules is not None or sampling.min_p):
        raise ValueError(
            "min_p, penalties, logit_bias, bad_words and schema must be off for a synthetic engine: it has no logits"
        )
    if not engine.has_logits and sampling.top_tokens:
        raise ValueError(f"top_tokens must be 0 for a synthetic engine, which has no logits, got {sampling.top_tokens}")
    if sampling.logit_rules is not None:
        sampling.logit_rules.check_ids(engine.vocabulary_size)
        check_schema(engine.grammars, sampling.logit_rules.schema)


def check_schema(grammars: Grammars | None, schema: str) -> None:
    """ValueError for a schema that cannot be compiled, or without `grammars`; an empty one is none."""
    if schema and grammars is None:
        raise ValueError("schema must be off for an engine that was opened without its model's tokenizer")
    if schema and grammars is not None:
        grammars.check(schema)


def check_ids(ids: Sequence[int], vocabulary_size: int) -> None:
    """ValueError with the first id that is not in the vocabulary."""
    if ids and not (min(ids) >= 0 and max(ids) < vocabulary_size):
        wrong = next(token for token in ids if not 0 <= token < vocabulary_size)
        raise ValueError(f"ids must be in [0, {vocabulary_size}), got {wrong}")


@dataclass(frozen=True)
class LogitRows:
    """Consecutive rows of logits of one session, to be read as a `TargetStep`."""

    logits_KV: Tensor
    """The last K rows of logits of the ids."""
    ids: Sequence[int]
    position: int
    """Position of ids[0]."""
    sampling: Sampling
    before_V: Tensor | None = None
    """The row before the first one, if the caller has it: then nll[0] is known."""
    history: History | None = None
    """Holds the text up to the last of the ids, if the sampling has logit rules."""


def read_steps(blocks: Sequence[LogitRows], want: Want) -> list[TargetStep]:
    """Draw the next token in every row of every session: the last step of each engine that has logits.

    A session whose logits hold NaN or infinity gets a step with a fault; it does not affect the others.
    """
    samplings: list[Sampling] = []
    positions: list[int] = []
    followers: list[int] = []
    changed: dict[int, Tensor] = {}
    for block in blocks:
        kept = block.logits_KV.shape[0]
        end = block.position + len(block.ids)
        if block.history is not None:
            changed |= enumerate(block.history.changed(widened(block.logits_KV), end), start=len(positions))
        samplings += [block.sampling] * kept
        positions += range(end - kept + 1, end + 1)
        followers += [*block.ids[len(block.ids) - kept + 1 :], -1]
    choice = choose(torch.cat([block.logits_KV for block in blocks]), samplings, positions, followers, changed)
    steps, row = [], 0
    for block in blocks:
        rows = slice(row, row := row + block.logits_KV.shape[0])
        known = [_nll_before(block), *choice.follower_nll[rows][:-1]] if want == "all" else []
        fault = _fault(choice.finite[rows], positions[rows])
        top = choice.top[rows] if block.sampling.top_tokens and not fault else []
        steps.append(TargetStep(choice.ids[rows], choice.nll[rows], choice.margins[rows], known, fault, top))
    return steps


def _fault(finite: Sequence[bool], positions: Sequence[int]) -> str:
    if all(finite):
        return ""
    return f"the logits for position {positions[finite.index(False)]} hold NaN or infinity"


def _nll_before(block: LogitRows) -> float:
    return math.nan if block.before_V is None else nll(block.before_V[None], block.ids[:1])[0]


class _HasIds(Protocol):
    @property
    def ids(self) -> Sequence[int]: ...


PieceT = TypeVar("PieceT", bound=_HasIds)


def together(pieces: Sequence[PieceT], most_padding: float) -> list[list[PieceT]]:
    """Groups of pieces that share a pass, longest first: long ones or short ones of similar length, with at most
    `most_padding` in all."""
    groups: list[list[PieceT]] = []
    padding = 0
    for piece in sorted(pieces, key=lambda piece: len(piece.ids), reverse=True):
        padding += len(groups[-1][0].ids) - len(piece.ids) if groups else 0
        if not groups or padding > most_padding or is_long(len(groups[-1][0].ids)) != is_long(len(piece.ids)):
            groups.append([])
            padding = 0
        groups[-1].append(piece)
    return groups
