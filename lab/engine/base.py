"""An engine speaks token ids: it takes what the text is, and says what the target model puts after it.

Logits stay where they are made. A whole model in this process, a model split over machines and a synthetic engine with
settable speeds are all engines; verifiers, drafters and benchmarks do not know which one they hold. An engine and its
sessions belong to one thread.

Knows nothing about tokenizers, texts or networks.

Shapes: B sessions, T positions in this call, V vocabulary, K rows of logits kept of each session.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from lab.engine.context import longest_text, model_context
from lab.engine.first_fault import first_faults
from lab.engine.history import History
from lab.engine.kv import CacheFull, ExactShape, SlotCache, check_attention, layer_shapes
from lab.engine.not_finite import NotFinite
from lab.engine.sampling import Sampling, choose, mix64, nll, widened
from lab.engine.settings import CacheSettings
from lab.engine.wide_products import pack_products
from lab.models.shape import ModelShape
from lab.settings import UserError

Want = Literal["last", "all"]
"""`all`: a step for every id given; `last`: only for the last one, so that a long prompt costs the head once."""

SWEEP_ROWS = 16
"""A pass is mostly one sweep over the weights, which costs about as much as this many rows more (a CPU, bfloat16):
where sessions of different lengths would need more padding than this to share a pass, they take two."""

_BLOCK_ROWS = 8
"""Matrix kernels compute rows in small blocks, and the rows left over by other code, which may round differently: in
float64 on a CPU the fifth of five rows did."""


class ShapeDependence(RuntimeError):
    """On this device and dtype a row's result depends on its place in the pass: exact shapes would promise nothing."""


@dataclass(frozen=True, slots=True)
class TargetStep:
    """What the target says about the ids of one `extend`: T entries; with want=last only one, and no `nll`."""

    next_ids: list[int]
    """[t] is what the target puts after ids[t]."""
    next_nll: list[float]
    """[t] is the cross-entropy, in nats, of next_ids[t]: plain softmax of the logits, without temperature."""
    margin: list[float]
    """[t] is the lead of next_ids[t] over the second best, in units of the logits, noise included: `Choice.margins`."""
    nll: list[float]
    """[t] is the cross-entropy, in nats, of ids[t] under the step before it. NaN at t = 0 unless ids[0] is what the
    target had put there itself in the extend just before: no other logits are kept between calls."""
    fault: str = ""
    """Where NaN or infinity came up first, for people. With a fault the lists above mean nothing."""

    def then(self, later: TargetStep) -> TargetStep:
        """This step and the one that goes on behind it, as one."""
        return TargetStep(
            self.next_ids + later.next_ids,
            self.next_nll + later.next_nll,
            self.margin + later.margin,
            self.nll + later.nll,
            self.fault or later.fault,
        )


NOTHING = TargetStep([], [], [], [])
_UNREAD_FAULT = TargetStep([], [], [], [], "the hidden states hold NaN or infinity")


class Session:
    """One text in one engine: its sampling, and how many of its tokens the engine holds.

    ``session.position = n`` forgets everything from token n on, in O(1). A context manager: leaving it closes it.
    """

    def __init__(self, engine: Engine, key: int, sampling: Sampling, most_tokens: int) -> None:
        self.key = key
        """The engine's own handle."""
        self.most_tokens = most_tokens
        """What it was promised: it never holds more."""
        self.sampling = sampling
        self.history = History(sampling.words) if sampling.words else None
        """The text, for the words of its sampling; None where it has none. Kept by engines that have the logits."""
        self.step: TargetStep | None = None
        """The outcome of the latest extend; right after `open` that of the prompt. None when the prompt was empty."""
        self.closed = False
        self.fault = ""
        """Where NaN or infinity came up: what the engine holds of it is spoilt, and it can only be closed."""
        self._engine = engine
        self._position = 0

    @property
    def position(self) -> int:
        """Tokens held: where the next id will stand."""
        return self._position

    @position.setter
    def position(self, position: int) -> None:
        if not 0 <= position <= self._position:
            raise ValueError(f"position must be in [0, {self._position}], got {position}")
        self._position = position

    def advance(self, ids: Sequence[int], step: TargetStep) -> TargetStep:
        """For engines: the ids are held now, and this is what came of them. Fills in ``nll[0]`` where it is known."""
        if step.nll and math.isnan(step.nll[0]):
            step = replace(step, nll=[self._own_nll(ids[0]), *step.nll[1:]])
        self.fault = self.fault or step.fault
        self._position += len(ids)
        self._first_next = self._position - len(step.next_ids) + 1
        self.step = step
        return step

    def close(self) -> None:
        """Give back what the engine keeps. Twice is once."""
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


class Engine(Protocol):
    """What a target is, wherever it runs."""

    vocabulary_size: int
    """Ids are in [0, vocabulary_size)."""
    context: int
    """The most tokens that a text may have."""
    longest: int
    """The most tokens that a session can be promised: the context, or fewer where not even one such text fits."""
    has_logits: bool = True
    """Whether it can apply min_p, penalties and word lists, which change logits."""

    def open(self, prompt_ids: Sequence[int], sampling: Sampling, most_tokens: int | None = None) -> Session:
        """Start a text and run its prompt; ``session.step.next_ids[-1]`` is the first new token.

        The prompt may be empty: then the caller feeds it by `extend`, in the pieces it likes.

        Args:
            prompt_ids: The beginning of the text.
            sampling: How it goes on.
            most_tokens: The most that the session will ever hold, prompt included: there will be room for them,
                whatever else is opened. None: the whole context.

        Raises:
            ValueError: an id outside the vocabulary, or a prompt longer than the context or than `most_tokens`.
            CacheFull: no slot is free, or what is promised already leaves no room for so many tokens.
            NotFinite: see `extend`; the session is closed again.
        """
        ...

    def extend(self, requests: Sequence[Request], want: Want) -> list[TargetStep]:
        """Append ids to several sessions, each at its own position, in one batched pass.

        Raises:
            ValueError: no ids, ids outside the vocabulary, a session twice, closed or beyond what it was promised.
                Every session is where it was.
            NotFinite: the logits of some sessions, or hidden states on the way to them, hold NaN or infinity. These
                sessions must be closed: what the cache holds of them would spoil every later pass. The others have
                advanced, and their steps are in the exception.
        """
        ...

    def close(self, session: Session) -> None:
        """Forget a session; its slot is free again."""
        ...

    def shutdown(self) -> None:
        """Give back everything: memory here, connections of an engine that has some."""
        ...


def check_requests(engine: Engine, requests: Sequence[Request]) -> None:
    """What every engine refuses in `extend`, as ValueErrors."""
    if len({id(session) for session, _ in requests}) < len(requests):
        raise ValueError(f"sessions must be different from each other, got one twice in {len(requests)} requests")
    for session, ids in requests:
        if session.closed:
            raise ValueError(f"session must be open, got one closed at position {session.position}")
        if session.fault:
            raise ValueError(f"session must be sound, got one that met NaN or infinity: {session.fault}")
        if not ids:
            raise ValueError(f"ids must not be empty, got none at position {session.position}")
        if session.position + len(ids) > session.most_tokens:
            raise ValueError(
                f"position + ids must be at most the {session.most_tokens} tokens that were promised, "
                f"got {session.position} + {len(ids)}"
            )
        check_ids(ids, engine.vocabulary_size)


def check_finite(steps: list[TargetStep]) -> list[TargetStep]:
    """The steps of an `extend`, whose sessions have advanced. Raises `NotFinite` where one of them has a fault."""
    if any(step.fault for step in steps):
        raise NotFinite(steps)
    return steps


def check_open(engine: Engine, prompt_ids: Sequence[int], sampling: Sampling, most_tokens: int | None) -> int:
    """What every engine refuses in `open`, as ValueErrors; returns the most tokens of the session."""
    check_words(engine, sampling)
    if len(prompt_ids) > engine.context:
        raise ValueError(f"prompt must be at most the context of {engine.context} tokens, got {len(prompt_ids)}")
    most = engine.context if most_tokens is None else most_tokens
    if not max(1, len(prompt_ids)) <= most <= engine.context:
        raise ValueError(f"most_tokens must be in [{max(1, len(prompt_ids))}, {engine.context}], got {most}")
    check_ids(prompt_ids, engine.vocabulary_size)
    return most


def check_words(engine: Engine, sampling: Sampling) -> None:
    """Refuse words that an engine cannot mind, as a ValueError."""
    if not engine.has_logits and (sampling.words is not None or sampling.min_p):
        raise ValueError(
            "min_p, penalties, logit_bias and bad_words must be off for a synthetic engine: it has no logits"
        )
    if sampling.words is not None:
        sampling.words.check_ids(engine.vocabulary_size)


def check_ids(ids: Sequence[int], vocabulary_size: int) -> None:
    """Refuse ids that are not in the vocabulary, as a ValueError with the first of them."""
    if ids and not (min(ids) >= 0 and max(ids) < vocabulary_size):
        wrong = next(token for token in ids if not 0 <= token < vocabulary_size)
        raise ValueError(f"ids must be in [0, {vocabulary_size}), got {wrong}")


@dataclass(frozen=True)
class Scored:
    """Consecutive rows of logits of one session, to be read as a `TargetStep`."""

    logits_KV: Tensor
    """The last K of the rows that the ids gave."""
    ids: Sequence[int]
    position: int
    """Where ids[0] stands."""
    sampling: Sampling
    before_V: Tensor | None = None
    """The row before the first one, if the caller has it: then nll[0] is known."""
    history: History | None = None
    """Holds the text up to the last of the ids, where the sampling has words."""


def read_steps(blocks: Sequence[Scored], want: Want) -> list[TargetStep]:
    """Let the target choose in every row of every session at once: the end of an engine, for who has the logits.

    A session whose logits hold NaN or infinity gets a step with a fault; the others get what they get without it.
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
        steps.append(TargetStep(choice.ids[rows], choice.nll[rows], choice.margins[rows], known, fault))
    return steps


def _fault(finite: Sequence[bool], positions: Sequence[int]) -> str:
    if all(finite):
        return ""
    return f"the logits for position {positions[finite.index(False)]} hold NaN or infinity"


def _nll_before(block: Scored) -> float:
    return math.nan if block.before_V is None else nll(block.before_V[None], block.ids[:1])[0]


@dataclass
class _Run:
    """One request on its way through the passes of an `extend`."""

    session: Session
    ids: Sequence[int]
    step: TargetStep = NOTHING
    before_V: Tensor | None = None
    is_located: bool = False
    """Whether the step's fault says where it began."""


@dataclass(frozen=True)
class _Piece:
    """What one pass takes of one run."""

    run: _Run
    start: int
    ids: Sequence[int]

    @property
    def slot(self) -> int:
        return self.run.session.key

    @property
    def position(self) -> int:
        return self.run.session.position + self.start

    @property
    def is_last(self) -> bool:
        return self.start + len(self.ids) == len(self.run.ids)


class _HasIds(Protocol):
    @property
    def ids(self) -> Sequence[int]: ...


PieceT = TypeVar("PieceT", bound=_HasIds)


def together(pieces: Sequence[PieceT], most_padding: float) -> list[list[PieceT]]:
    """The pieces that share a pass, longest first: those of about the same length, with at most so much padding."""
    groups: list[list[PieceT]] = []
    padding = 0
    for piece in sorted(pieces, key=lambda piece: len(piece.ids), reverse=True):
        padding += len(groups[-1][0].ids) - len(piece.ids) if groups else 0
        if not groups or padding > most_padding:
            groups.append([])
            padding = 0
        groups[-1].append(piece)
    return groups


class LocalEngine(Engine):
    """A whole decoder-only transformers model in this process.

    Args:
        model: Any ``...ForCausalLM`` with full or sliding-window attention, sdpa or eager; also behind a PEFT adapter.
        sessions: The most sessions open at once.
        context: The most tokens of a session; at most what the model was made for.
        bucket: The cache grows, and is attended to, in multiples of this many positions.
        kv_limit_bytes: The most that keys and values of all sessions may take.
        prefill_chunk: The most tokens of a session in one pass; a longer extend takes several. Bounds the memory. Exact
            shapes take their rows instead.
        exact_rows: None, or exact shapes: every pass computes so many positions (rounded up to a multiple of 8) of
            `sessions` sessions over the whole context, whatever was asked, so that a token's bits do not depend on how
            it was asked for. Probed here.

    Raises:
        ValueError: a context the model was not made for, an attention that takes no masks, a model that keeps
            something else than keys and values, more than one CPU thread with exact shapes.
        CacheFull: the exact shape, or one bucket of one text, does not fit into the limit.
        ShapeDependence: exact shapes do not hold on this device.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sessions: int,
        context: int,
        bucket: int,
        kv_limit_bytes: int,
        prefill_chunk: int,
        exact_rows: int | None,
    ) -> None:
        pack_products(model)
        self._model = cast(Any, model.eval())  # the forward of a model is not typed
        longest = longest_text(self._model.config) or context
        if not 1 <= context <= longest:
            raise ValueError(f"context must be in [1, {longest}], got {context}")
        if prefill_chunk < 1:
            raise ValueError(f"prefill_chunk must be at least 1, got {prefill_chunk}")
        if exact_rows is not None and exact_rows < 1:
            raise ValueError(f"exact_rows must be at least 1, got {exact_rows}")
        self.vocabulary_size = ModelShape.of(self._model.config).vocabulary
        self.context = context
        self._device: torch.device = self._model.device
        self._exact_rows = exact_rows and -(-exact_rows // _BLOCK_ROWS) * _BLOCK_ROWS
        self._chunk = self._exact_rows or prefill_chunk
        check_attention(self._model.config)
        self.cache = SlotCache(
            layer_shapes(self._run_one),
            slots=sessions,
            bucket=bucket,
            limit_bytes=kv_limit_bytes,
            dtype=self._model.dtype,
            device=self._device,
            exact=ExactShape(rows=self._exact_rows, columns=context) if self._exact_rows else None,
        )
        self.longest = min(context, self.cache.longest)
        if self._exact_rows:
            self._probe_exact_shapes(sessions, self._exact_rows)

    @torch.inference_mode()
    def open(self, prompt_ids: Sequence[int], sampling: Sampling, most_tokens: int | None = None) -> Session:
        """See `Engine.open`."""
        most = check_open(self, prompt_ids, sampling, most_tokens)
        session = Session(self, self.cache.acquire(most), sampling, most)
        try:
            if prompt_ids:
                self.extend([(session, prompt_ids)], want="last")
        except BaseException:
            session.close()
            raise
        return session

    @torch.inference_mode()
    def extend(self, requests: Sequence[Request], want: Want) -> list[TargetStep]:
        """See `Engine.extend`."""
        check_requests(self, requests)
        runs = [_Run(session, ids) for session, ids in requests]
        for session, ids in requests:
            if session.history is not None:
                session.history.hold(session.position, ids)
        longest = max((len(run.ids) for run in runs), default=0)
        for start in range(0, longest, self._chunk):
            end = start + self._chunk
            pieces = [_Piece(run, start, run.ids[start:end]) for run in runs if run.ids[start:]]
            for group in together(pieces, math.inf if self._exact_rows else SWEEP_ROWS):
                self._pass(group, want)
                self._find_faults(group)
        return check_finite([run.session.advance(run.ids, run.step) for run in runs])

    def close(self, session: Session) -> None:
        """See `Engine.close`."""
        self.cache.release(session.key)
        session.closed = True

    def shutdown(self) -> None:
        """Drop model and cache; the engine is of no use afterwards."""
        del self._model, self.cache

    @torch.inference_mode()
    def _run_one(self, cache: Cache) -> None:
        """A forward pass over one token: it shows what each layer keeps, and that the engine runs at all."""
        one = torch.zeros(1, 1, dtype=torch.long, device=self._device)
        self._model(input_ids=one, position_ids=one, past_key_values=cache, use_cache=True)

    def _pass(self, pieces: Sequence[_Piece], want: Want) -> None:
        """Run some pieces together, and read the rows of logits that are asked for."""
        read = [want == "all" or piece.is_last for piece in pieces]
        if not any(read) and not self._exact_rows:
            rows, output = self._forward(self._model.get_decoder(), pieces)
            for piece, row in zip(pieces, rows, strict=True):
                if not bool(output.last_hidden_state[row, : len(piece.ids)].isfinite().all()):
                    piece.run.step = piece.run.step.then(_UNREAD_FAULT)
            return
        # Exact shapes fix the rows of the head, too.
        steps = None if want == "all" or self._exact_rows else sorted({len(piece.ids) - 1 for piece in pieces})
        rows, output = self._forward(self._model, pieces, logits_to_keep=0 if steps is None else torch.tensor(steps))
        wanted = [(piece, row) for piece, row, is_read in zip(pieces, rows, read, strict=True) if is_read]
        if not wanted:
            return
        blocks = [self._scored(piece, output.logits[row], steps, want) for piece, row in wanted]
        for (piece, _), block, step in zip(wanted, blocks, read_steps(blocks, want), strict=True):
            piece.run.step = piece.run.step.then(step)
            piece.run.before_V = block.logits_KV[-1].clone()

    def _find_faults(self, pieces: Sequence[_Piece]) -> None:
        """Where a pass gave NaN or infinity, say which position was the first of its text."""
        if all(piece.run.is_located or not piece.run.step.fault for piece in pieces):
            return
        with first_faults(self._exact_rows or max(len(piece.ids) for piece in pieces)) as found:
            rows, _ = self._forward(self._model, pieces)
        for piece, row in zip(pieces, rows, strict=True):
            if piece.run.step.fault and not piece.run.is_located and row in found:
                fault = f"the hidden states of position {piece.position + found[row]} hold NaN or infinity"
                piece.run.step = replace(piece.run.step, fault=fault)
            piece.run.is_located = bool(piece.run.step.fault)

    def _forward(self, model: Any, pieces: Sequence[_Piece], **options: Any) -> tuple[list[int], Any]:
        """Run the model, or only its decoder, over the pieces. Returns the batch row of each and the model's output."""
        for piece in pieces:
            self.cache.lengths[piece.slot] = piece.position
        plan = self.cache.begin([piece.slot for piece in pieces], [len(piece.ids) for piece in pieces])
        batch, width = plan.position_ids_BT.shape
        ids_BT = [[0] * width for _ in range(batch)]
        for row, piece in zip(plan.rows, pieces, strict=True):
            ids_BT[row][: len(piece.ids)] = piece.ids
        output = model(
            input_ids=torch.tensor(ids_BT, device=self._device),
            position_ids=plan.position_ids_BT,
            past_key_values=self.cache,
            use_cache=True,
            **options,
        )
        self.cache.commit()
        return plan.rows, output

    @staticmethod
    def _scored(piece: _Piece, logits_KV: Tensor, steps: list[int] | None, want: Want) -> Scored:
        if want == "last":
            last = len(piece.ids) - 1 if steps is None else steps.index(len(piece.ids) - 1)
            rows_KV = logits_KV[last : last + 1]
        else:
            rows_KV = logits_KV[: len(piece.ids)]
        session = piece.run.session
        return Scored(rows_KV, piece.ids, piece.position, session.sampling, piece.run.before_V, session.history)

    @torch.inference_mode()
    def _probe_exact_shapes(self, sessions: int, rows: int) -> None:
        """Refuse when a token's logits depend on its place: all rows of all slots in one pass, against one by one.

        The cache is filled to its end with the same noise in all slots: with few columns in use, sums over columns in
        another order would go unseen.
        """
        if self._device.type == "cpu" and torch.get_num_threads() != 1:
            raise ValueError(f"torch threads must be 1 with exact shapes on a CPU, got {torch.get_num_threads()}")
        start = max(0, self.context - rows)
        ids = [mix64(step) % self.vocabulary_size for step in range(min(rows, self.context))]
        self.cache.fill_with_noise(start, seed=0)
        slots = range(sessions)
        texts = [Session(self, slot, Sampling.greedy(), self.context) for slot in slots]
        for text in texts:
            text._position = start
        everything, output = self._forward(self._model, [_Piece(_Run(text, ids), 0, ids) for text in texts])
        together_STV = output.logits[everything]
        for step, token in enumerate(ids):
            alone, output = self._forward(self._model, [_Piece(_Run(texts[0], ids), step, [token])])
            wrong_S = (together_STV[:, step] != output.logits[alone[0], 0]).any(-1)
            if bool(wrong_S.any()):
                raise ShapeDependence(
                    f"exact shapes do not hold on {self._device} in {self._model.dtype}: the logits of row {step} in "
                    f"slot {int(wrong_S.nonzero()[0])} of {sessions} x {rows} rows differ from those of row 0 in slot 0"
                )
        for slot in slots:
            self.cache.release(slot)


class SyntheticEngine(Engine):
    """An engine without a model: text from a hash, and passes that take the time they are told to.

    The token at a position is a hash of the seed, the position and all tokens before it, so that a wrong token changes
    everything behind it, as in a model. A second engine with ``agreement`` below 1 is a drafter for it: after any
    prefix it says the same token with that probability, independently at each prefix, and another one otherwise.

    Args:
        vocabulary_size: Ids are in [0, vocabulary_size); at least 2.
        context: The most tokens of a session.
        sessions: The most sessions open at once.
        step_seconds: Time of a pass over one row.
        row_seconds: Time of each further row in a pass, of any session.
        agreement: Probability to say what the target says; 1 is the target itself.
        sleep: Waits so many seconds; a test passes its own.
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

    def open(self, prompt_ids: Sequence[int], sampling: Sampling, most_tokens: int | None = None) -> Session:
        """See `Engine.open`."""
        most = check_open(self, prompt_ids, sampling, most_tokens)
        if len(self._hashes) == self._sessions:
            raise CacheFull(f"all {self._sessions} sessions of the synthetic engine are taken")
        self._opened += 1
        session = Session(self, self._opened, sampling, most)
        self._hashes[session.key] = [mix64(sampling.seed)]
        if prompt_ids:
            self.extend([(session, prompt_ids)], want="last")
        return session

    def extend(self, requests: Sequence[Request], want: Want) -> list[TargetStep]:
        """See `Engine.extend`. Cross-entropies are 0 for what this engine says itself, and log V for the rest."""
        began = time.monotonic()
        check_requests(self, requests)
        steps = [session.advance(ids, self._say(session, ids, want)) for session, ids in requests]
        rows = sum(len(ids) for _, ids in requests)
        pass_seconds = self._step_seconds + self._row_seconds * (rows - 1)
        self._sleep(max(0.0, began + pass_seconds - time.monotonic()))
        return steps

    def close(self, session: Session) -> None:
        """See `Engine.close`."""
        del self._hashes[session.key]
        session.closed = True

    def shutdown(self) -> None:
        """Forget all sessions."""
        self._hashes.clear()

    def _say(self, session: Session, ids: Sequence[int], want: Want) -> TargetStep:
        hashes = self._hashes[session.key]
        del hashes[session.position + 1 :]
        before = self._next_id(hashes[-1])
        for token in ids:
            hashes.append(mix64(hashes[-1] ^ token))
        next_ids = [self._next_id(prefix) for prefix in hashes[-len(ids) if want == "all" else -1 :]]
        surprise = math.log(self.vocabulary_size)
        said = [before, *next_ids[:-1]] if want == "all" else []
        nll = [0.0 if token == expected else surprise for token, expected in zip(ids, said)]
        return TargetStep(next_ids, [0.0] * len(next_ids), [1.0] * len(next_ids), nll)

    def _next_id(self, prefix: int) -> int:
        """The hash of a prefix has the seed in it, and its position in the number of times it was mixed."""
        target = mix64(prefix + 1) % self.vocabulary_size
        if mix64(prefix + 2) < self._agreement * 2**64:
            return target
        return (target + 1 + mix64(prefix + 3) % (self.vocabulary_size - 1)) % self.vocabulary_size


def open_local_engine(
    model: nn.Module, cache: CacheSettings, *, sessions: int, exact_rows: int | None = None
) -> LocalEngine:
    """Open `model` for `sessions` texts with the other sizes of `cache`. UserError where they are too small, or exact
    shapes do not hold."""
    try:
        return LocalEngine(
            model,
            sessions=sessions,
            context=model_context(cast(Any, model).config, cache.context),
            bucket=cache.cache_bucket,
            kv_limit_bytes=cache.cache_limit_bytes,
            prefill_chunk=cache.prefill_chunk,
            exact_rows=exact_rows,
        )
    except ShapeDependence as error:
        raise UserError(f"project.exact_shapes must be false here: {error}") from None
    except CacheFull as error:
        least = "one pass of exact shapes" if exact_rows else "a text of project.cache_bucket positions"
        raise UserError(f"project.cache_limit_bytes must hold {least}: {error}") from None
    except ValueError as error:
        raise UserError(f"project.exact_shapes: {error}" if exact_rows else str(error)) from None
