"""One shard of a causal language model: some of its layers, with their KV cache.

It runs the architecture's own forward over its slice. Knows nothing about networks, tokenizers or the other shards.

Shapes: B batch rows, T positions, N positions of all pieces of a pass together, H hidden size, V vocabulary, K rows of
logits kept of each piece.
"""

import itertools
import math
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_utils import PreTrainedModel
from typing_extensions import override

from lab.engine.base import LogitRows, TargetStep, Want, check_ids, check_schema, is_long, read_steps
from lab.engine.compiled import CompiledModel, Compiler
from lab.engine.context import longest_text
from lab.engine.first_fault import first_faults
from lab.engine.history import History
from lab.engine.kv import CacheFull, PassPlan, SlotCache, UnknownState, check_attention, layer_shapes
from lab.engine.sampling import Sampling
from lab.engine.wide_products import pack_products
from lab.models.layers import load_layers, with_adapter
from lab.models.quantized import stored_bytes
from lab.models.shape import ModelShape
from lab.models.slices import run_slice
from lab.models.sources import load_config
from lab.settings import ModelSettings, UserError
from lab.text.grammars import Grammars
from split.inference.messages import Piece

Result = TypeVar("Result")

UNUSED_SECONDS = 10.0
"""A request that has not begun after this time makes room for one that waits: its client may have given up."""


class RequestLost(RuntimeError):
    """The shard does not hold a request up to where a pass continues; its ids and its seed rebuild it."""


@dataclass(frozen=True, kw_only=True)
class ShardLimits:
    """Limits of a shard's cache."""

    sessions: int
    """Most requests held at once, of all clients."""
    context: int
    """Most tokens of a request."""
    bucket: int
    """The cache grows, and is attended to, in multiples of this many positions."""
    kv_limit_bytes: int
    """Most bytes of the keys and values of all requests."""
    idle_seconds: float
    """A request that no pass has continued for this long gives its slot to one that needs it."""


@dataclass
class _Request:
    slot: int
    tokens: int
    """Most tokens that it will hold."""
    sampling: Sampling
    used_at: float
    history: History | None = None
    """Its ids, at the last shard and if its sampling has logit rules."""
    is_used: bool = False
    """Whether a pass has continued it."""
    before_V: Tensor | None = None
    """The last row of logits of an extend that continues in another pass."""


@dataclass(frozen=True)
class PassInput:
    """The input of a shard in one pass."""

    pieces: Sequence[Piece]
    want: Want
    ids: Sequence[int] = ()
    """N ids, piece by piece: at the first shard, and at the last one if want is all or a request has logit rules."""
    hidden_NH: Tensor | None = None
    """Hidden states, at all but the first shard."""

    def ids_of_pieces(self) -> list[Sequence[int]]:
        """The ids of each piece."""
        return [self.ids[rows] for rows in self.rows_of_pieces()]

    def only(self, places: Sequence[int]) -> "PassInput":
        """The pass with only these of its pieces."""
        if len(places) == len(self.pieces):
            return self
        rows_of_pieces = self.rows_of_pieces()
        rows = [rows_of_pieces[place] for place in places]
        return PassInput(
            [self.pieces[place] for place in places],
            self.want,
            [token for own in rows for token in self.ids[own]],
            None if self.hidden_NH is None else torch.cat([self.hidden_NH[own] for own in rows]),
        )

    def rows_of_pieces(self) -> list[slice]:
        """The part of the N rows that is each piece's."""
        ends = itertools.accumulate(piece.count for piece in self.pieces)
        return [slice(end - piece.count, end) for piece, end in zip(self.pieces, ends, strict=True)]


PassOutput = Tensor | list[TargetStep]
"""Hidden states N x H for the next shard; from the last one the steps of the pieces that are read."""


class Shard:
    """Layers `layers` of a model: hidden states in, hidden states out.

    Args:
        model: From `lab.models.layers.load_layers`.
        layers: Which layers of the whole model these are.
        limits: How much it gives.
        clock: Clock of idle times, in seconds.
        compiler: Compiles its layers, or None.
        grammars: Compiles schemas, at the last shard; None there: requests with a schema are refused.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: range,
        limits: ShardLimits,
        clock: Callable[[], float] = time.monotonic,
        compiler: Compiler | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        self._grammars = grammars
        self._model = cast(Any, model.eval())  # the forward of a model is not typed
        config, shape = model.config, ModelShape.of(model.config)
        longest = longest_text(config) or limits.context
        if not 1 <= limits.context <= longest:
            raise UserError(f"project.context must be in [1, {longest}], got {limits.context}")
        self.layers, self.limits = layers, limits
        self.hidden_size, self.vocabulary_size = shape.hidden_size, shape.vocabulary
        self.dtype: torch.dtype = self._model.dtype
        self.device: torch.device = self._model.device
        check_attention(config)
        try:
            shapes = layer_shapes(self._run_one)
        except UnknownState as error:
            raise UserError(f"model must run over one token, got {config.model_type}: {error}") from None
        self.cache = SlotCache(
            shapes,
            slots=limits.sessions,
            bucket=limits.bucket,
            limit_bytes=limits.kv_limit_bytes,
            dtype=self.dtype,
            device=self.device,
            exact=None,
        )
        self._compiled = compiler.open(self._model, layers, self.cache) if compiler else None
        if self._compiled is None:
            pack_products(model)
        self._clock = clock
        self._requests: dict[Hashable, _Request] = {}

    takes_ids = False
    """Whether its input is token ids."""
    gives_steps = False
    """Whether its output is tokens."""

    @property
    def weights_bytes(self) -> int:
        """Size of its tensors."""
        return stored_bytes(self._model)

    def check_open(self, key: Hashable, sampling: Sampling, tokens: int) -> None:
        """ValueError for a request that no room will ever be enough for: `key` is open, `tokens` never fit, or the
        sampling's logit rules name ids that the model lacks, or a schema that the last shard cannot compile."""
        if key in self._requests:
            raise ValueError("request must be new, got one that is open")
        self._check_size(sampling, tokens)

    def _check_size(self, sampling: Sampling, tokens: int) -> None:
        if tokens > self.longest:
            raise ValueError(f"tokens must be at most the {self.longest} that fit here, prompt included, got {tokens}")
        if sampling.logit_rules is not None:
            sampling.logit_rules.check_ids(self.vocabulary_size)
            if self.gives_steps:
                check_schema(self._grammars, sampling.logit_rules.schema)

    def open(self, key: Hashable, sampling: Sampling, tokens: int) -> None:
        """Keep room for a request of at most `tokens` tokens.

        Raises:
            ValueError: as `check_open`.
            CacheFull: there is no room now, and no request that holds some is idle.
        """
        self.check_open(key, sampling, tokens)
        slot = self._with_room(lambda: self.cache.acquire(tokens))
        self._requests[key] = self._request(slot, tokens, sampling)

    def set_aside(self, key: Hashable, tokens: int) -> None:
        """Keep only the first `tokens` tokens of a request, and it only until another one needs its room."""
        request = self._requests.get(key)
        if request is not None:
            request.tokens = min(tokens, request.tokens)
            self.cache.reserve(request.slot, request.tokens)
            request.used_at = -math.inf

    def reopen(self, key: Hashable, sampling: Sampling, tokens: int, position: int, ids: Sequence[int]) -> None:
        """Keep room for a request of at most `tokens` tokens, the first `position` of which `key` holds.

        Args:
            ids: These tokens, if the sampling has logit rules.

        Raises:
            RequestLost: they are not held.
            ValueError: as `check_open`.
            CacheFull: as `open`; the request is as it was.
        """
        request = self._requests.get(key)
        held = self.cache.lengths[request.slot] if request else 0
        if request is None or held < position:
            raise RequestLost(f"a request is reopened at {position}, but {held} tokens are held")
        self._check_size(sampling, tokens)
        if position > tokens:
            raise ValueError(f"tokens must be at least the {position} that are held, got {tokens}")
        check_ids(ids, self.vocabulary_size)
        idle_since, request.used_at = request.used_at, math.inf  # not to make room for itself
        try:
            self._with_room(lambda: self.cache.reserve(request.slot, tokens))
        finally:
            request.used_at = idle_since
        self._requests[key] = renewed = self._request(request.slot, tokens, sampling)
        if renewed.history is not None:
            renewed.history.hold(0, ids)

    def _request(self, slot: int, tokens: int, sampling: Sampling) -> _Request:
        rules = sampling.logit_rules if self.gives_steps else None
        history = History(rules, self._grammars) if rules else None
        return _Request(slot, tokens, sampling, self._clock(), history)

    def _with_room(self, reserve: Callable[[], Result]) -> Result:
        """The result of `reserve`, called again after each idle request that was closed. Raises `CacheFull`."""
        while True:
            try:
                return reserve()
            except CacheFull:
                if not self._evict_idle():
                    raise

    @property
    def longest(self) -> int:
        """Most tokens of a request."""
        return min(self.limits.context, self.cache.longest)

    def close(self, key: Hashable) -> None:
        """Forget a request, if it is held."""
        request = self._requests.pop(key, None)
        if request is not None:
            self.cache.release(request.slot)

    @torch.inference_mode()
    def forward(self, keys: Sequence[Hashable], given: PassInput) -> PassOutput:
        """Advance several requests, one for each piece, in one batched pass.

        Raises:
            RequestLost: a request is not held up to where its piece begins.
            ValueError: the pieces make no sense at this shard.
        """
        check_ids(given.ids, self.vocabulary_size)
        requests = self._find(keys, given.pieces)
        # On a CPU a long piece is alone, as in a LocalEngine; compiled layers are for short ones on any device.
        parts_long = self.device.type == "cpu" or self._compiled is not None
        short = [place for place, piece in enumerate(given.pieces) if not (parts_long and is_long(piece.count))]
        if len(short) == len(given.pieces):
            return self._short_pass(requests, given)
        groups = [*([short] if short else []), *([place] for place in range(len(given.pieces)) if place not in short)]
        found: dict[int, Any] = {}
        before = [request.before_V for request in requests]
        for places in groups:
            own, part = [requests[place] for place in places], given.only(places)
            try:
                output = self._short_pass(own, part) if places == short else self._pass(own, part)
            except BaseException:  # each request is asked again as it was, those of the passes before this one, too
                for request, row_V in zip(requests, before, strict=True):
                    request.before_V = row_V
                raise
            if isinstance(output, Tensor):
                found |= zip(places, output.split([piece.count for piece in part.pieces]), strict=True)
            else:
                read = [place for place in places if given.want == "all" or given.pieces[place].is_last]
                found |= zip(read, output, strict=True)
        outputs = [found[place] for place in sorted(found)]
        return outputs if self.gives_steps else torch.cat(outputs)

    def _short_pass(self, requests: Sequence[_Request], given: PassInput) -> PassOutput:
        """A pass of short pieces: by rows where layers are compiled."""
        if self._compiled is None:
            return self._pass(requests, given)
        for request, piece in zip(requests, given.pieces, strict=True):
            self.cache.lengths[request.slot] = piece.position
        states = torch.tensor(given.ids) if self.takes_ids else given.hidden_NH
        assert states is not None
        counts = [piece.count for piece in given.pieces]
        hidden_NH = self._compiled.run(states, [request.slot for request in requests], counts)
        self.cache.commit()
        return self._of_rows(self._compiled, requests, given, hidden_NH)

    def _of_rows(
        self, compiled: CompiledModel, requests: Sequence[_Request], given: PassInput, hidden_NH: Tensor
    ) -> PassOutput:
        """The output of a pass by rows, from the hidden states behind the last layer."""
        return hidden_NH

    def _pass(self, requests: Sequence[_Request], given: PassInput) -> PassOutput:
        for request, piece in zip(requests, given.pieces, strict=True):
            self.cache.lengths[request.slot] = piece.position
        plan = self.cache.begin([request.slot for request in requests], [piece.count for piece in given.pieces])
        output = self._output(requests, plan, given)
        self.cache.commit()
        return output

    def find_faults(self, keys: Sequence[Hashable], given: PassInput) -> list[int | None]:
        """Repeat a pass that gave NaN or infinity; return the first position of each piece that has it."""
        slots = [self._requests[key].slot for key in keys]
        with first_faults(max(piece.count for piece in given.pieces)) as found:
            self._pass(self._find(keys, given.pieces), given)
        return [found.get(sorted(slots).index(slot)) for slot in slots]

    def _find(self, keys: Sequence[Hashable], pieces: Sequence[Piece]) -> list[_Request]:
        if len(set(keys)) < len(keys):
            raise ValueError(f"requests of a pass must be different from each other, got {len(keys)} with one twice")
        for key, piece in zip(keys, pieces, strict=True):
            request = self._requests.get(key)
            held = self.cache.lengths[request.slot] if request else 0
            if request is None or held < piece.position:
                raise RequestLost(f"request {piece.session} continues at {piece.position}, but {held} tokens are held")
            if piece.position + piece.count > request.tokens:
                raise ValueError(
                    f"position + ids must be at most the {request.tokens} tokens that were asked for, "
                    f"got {piece.position} + {piece.count}"
                )
        requests = [self._requests[key] for key in keys]
        for request in requests:
            request.used_at, request.is_used = self._clock(), True
        return requests

    @torch.inference_mode()
    def _run_one(self, cache: Cache) -> None:
        """Run the slice over one token, to see the state of each layer, and that it runs at all."""
        one = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        hidden_11H = torch.zeros(1, 1, self.hidden_size, dtype=self.dtype, device=self.device)
        states = one if self.takes_ids else hidden_11H
        run_slice(self._model, states, position_ids=one, past_key_values=cache, use_cache=True)

    def _output(self, requests: Sequence[_Request], plan: PassPlan, given: PassInput) -> PassOutput:
        hidden_BTH = self._run_slice(plan, given)
        parts = [hidden_BTH[row, : piece.count] for row, piece in zip(plan.rows, given.pieces, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _run_slice(self, plan: PassPlan, given: PassInput, **options: Any) -> Tensor:
        """Hidden states for the next shard, or logits."""
        return run_slice(
            self._model,
            self._input(plan, given),
            position_ids=plan.position_ids_BT,
            past_key_values=self.cache,
            use_cache=True,
            **options,
        )

    def _input(self, plan: PassPlan, given: PassInput) -> Tensor:
        assert given.hidden_NH is not None
        batch, width = plan.position_ids_BT.shape
        if batch == 1 and given.hidden_NH.shape[0] == width:
            return given.hidden_NH[None]
        hidden_BTH = given.hidden_NH.new_zeros(batch, width, self.hidden_size)
        for row, piece, own in zip(plan.rows, given.pieces, given.rows_of_pieces(), strict=True):
            hidden_BTH[row, : piece.count] = given.hidden_NH[own]
        return hidden_BTH

    def _evict_idle(self) -> bool:
        """Close the request that has been idle for the longest time, if that is long enough; return whether it was."""
        if not self._requests:
            return False
        key = max(self._requests, key=lambda key: self._idleness(self._requests[key]))
        is_idle = self._idleness(self._requests[key]) >= 0
        if is_idle:
            self.close(key)
        return is_idle

    def _idleness(self, request: _Request) -> float:
        """Seconds for which a request has been idle beyond its limit."""
        most = self.limits.idle_seconds if request.is_used else min(self.limits.idle_seconds, UNUSED_SECONDS)
        return self._clock() - request.used_at - most


class FirstShard(Shard):
    """The first shard: embedding and first layers. Its input is token ids."""

    takes_ids = True

    def _input(self, plan: PassPlan, given: PassInput) -> Tensor:
        batch, width = plan.position_ids_BT.shape
        ids_BT = [[0] * width for _ in range(batch)]
        for row, ids in zip(plan.rows, given.ids_of_pieces(), strict=True):
            ids_BT[row][: len(ids)] = ids
        return torch.tensor(ids_BT, device=self.device)


class LastShard(Shard):
    """The last shard: last layers, norm and LM head. It samples; its output is token ids."""

    gives_steps = True

    @override
    def _output(self, requests: Sequence[_Request], plan: PassPlan, given: PassInput) -> PassOutput:
        pieces, want = given.pieces, given.want
        ids_of_pieces = self._hold_ids(requests, given)
        read = [want == "all" or piece.is_last for piece in pieces]
        if not any(read):
            self._run_slice(plan, given, without_head=True)
            return []
        # As a LocalEngine does: the head only where it is asked for, in the same rows, to the same bits.
        steps = None if want == "all" else sorted({piece.count - 1 for piece in pieces})
        logits_BKV = self._run_slice(plan, given, logits_to_keep=0 if steps is None else torch.tensor(steps))
        return self._read(
            [
                (request, _wanted_rows(logits_BKV[row], piece, ids, steps, request))
                for request, row, piece, ids, is_read in zip(
                    requests, plan.rows, pieces, ids_of_pieces, read, strict=True
                )
                if is_read
            ],
            want,
        )

    @override
    def _of_rows(
        self, compiled: CompiledModel, requests: Sequence[_Request], given: PassInput, hidden_NH: Tensor
    ) -> PassOutput:
        ids_of_pieces, is_all = self._hold_ids(requests, given), given.want == "all"
        kept = [
            (request, piece, ids, own_TH if is_all else own_TH[-1:])
            for request, piece, ids, own_TH in zip(
                requests, given.pieces, ids_of_pieces, hidden_NH.split([len(ids) for ids in ids_of_pieces]), strict=True
            )
            if is_all or piece.is_last
        ]
        if not kept:
            return []
        logits_KV = compiled.logits(torch.cat([rows_KH for *_, rows_KH in kept]))
        parts = logits_KV.split([len(rows_KH) for *_, rows_KH in kept])
        return self._read(
            [
                (request, _logit_rows(part_KV, piece, ids, request))
                for (request, piece, ids, _), part_KV in zip(kept, parts, strict=True)
            ],
            given.want,
        )

    def _hold_ids(self, requests: Sequence[_Request], given: PassInput) -> list[Sequence[int]]:
        """The ids of each piece, held for requests that have logit rules; -1 where the pass brings none."""
        unknown: list[Sequence[int]] = [[-1] * piece.count for piece in given.pieces]
        ids_of_pieces = given.ids_of_pieces() if given.ids else unknown
        for request, piece, ids in zip(requests, given.pieces, ids_of_pieces, strict=True):
            if request.history is not None:
                if not given.ids:
                    raise ValueError(
                        "a pass of a request with penalties, biases, bad words or a schema must bring its ids, got none"
                    )
                request.history.hold(piece.position, ids)
        return ids_of_pieces

    def _read(self, wanted: Sequence[tuple[_Request, LogitRows]], want: Want) -> list[TargetStep]:
        found = read_steps([block for _, block in wanted], want)
        for request, block in wanted:  # not before: where this raises, each request is asked again as it was
            request.before_V = block.logits_KV[-1].clone() if want == "all" else None
        return found


def _wanted_rows(
    logits_KV: Tensor, piece: Piece, ids: Sequence[int], steps: list[int] | None, request: _Request
) -> LogitRows:
    if steps is None:
        rows_KV = logits_KV[: piece.count]
    else:
        last = steps.index(piece.count - 1)
        rows_KV = logits_KV[last : last + 1]
    return _logit_rows(rows_KV, piece, ids, request)


def _logit_rows(rows_KV: Tensor, piece: Piece, ids: Sequence[int], request: _Request) -> LogitRows:
    before_V = None if piece.is_first else request.before_V
    return LogitRows(rows_KV, ids, piece.position, request.sampling, before_V, request.history)


class OnlyShard(FirstShard, LastShard):
    """All layers: a model that is not split, served as a shard."""


def load_shard(
    settings: ModelSettings,
    device: torch.device,
    layers: range,
    limits: ShardLimits,
    compiler: Compiler | None = None,
    grammars: Grammars | None = None,
) -> Shard:
    """The shard of these layers, with its part of `model.adapter`; only its own tensors are read.

    Raises:
        UserError: the model lacks these layers, or `load_layers` or `add_adapter` refuses it.
    """
    first, last = layers.start == 0, layers.stop == ModelShape.of(load_config(settings)).layers
    model = with_adapter(load_layers(settings, device, layers, embedding=first, head=last), settings)
    return shard_class(first, last)(model, layers, limits, compiler=compiler, grammars=grammars)


def shard_class(first: bool, last: bool) -> type[Shard]:
    """The class of a shard that is the first, the last, both or neither."""
    if first and last:
        return OnlyShard
    return FirstShard if first else LastShard if last else Shard
