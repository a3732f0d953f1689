"""One shard of a causal language model: its own layers, its own texts.

It runs the architecture's own forward over its slice, with a `SlotCache` of its own layers. Knows nothing about
networks, tokenizers or the other shards.

Shapes: B batch rows, T positions, N positions of all pieces of a pass together, H hidden size, V vocabulary, K rows of
logits kept of each piece.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_utils import PreTrainedModel

from lab.engine.base import Scored, TargetStep, Want, check_ids, read_steps
from lab.engine.context import longest_text
from lab.engine.first_fault import first_faults
from lab.engine.history import History
from lab.engine.kv import CacheFull, Pass, SlotCache, UnknownState, check_attention, layer_shapes
from lab.engine.sampling import Sampling
from lab.engine.wide_products import pack_products
from lab.models.layers import load_layers
from lab.models.shape import ModelShape
from lab.models.slices import run_slice
from lab.models.sources import load_config
from lab.settings import ModelSettings, UserError
from split.inference.messages import Piece

UNUSED_SECONDS = 10.0
"""Room that was kept for a text which then did not begin goes to one that waits: whoever asked may have given up."""


class TextLost(RuntimeError):
    """The shard does not hold a text up to where a pass goes on; its ids and its seed rebuild it."""


@dataclass(frozen=True, kw_only=True)
class ShardLimits:
    """How much a shard gives."""

    sessions: int
    """The most texts held at once, of all clients."""
    context: int
    """The most tokens of a text."""
    bucket: int
    """The cache grows, and is attended to, in multiples of this many positions."""
    kv_limit_bytes: int
    """The most that keys and values of all texts may take."""
    idle_seconds: float
    """A text that nobody has asked for so long gives its slot to one that needs it."""


@dataclass
class _Text:
    slot: int
    tokens: int
    """The most that it will hold."""
    sampling: Sampling
    used_at: float
    history: History | None = None
    """The text, at the last shard and where its sampling has words."""
    is_used: bool = False
    """Whether a pass has come for it."""
    before_V: Tensor | None = None
    """The last row of logits of an extend that goes on in another pass."""


@dataclass(frozen=True)
class Entering:
    """What a pass brings to a shard."""

    pieces: Sequence[Piece]
    want: Want
    ids: Sequence[int] = ()
    """N ids, piece by piece: for the first shard, and for the last one where want is all or a text has words."""
    hidden_NH: Tensor | None = None
    """For all but the first shard."""

    def ids_of_pieces(self) -> list[Sequence[int]]:
        """The ids of each piece."""
        return [self.ids[rows] for rows in self._rows_of_pieces()]

    def only(self, places: Sequence[int]) -> Entering:
        """The same pass with only these of its pieces."""
        if len(places) == len(self.pieces):
            return self
        rows_of_pieces = self._rows_of_pieces()
        rows = [rows_of_pieces[place] for place in places]
        return Entering(
            [self.pieces[place] for place in places],
            self.want,
            [token for own in rows for token in self.ids[own]],
            None if self.hidden_NH is None else torch.cat([self.hidden_NH[own] for own in rows]),
        )

    def _rows_of_pieces(self) -> list[slice]:
        ends = _ends(self.pieces)
        return [slice(end - piece.count, end) for piece, end in zip(self.pieces, ends, strict=True)]


Leaving = Tensor | list[TargetStep]
"""Hidden states N x H for the next shard; from the last one the steps of the pieces that are read."""


class Shard:
    """Layers `layers` of a model: hidden states in, hidden states out.

    Args:
        model: From `lab.models.layers.load_layers`.
        layers: Which layers of the whole model these are.
        limits: How much it gives.
        clock: Seconds, for idle texts.
    """

    def __init__(
        self, model: PreTrainedModel, layers: range, limits: ShardLimits, clock: Callable[[], float] = time.monotonic
    ) -> None:
        pack_products(model)
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
        self._clock = clock
        self._texts: dict[Hashable, _Text] = {}

    takes_ids = False
    """Whether it begins with token ids."""
    gives_steps = False
    """Whether it ends with tokens."""

    @property
    def weights_bytes(self) -> int:
        """What its tensors take; a tied one counts once, one in 4 bits with its scales."""
        tensors = {id(tensor): tensor for tensor in (*self._model.parameters(), *self._model.buffers())}
        packed = [state for tensor in tensors.values() if (state := getattr(tensor, "quant_state", None)) is not None]
        return sum(tensor.nbytes for tensor in (*tensors.values(), *(state.absmax for state in packed)))

    def open(self, key: Hashable, sampling: Sampling, tokens: int) -> None:
        """Keep room for a text of at most so many tokens.

        Raises:
            ValueError: it is open, longer than what fits here at all, or its words name ids that the model lacks.
            CacheFull: there is no room now, and no text that holds some is idle.
        """
        if key in self._texts:
            raise ValueError("text must be new, got one that is open")
        if tokens > self.longest:
            raise ValueError(f"tokens must be at most the {self.longest} that fit here, prompt included, got {tokens}")
        if sampling.words is not None:
            sampling.words.check_ids(self.vocabulary_size)
        while True:
            try:
                slot = self.cache.acquire(tokens)
                break
            except CacheFull:
                if not self._evict_idle():
                    raise
        history = History(sampling.words) if sampling.words and self.gives_steps else None
        self._texts[key] = _Text(slot, tokens, sampling, self._clock(), history)

    @property
    def longest(self) -> int:
        """The most tokens of a text."""
        return min(self.limits.context, self.cache.longest)

    def close(self, key: Hashable) -> None:
        """Forget a text; one that is not held was forgotten before."""
        text = self._texts.pop(key, None)
        if text is not None:
            self.cache.release(text.slot)

    @torch.inference_mode()
    def run(self, keys: Sequence[Hashable], entering: Entering) -> Leaving:
        """Advance several texts in one batched pass.

        Args:
            keys: The text of each piece.
            entering: The pieces with what they bring.

        Raises:
            TextLost: a text is not held up to where its piece begins.
            ValueError: pieces that make no sense here.
        """
        check_ids(entering.ids, self.vocabulary_size)
        texts = self._find(keys, entering.pieces)
        for text, piece in zip(texts, entering.pieces, strict=True):
            self.cache.lengths[text.slot] = piece.position
        plan = self.cache.begin([text.slot for text in texts], [piece.count for piece in entering.pieces])
        leaving = self._forward(texts, plan, entering)
        self.cache.commit()
        return leaving

    def find_faults(self, keys: Sequence[Hashable], entering: Entering) -> list[int | None]:
        """Make a pass again that gave NaN or infinity, to see which position of each piece was the first to have it."""
        slots = [self._texts[key].slot for key in keys]
        with first_faults(max(piece.count for piece in entering.pieces)) as found:
            self.run(keys, entering)
        return [found.get(sorted(slots).index(slot)) for slot in slots]

    def _find(self, keys: Sequence[Hashable], pieces: Sequence[Piece]) -> list[_Text]:
        if len(set(keys)) < len(keys):
            raise ValueError(f"texts of a pass must be different from each other, got {len(keys)} with one twice")
        for key, piece in zip(keys, pieces, strict=True):
            text = self._texts.get(key)
            held = self.cache.lengths[text.slot] if text else 0
            if text is None or held < piece.position:
                raise TextLost(f"text {piece.session} goes on at {piece.position}, held are {held}")
            if piece.position + piece.count > text.tokens:
                raise ValueError(
                    f"position + ids must be at most the {text.tokens} tokens that were asked for, "
                    f"got {piece.position} + {piece.count}"
                )
        texts = [self._texts[key] for key in keys]
        for text in texts:
            text.used_at, text.is_used = self._clock(), True
        return texts

    @torch.inference_mode()
    def _run_one(self, cache: Cache) -> None:
        """A forward pass over one token: it shows what each layer keeps, and that the shard runs at all."""
        one = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        hidden_11H = torch.zeros(1, 1, self.hidden_size, dtype=self.dtype, device=self.device)
        states = one if self.takes_ids else hidden_11H
        run_slice(self._model, states, position_ids=one, past_key_values=cache, use_cache=True)

    def _forward(self, texts: Sequence[_Text], plan: Pass, entering: Entering) -> Leaving:
        hidden_BTH = self._decode(plan, entering)
        parts = [hidden_BTH[row, : piece.count] for row, piece in zip(plan.rows, entering.pieces, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _decode(self, plan: Pass, entering: Entering, **options: Any) -> Tensor:
        """Run the slice: hidden states for the next shard, or logits."""
        return run_slice(
            self._model,
            self._input(plan, entering),
            position_ids=plan.position_ids_BT,
            past_key_values=self.cache,
            use_cache=True,
            **options,
        )

    def _input(self, plan: Pass, entering: Entering) -> Tensor:
        assert entering.hidden_NH is not None
        batch, width = plan.position_ids_BT.shape
        if batch == 1 and entering.hidden_NH.shape[0] == width:
            return entering.hidden_NH[None]
        hidden_BTH = entering.hidden_NH.new_zeros(batch, width, self.hidden_size)
        ends = _ends(entering.pieces)
        for row, piece, end in zip(plan.rows, entering.pieces, ends, strict=True):
            hidden_BTH[row, : piece.count] = entering.hidden_NH[end - piece.count : end]
        return hidden_BTH

    def _evict_idle(self) -> bool:
        """Close the text that nobody has used for the longest time; return whether one was idle for long enough."""
        if not self._texts:
            return False
        key = max(self._texts, key=lambda key: self._idleness(self._texts[key]))
        is_idle = self._idleness(self._texts[key]) >= 0
        if is_idle:
            self.close(key)
        return is_idle

    def _idleness(self, text: _Text) -> float:
        """For how long a text has been idle for longer than it may."""
        most = self.limits.idle_seconds if text.is_used else min(self.limits.idle_seconds, UNUSED_SECONDS)
        return self._clock() - text.used_at - most


class Shard1(Shard):
    """The first shard: embedding and first layers; token ids in."""

    takes_ids = True

    def _input(self, plan: Pass, entering: Entering) -> Tensor:
        batch, width = plan.position_ids_BT.shape
        ids_BT = [[0] * width for _ in range(batch)]
        for row, ids in zip(plan.rows, entering.ids_of_pieces(), strict=True):
            ids_BT[row][: len(ids)] = ids
        return torch.tensor(ids_BT, device=self.device)


class Shard2(Shard):
    """The last shard: last layers, norm and LM head; it samples, and only token ids leave it."""

    gives_steps = True

    def _forward(self, texts: Sequence[_Text], plan: Pass, entering: Entering) -> Leaving:
        pieces, want = entering.pieces, entering.want
        ids_of_pieces = entering.ids_of_pieces() if entering.ids else [[-1] * piece.count for piece in pieces]
        for text, piece, ids in zip(texts, pieces, ids_of_pieces, strict=True):
            if text.history is not None:
                if not entering.ids:
                    raise ValueError("a pass of a text with words must bring its ids, got none")
                text.history.hold(piece.position, ids)
        read = [want == "all" or piece.is_last for piece in pieces]
        if not any(read):
            self._decode(plan, entering, without_head=True)
            return []
        # As a LocalEngine does: the head only where it is asked for, in the same rows, to the same bits.
        steps = None if want == "all" else sorted({piece.count - 1 for piece in pieces})
        logits_BKV = self._decode(plan, entering, logits_to_keep=0 if steps is None else torch.tensor(steps))
        wanted = [
            (text, _scored(logits_BKV[row], piece, ids, steps, text))
            for text, row, piece, ids, is_read in zip(texts, plan.rows, pieces, ids_of_pieces, read, strict=True)
            if is_read
        ]
        given = read_steps([block for _, block in wanted], want)
        for text, block in wanted:  # not before: where this raises, each text is asked again as it was
            text.before_V = block.logits_KV[-1].clone() if want == "all" else None
        return given


def _scored(logits_KV: Tensor, piece: Piece, ids: Sequence[int], steps: list[int] | None, text: _Text) -> Scored:
    if steps is None:
        rows_KV = logits_KV[: piece.count]
    else:
        last = steps.index(piece.count - 1)
        rows_KV = logits_KV[last : last + 1]
    before_V = None if piece.is_first else text.before_V
    return Scored(rows_KV, ids, piece.position, text.sampling, before_V, text.history)


class OnlyShard(Shard1, Shard2):
    """All layers: a model that is not split, served as a shard."""


def load_shard(settings: ModelSettings, device: torch.device, layers: range, limits: ShardLimits) -> Shard:
    """The shard of these layers, with its part of `model.adapter`; only its own tensors are read.

    Raises:
        UserError: layers that the model does not have, or what `load_layers` and `add_adapter` refuse.
    """
    first, last = layers.start == 0, layers.stop == ModelShape.of(load_config(settings)).layers
    model = load_layers(settings, device, layers, embedding=first, head=last)
    if settings.adapter is not None:
        from lab.models.adapter import add_adapter  # loads PEFT, which plain models can do without

        add_adapter(model, settings)
    return shard_class(first, last)(model, layers, limits)


def shard_class(first: bool, last: bool) -> type[Shard]:
    """Which kind of shard stands at a place."""
    if first and last:
        return OnlyShard
    return Shard1 if first else Shard2 if last else Shard


def _ends(pieces: Sequence[Piece]) -> list[int]:
    ends, end = [], 0
    for piece in pieces:
        ends.append(end := end + piece.count)
    return ends
