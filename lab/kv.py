"""The one KV cache of the lab: fixed slots, each with a length of its own, advanced together in one batched forward.

A pass is three steps: `begin` takes slots and counts and gives the position ids and masks for the model, the model
calls `update` in every attention layer, `commit` moves the lengths. Rewinding is an assignment to ``lengths``: what
lies beyond a length is masked out, and overwritten later. Keys are kept for all positions, and sliding windows are
folded into the masks, so that a rewind never meets a window that has already moved on.

Knows nothing about sessions, tokens or sampling. Indices of layers are local: a slice of a model brings its own config,
with its own ``num_hidden_layers`` and ``layer_types``, and gets a cache over its own layers.

Shapes: S slots, B batch rows (one slot each), T positions in this pass, L cache columns, H key/value heads, D head
size, N positions written in this pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, get_layer_types_and_kwargs

from lab import row_attention

Mask = Tensor | dict[str, Tensor]

_FULL, _SLIDING = "full_attention", "sliding_attention"


class CacheFull(RuntimeError):
    """No slot is free, or the next positions do not fit into the limit in bytes. Nothing was changed."""


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """What one attention layer keeps of each position, and how far back it looks."""

    heads: int
    """Key/value heads."""
    head_size: int
    """Numbers in one key, and in one value, of one head."""
    window: int | None
    """How many positions a token sees, its own included; None: all before it."""


@dataclass(frozen=True, kw_only=True)
class ExactShape:
    """The one shape of every pass: all slots, so many positions, so many columns."""

    rows: int
    """Positions of each slot in a pass, used or not (T)."""
    columns: int
    """Cache columns that attention runs over, filled or not (L)."""


@dataclass(frozen=True)
class Pass:
    """What the model needs to run the slots of one `begin`."""

    rows: list[int]
    """The batch row of each slot that was asked for."""
    position_ids_BT: Tensor
    attention_mask: Mask
    """Boolean B x 1 x T x L (True: visible), or additive for eager attention; by layer type in hybrid models."""


@dataclass(frozen=True)
class _Writes:
    """Where a pass writes. One index pair serves every layer."""

    slots: list[int]
    counts: list[int]
    slot_index: Tensor | int
    column_index: Tensor | slice
    """A number and a slice for one text alone: the new keys go there in one piece."""
    source: tuple[Tensor, Tensor] | None
    """Rows and positions to take from the new keys (N each); None: all of them."""
    read: slice | Tensor
    """The slots of the batch rows: a slice is read without a copy."""
    columns: int


def layer_shapes(config: PreTrainedConfig) -> list[LayerShape]:
    """The attention layers of a decoder-only model, read off its config (sliced configs of a shard included).

    Raises:
        ValueError: a layer that is neither full nor sliding-window attention, or sliding windows of several sizes.
    """
    text: Any = config.get_text_config(decoder=True)
    kinds, options = get_layer_types_and_kwargs(text)
    if unknown := set(kinds) - {_FULL, _SLIDING}:
        raise ValueError(f"layer_types must be {_FULL} or {_SLIDING}, got {sorted(unknown)}")
    windows: list[int | None] = [option.get("sliding_window") for option in options]
    sizes = {window for window in windows if window is not None}
    if len(sizes) > 1:
        raise ValueError(f"sliding_window must be the same in all layers, got {sorted(sizes)}")
    return [_layer_shape(layer, window) for layer, window in zip(text.per_layer_config, windows, strict=True)]


def _layer_shape(layer: Any, window: int | None) -> LayerShape:
    heads = getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads
    head_size = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
    return LayerShape(heads=heads, head_size=head_size, window=window)


def masks_are_added(config: PreTrainedConfig) -> bool:
    """Whether the model's attention adds its mask to the scores (eager) or takes a boolean one (sdpa).

    Raises:
        ValueError: an attention that takes neither.
    """
    attention = config.get_text_config(decoder=True)._attn_implementation
    if attention not in ("sdpa", row_attention.NAME, "eager"):
        raise ValueError(f"attn_implementation must be sdpa or eager, got {attention}")
    return bool(attention == "eager")


class SlotCache(Cache):
    """Keys and values of several texts. Storage follows what is in use: slots by one, columns by buckets.

    Args:
        layers: One shape for each attention layer, in local order (`layer_shapes`).
        slots: The most texts held at once.
        bucket: Columns are allocated, and attended to, in multiples of this.
        limit_bytes: The most that keys and values may take together.
        dtype: Of the keys and values; the model's.
        device: Of the keys and values; the model's.
        additive_masks: False for attention that takes boolean masks (sdpa), True where masks are added (eager).
        exact: Give every pass this shape, and allocate it all now. None: each pass as large as it must be.

    Raises:
        CacheFull: the exact shape does not fit into the limit.
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        *,
        slots: int,
        bucket: int,
        limit_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
        additive_masks: bool,
        exact: ExactShape | None,
    ) -> None:
        super().__init__(layers=[])
        if slots < 1:
            raise ValueError(f"slots must be at least 1, got {slots}")
        if bucket < 1:
            raise ValueError(f"bucket must be at least 1, got {bucket}")
        self.lengths = [0] * slots
        """Positions held by each slot. Assign a smaller number to rewind."""
        self._shapes = list(layers)
        self._bucket, self._limit_bytes = bucket, limit_bytes
        self._dtype, self._device = dtype, device
        self._additive_masks, self._exact = additive_masks, exact
        self._in_use = [False] * slots
        self._written = [0] * slots
        self._keys: list[Tensor] = [self._empty(shape, 0, 0) for shape in self._shapes]
        self._values: list[Tensor] = [self._empty(shape, 0, 0) for shape in self._shapes]
        self._columns_L = torch.arange(0, device=device)
        self._writes: _Writes | None = None
        if exact is not None:
            self._allocate(slots, exact.columns)

    @classmethod
    def for_model(
        cls,
        config: PreTrainedConfig,
        *,
        slots: int,
        bucket: int,
        limit_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
        exact: ExactShape | None,
    ) -> Self:
        """A cache for the layers that a config describes: a whole model's, or a slice's own."""
        return cls(
            layer_shapes(config),
            slots=slots,
            bucket=bucket,
            limit_bytes=limit_bytes,
            dtype=dtype,
            device=device,
            additive_masks=masks_are_added(config),
            exact=exact,
        )

    # Slots

    def acquire(self) -> int:
        """Take a free slot, with length 0.

        Raises:
            CacheFull: all slots are taken.
        """
        if False not in self._in_use:
            raise CacheFull(f"all {len(self._in_use)} slots of the KV cache are taken")
        slot = self._in_use.index(False)
        self._in_use[slot] = True
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back. What was written is wiped: the next text in it can neither see nor inherit it (a masked
        column still multiplies its value by zero, and zero times infinity is not zero)."""
        for stored in (*self._keys, *self._values):
            stored[slot : slot + 1, :, : self._written[slot]].zero_()
        self._in_use[slot], self.lengths[slot], self._written[slot] = False, 0, 0

    # Bytes

    @property
    def bytes_per_position(self) -> int:
        """Keys and values of one position in all layers."""
        return sum(2 * shape.heads * shape.head_size for shape in self._shapes) * self._dtype.itemsize

    @property
    def allocated_bytes(self) -> int:
        """What the storage takes now."""
        return sum(stored.nbytes for stored in (*self._keys, *self._values))

    @property
    def used_bytes(self) -> int:
        """What the positions held now need."""
        return sum(self.lengths) * self.bytes_per_position

    # A pass

    @torch.inference_mode()
    def begin(self, slots: Sequence[int], counts: Sequence[int]) -> Pass:
        """Prepare to append ``counts[i]`` positions to ``slots[i]``, each at its own length.

        Raises:
            ValueError: a slot twice, a count that does not fit the exact shape, a length set beyond what was written.
            CacheFull: the positions do not fit into the limit.
        """
        self._check(slots, counts)
        self._make_room([self.lengths[slot] + count for slot, count in zip(slots, counts, strict=True)])
        batch = sorted(slots) if self._exact is None else list(range(len(self.lengths)))
        row_of = {slot: row for row, slot in enumerate(batch)}
        count_of = dict(zip(slots, counts, strict=True))
        positions_BT = self._positions(batch, [count_of.get(slot, 0) for slot in batch])
        self._writes = self._plan_writes(batch, count_of, positions_BT)
        return Pass([row_of[slot] for slot in slots], positions_BT, self._mask(positions_BT, self._writes.columns))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new keys and values (B x H x T x D) of a layer; return all of the batch, B x H x L x D."""
        assert self._writes is not None, "update() outside of a pass: call begin() first"
        return (
            self._write(self._keys[layer_idx], key_states, self._writes),
            self._write(self._values[layer_idx], value_states, self._writes),
        )

    def commit(self) -> None:
        """The pass went through all layers: its positions are now held."""
        assert self._writes is not None, "commit() outside of a pass: call begin() first"
        for slot, count in zip(self._writes.slots, self._writes.counts, strict=True):
            self.lengths[slot] += count
        self._writes = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The longest length; models ask only when they are not given position ids."""
        return max(self.lengths)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Columns of this pass, and that they start at position 0."""
        assert self._writes is not None, "get_mask_sizes() outside of a pass: call begin() first"
        return self._writes.columns, 0

    def __len__(self) -> int:
        return len(self._shapes)

    def fill_with_noise(self, length: int, seed: int) -> None:
        """Take every slot and give all of them the same random keys and values: what a probe of shapes runs against."""
        generator = torch.Generator(self._device).manual_seed(seed)
        for stored in (*self._keys, *self._values):
            noise = torch.randn(stored[:1].shape, generator=generator, device=self._device, dtype=torch.float32)
            stored.copy_(noise.to(self._dtype))
        for slot in range(len(self.lengths)):
            self._in_use[slot], self.lengths[slot], self._written[slot] = True, length, self._keys[0].shape[2]

    def _check(self, slots: Sequence[int], counts: Sequence[int]) -> None:
        if len(set(slots)) < len(slots):
            raise ValueError(f"slots must be different from each other, got {list(slots)}")
        if self._exact is not None and max(counts) > self._exact.rows:
            raise ValueError(f"counts must be at most {self._exact.rows} in exact shapes, got {max(counts)}")
        for slot in slots:
            assert self._in_use[slot], f"slot {slot} is not acquired"
            if not 0 <= self.lengths[slot] <= self._written[slot]:
                raise ValueError(
                    f"position must be in [0, {self._written[slot]}] (what the cache holds), got {self.lengths[slot]}"
                )

    def _positions(self, batch: list[int], counts: list[int]) -> Tensor:
        """Padding repeats a row's last position, so that no rotary embedding sees one beyond the context."""
        width = max(counts) if self._exact is None else self._exact.rows
        if counts == [width]:
            start = self.lengths[batch[0]]
            return torch.arange(start, start + width, device=self._device)[None]
        start_B1 = torch.tensor([[self.lengths[slot]] for slot in batch], device=self._device)
        last_B1 = start_B1 + torch.tensor([[max(count, 1) - 1] for count in counts], device=self._device)
        return torch.minimum(start_B1 + torch.arange(width, device=self._device), last_B1)

    def _plan_writes(self, batch: list[int], count_of: dict[int, int], positions_BT: Tensor) -> _Writes:
        ends = [self.lengths[slot] + count for slot, count in count_of.items()]
        is_one = positions_BT.shape == (1, count_of.get(batch[0], 0))
        where = self._where_one(batch[0], ends[0]) if is_one else self._where(batch, count_of, positions_BT)
        slot_index, column_index, source, read = where
        for slot, count in count_of.items():
            self._written[slot] = max(self._written[slot], self.lengths[slot] + count)
        return _Writes(
            slots=list(count_of),
            counts=list(count_of.values()),
            slot_index=slot_index,
            column_index=column_index,
            source=source,
            read=read,
            columns=self._exact.columns if self._exact else self._rounded(max(ends)),
        )

    def _where_one(self, slot: int, end: int) -> tuple[int, slice, None, slice]:
        """The indices of a pass of one text, without padding."""
        return slot, slice(self.lengths[slot], end), None, slice(slot, slot + 1)

    def _where(
        self, batch: list[int], count_of: dict[int, int], positions_BT: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None, slice | Tensor]:
        slot_B = torch.tensor(batch, device=self._device)
        contiguous = batch == list(range(batch[0], batch[0] + len(batch)))
        read = slice(batch[0], batch[-1] + 1) if contiguous else slot_B
        if all(count_of.get(slot, 0) == positions_BT.shape[1] for slot in batch):
            return slot_B[:, None], positions_BT, None, read
        count_B = torch.tensor([count_of.get(slot, 0) for slot in batch], device=self._device)
        asked_BT = torch.arange(positions_BT.shape[1], device=self._device) < count_B[:, None]
        row_N, step_N = asked_BT.nonzero(as_tuple=True)
        return slot_B[row_N], positions_BT[row_N, step_N], (row_N, step_N), read

    def _write(self, stored_SHLD: Tensor, new_BHTD: Tensor, writes: _Writes) -> Tensor:
        if isinstance(writes.slot_index, int):
            stored_SHLD[writes.slot_index, :, writes.column_index] = new_BHTD[0]
            return stored_SHLD[writes.read, :, : writes.columns]
        new_BTHD = new_BHTD.transpose(1, 2)
        stored_SHLD[writes.slot_index, :, writes.column_index] = (
            new_BTHD if writes.source is None else new_BTHD[writes.source]
        )
        return stored_SHLD[:, :, : writes.columns][writes.read]

    def _mask(self, positions_BT: Tensor, columns: int) -> Mask:
        positions_B1T1 = positions_BT[:, None, :, None]
        columns_L = self._columns_L[:columns]
        past_B1TL = columns_L <= positions_B1T1
        windows = {shape.window for shape in self._shapes}
        masks = {
            window: past_B1TL if window is None else past_B1TL & (columns_L > positions_B1T1 - window)
            for window in windows
        }
        if self._additive_masks:
            masks = {window: self._additive(mask) for window, mask in masks.items()}
        if len(masks) == 1:
            return next(iter(masks.values()))
        return {_FULL if window is None else _SLIDING: mask for window, mask in masks.items()}

    def _additive(self, mask: Tensor) -> Tensor:
        lowest = torch.finfo(self._dtype).min
        return torch.zeros(mask.shape, dtype=self._dtype, device=self._device).masked_fill_(~mask, lowest)

    # Storage

    def _rounded(self, columns: int) -> int:
        return -(-columns // self._bucket) * self._bucket

    def _make_room(self, ends: list[int]) -> None:
        """Grow to what is in use now; a text that was long and has gone gives its columns back on this occasion."""
        slots, columns = self._keys[0].shape[0], self._keys[0].shape[2]
        need_slots = 1 + max(slot for slot, used in enumerate(self._in_use) if used)
        if need_slots <= slots and max(ends) <= columns:
            return
        if self._exact is not None:
            raise ValueError(f"positions must be at most {columns} in exact shapes, got {max(ends)}")
        held = [length for length, used in zip(self.lengths, self._in_use, strict=True) if used]
        self._allocate(need_slots, self._rounded(max(*ends, *held)))

    def _allocate(self, slots: int, columns: int) -> None:
        need_bytes = slots * columns * self.bytes_per_position
        if need_bytes > self._limit_bytes:
            raise CacheFull(
                f"the KV cache is full: {slots} sessions x {columns} positions need {need_bytes} bytes, "
                f"the limit is {self._limit_bytes}"
            )
        for layer, shape in enumerate(self._shapes):  # layer by layer: the peak is one layer above the sum
            self._keys[layer] = self._moved(self._keys[layer], self._empty(shape, slots, columns))
            self._values[layer] = self._moved(self._values[layer], self._empty(shape, slots, columns))
        self._written = [min(written, columns) for written in self._written]
        self._columns_L = torch.arange(columns, device=self._device)

    def _empty(self, shape: LayerShape, slots: int, columns: int) -> Tensor:
        with torch.inference_mode(False):  # a normal tensor, so that passes with and without inference mode can write
            return torch.zeros(slots, shape.heads, columns, shape.head_size, dtype=self._dtype, device=self._device)

    @staticmethod
    def _moved(old_SHLD: Tensor, new_SHLD: Tensor) -> Tensor:
        slots, columns = (min(old_SHLD.shape[dim], new_SHLD.shape[dim]) for dim in (0, 2))
        new_SHLD[:slots, :, :columns] = old_SHLD[:slots, :, :columns]
        return new_SHLD
