"""A whole model in this process as an engine: batched passes over a cache of slots.

Shapes: B sessions, T positions in this call, S slots, V vocabulary, K rows of logits kept of each session.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from typing_extensions import override

from lab.engine.base import (
    NOTHING,
    SWEEP_ROWS,
    Engine,
    LogitRows,
    Request,
    Session,
    TargetStep,
    Want,
    check_finite,
    check_open,
    check_reopen,
    check_requests,
    check_set_aside,
    is_long,
    pieces_of,
    read_steps,
    together,
)
from lab.engine.compiled import CompiledModel, Compiler
from lab.engine.context import longest_text, model_context
from lab.engine.first_fault import first_faults
from lab.engine.kv import CacheFull, ExactShape, SlotCache, check_attention, layer_shapes
from lab.engine.sampling import Sampling, mix64
from lab.engine.settings import CacheSettings
from lab.engine.wide_products import pack_products
from lab.models.quantized import stored_bytes
from lab.models.shape import ModelShape
from lab.settings import UserError
from lab.text.grammars import Grammars

_UNREAD_FAULT = TargetStep([], [], [], [], "the hidden states hold NaN or infinity")
_BLOCK_ROWS = 8
"""Matrix kernels compute rows in small blocks, and the rows left over by other code, which may round differently: in
float64 on a CPU the fifth of five rows did."""


class ShapeDependence(RuntimeError):
    """On this device and dtype a row's result depends on its place in the pass: exact shapes would guarantee
    nothing."""


@dataclass
class _Extend:
    """One request on its way through the passes of an `extend`."""

    session: Session
    ids: Sequence[int]
    step: TargetStep = NOTHING
    before_V: Tensor | None = None
    is_located: bool = False
    """Whether the step's fault says where it began."""


@dataclass(frozen=True)
class _Piece:
    """The part of one request that one pass computes."""

    run: _Extend
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
        compiler: Compiles its layers, or None. Exact shapes do without.
        grammars: Compiles schemas; None: texts with a schema are refused.

    Raises:
        UserError: `device.compile=true`, and it cannot be.
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
        compiler: Compiler | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        self.grammars = grammars
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
        self._compiled: CompiledModel | None = None
        if compiler is not None and not self._exact_rows:
            self._compiled = compiler.open(self._model, self.cache.layer_numbers, self.cache)
        if self._compiled is None:
            pack_products(model)
        if self._exact_rows:
            self._probe_exact_shapes(sessions, self._exact_rows)

    @torch.inference_mode()
    @override
    def open(self, prompt_ids: Sequence[int], sampling: Sampling, most_tokens: int | None = None) -> Session:
        most = check_open(self, prompt_ids, sampling, most_tokens)
        return Session(self, self.cache.acquire(most), sampling, most).with_prompt(prompt_ids)

    @torch.inference_mode()
    @override
    def extend(self, requests: Sequence[Request], want: Want) -> list[TargetStep]:
        check_requests(self, requests)
        runs = [_Extend(session, ids) for session, ids in requests]
        for session, ids in requests:
            if session.history is not None:
                session.history.hold(session.position, ids)
        for pieces in zip_longest(*map(self._pieces, runs)):
            for group in self._groups([piece for piece in pieces if piece is not None]):
                self._pass(group, want)
                self._find_faults(group)
        return check_finite([run.session.advance(run.ids, run.step) for run in runs])

    @property
    @override
    def row_invariant(self) -> bool:
        """So with compiled layers, as tried when they were opened, and with exact shapes."""
        return bool(self._exact_rows) or (self._compiled is not None and self._compiled.row_invariant)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._device

    @property
    def weights_bytes(self) -> int:
        """Size of its tensors."""
        return stored_bytes(self._model)

    @property
    def is_compiled(self) -> bool:
        """Whether its layers are compiled."""
        return self._compiled is not None

    @override
    def close(self, session: Session) -> None:
        self.cache.release(session.key)
        session.closed = True

    @override
    def set_aside(self, session: Session) -> None:
        check_set_aside(session)
        self.cache.reserve(session.key, session.position)
        session.most_tokens = session.position

    @override
    def reopen(self, session: Session, ids: Sequence[int], sampling: Sampling, most_tokens: int) -> Session:
        check_reopen(self, session, ids, sampling, most_tokens)
        self.cache.reserve(session.key, most_tokens)
        return session.continued(ids, sampling, most_tokens)

    @override
    def shutdown(self) -> None:
        """Drop model and cache; the engine is of no use afterwards."""
        del self._model, self.cache

    @torch.inference_mode()
    def _run_one(self, cache: Cache) -> None:
        """A forward pass over one token: it shows what each layer keeps, and that the engine runs at all."""
        one = torch.zeros(1, 1, dtype=torch.long, device=self._device)
        self._model(input_ids=one, position_ids=one, past_key_values=cache, use_cache=True)

    def _pieces(self, run: _Extend) -> list[_Piece]:
        """Of one request, in the order of passes."""
        prompt_tokens = None if self._exact_rows else run.session.prompt_tokens  # exact shapes give equal bits anyway
        cuts = pieces_of(run.session.position, len(run.ids), prompt_tokens, self._chunk)
        return [_Piece(run, start, run.ids[start:end]) for start, end in cuts]

    def _groups(self, pieces: Sequence[_Piece]) -> list[list[_Piece]]:
        """The pieces that share a pass. On a CPU a long one is alone: how a product of many rows rounds each of them
        depends on the number of all, and further rows do not make it faster. On a GPU they do."""
        if self._exact_rows:
            return [list(pieces)]
        groups = together(pieces, math.inf if self._compiled else SWEEP_ROWS)
        if self._device.type != "cpu":
            return groups
        are_long = [is_long(len(group[0].ids)) for group in groups]
        return [
            part
            for group, alone in zip(groups, are_long, strict=True)
            for part in ([[one] for one in group] if alone else [group])
        ]

    def _pass(self, pieces: Sequence[_Piece], want: Want) -> None:
        """Compute some pieces in one forward pass, and read the rows of logits that are asked for."""
        read = [want == "all" or piece.is_last for piece in pieces]
        if self._compiled is not None and not is_long(len(pieces[0].ids)):
            self._compiled_pass(self._compiled, pieces, read, want)
            return
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
        self._read([(piece, self._logits_of(piece, output.logits[row], steps, want)) for piece, row in wanted], want)

    def _compiled_pass(
        self, compiled: CompiledModel, pieces: Sequence[_Piece], read: Sequence[bool], want: Want
    ) -> None:
        """A pass by rows, through compiled layers."""
        for piece in pieces:
            self.cache.lengths[piece.slot] = piece.position
        counts = [len(piece.ids) for piece in pieces]
        ids_N = torch.tensor([token for piece in pieces for token in piece.ids])
        hidden_NC = compiled.run(ids_N, [piece.slot for piece in pieces], counts)
        self.cache.commit()
        kept = []
        for piece, own_TC, is_read in zip(pieces, hidden_NC.split(counts), read, strict=True):
            if is_read:
                kept.append((piece, own_TC if want == "all" else own_TC[-1:]))
            elif not bool(own_TC.isfinite().all()):
                piece.run.step = piece.run.step.then(_UNREAD_FAULT)
        if kept:
            logits_KV = compiled.logits(torch.cat([rows_KC for _, rows_KC in kept]))
            parts = logits_KV.split([len(rows_KC) for _, rows_KC in kept])
            self._read([(piece, part_KV) for (piece, _), part_KV in zip(kept, parts, strict=True)], want)

    def _read(self, logits: Sequence[tuple[_Piece, Tensor]], want: Want) -> None:
        """Draw from the rows of logits (K x V) of some pieces."""
        blocks = [
            LogitRows(rows_KV, piece.ids, piece.position, session.sampling, piece.run.before_V, session.history)
            for piece, rows_KV in logits
            for session in (piece.run.session,)
        ]
        for (piece, _), block, step in zip(logits, blocks, read_steps(blocks, want) if blocks else [], strict=True):
            piece.run.step = piece.run.step.then(step)
            piece.run.before_V = block.logits_KV[-1].clone()

    def _find_faults(self, pieces: Sequence[_Piece]) -> None:
        """After a pass that gave NaN or infinity, find the first such position of each text."""
        if all(piece.run.is_located or not piece.run.step.fault for piece in pieces):
            return
        if not self._exact_rows:  # the others keep what the cache holds of them
            pieces = [piece for piece in pieces if piece.run.step.fault and not piece.run.is_located]
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
    def _logits_of(piece: _Piece, logits_KV: Tensor, steps: list[int] | None, want: Want) -> Tensor:
        """The rows that are read of those that a pass computed for a piece."""
        if want == "all":
            return logits_KV[: len(piece.ids)]
        last = len(piece.ids) - 1 if steps is None else steps.index(len(piece.ids) - 1)
        return logits_KV[last : last + 1]

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
        everything, output = self._forward(self._model, [_Piece(_Extend(text, ids), 0, ids) for text in texts])
        together_STV = output.logits[everything]
        for step, token in enumerate(ids):
            alone, output = self._forward(self._model, [_Piece(_Extend(texts[0], ids), step, [token])])
            wrong_S = (together_STV[:, step] != output.logits[alone[0], 0]).any(-1)
            if bool(wrong_S.any()):
                raise ShapeDependence(
                    f"exact shapes do not hold on {self._device} in {self._model.dtype}: the logits of row {step} in "
                    f"slot {int(wrong_S.nonzero()[0])} of {sessions} x {rows} rows differ from those of row 0 in slot 0"
                )
        for slot in slots:
            self.cache.release(slot)


def open_local_engine(
    model: nn.Module,
    cache: CacheSettings,
    *,
    sessions: int,
    exact_rows: int | None = None,
    compiler: Compiler | None = None,
    grammars: Grammars | None = None,
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
            compiler=compiler,
            grammars=grammars,
        )
    except UserError:
        raise
    except ShapeDependence as error:
        raise UserError(f"project.exact_shapes must be false here: {error}") from None
    except CacheFull as error:
        least = "one pass of exact shapes" if exact_rows else "a sequence of project.cache_bucket positions"
        raise UserError(f"project.cache_limit_bytes must hold {least}: {error}") from None
    except ValueError as error:
        raise UserError(f"project.exact_shapes: {error}" if exact_rows else str(error)) from None
