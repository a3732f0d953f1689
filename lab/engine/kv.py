"""The one KV cache of the lab: fixed slots, each with its own length, advanced together in one forward pass.

A pass has three steps: `begin` takes slots and counts and returns the position ids for the model, the model calls
`update` in every attention layer, and `commit` advances the lengths. Room is reserved: a slot is acquired with the most
positions that it will ever hold, and all reservations fit together. Rewinding is an assignment to ``lengths``: later
entries are masked out, and overwritten when the slot grows again. Keys are kept for all positions, and masks apply
sliding windows, so that a rewind never needs a key that has left the window.

A model makes its masks itself, with its own rules (causal, sliding, chunked): transformers asks the cache where the
queries stand, and `_mask_of` applies the model's rule to each slot's own positions.

Knows nothing about sessions, tokens or sampling. Layers go by their number in the whole model.

Shapes: S slots, B batch rows (one slot each), T positions in this pass, L cache columns, H key/value heads, D head
size, N positions written in this pass.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionMaskInterface, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.masking_utils import causal_mask_function, eager_mask, sdpa_mask

from lab.engine import row_attention


class CacheFull(RuntimeError):
    """No slot is free, or the reservation does not fit into the limit in bytes. Nothing was changed."""


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """Sizes of the keys and values that one attention layer keeps of each position."""

    heads: int
    """Key/value heads."""
    key_size: int
    """Numbers in one key of one head."""
    value_size: int
    """Numbers in one value of one head: fewer than in a key where keys carry positions apart (MLA)."""

    @property
    def numbers(self) -> int:
        """Numbers of one position, keys and values together."""
        return self.heads * (self.key_size + self.value_size)


@dataclass(frozen=True, kw_only=True)
class ExactShape:
    """The one shape of every pass: all slots, `rows` positions, `columns` columns."""

    rows: int
    """Positions of each slot in a pass, used or not (T)."""
    columns: int
    """Cache columns that attention runs over, filled or not (L)."""


@dataclass(frozen=True)
class PassPlan:
    """Inputs of a forward pass over the slots of one `begin`."""

    rows: list[int]
    """Batch row of each slot of `begin`."""
    position_ids_BT: Tensor


@dataclass(frozen=True)
class _Writes:
    """Indices at which a pass writes, the same in every layer."""

    slots: list[int]
    counts: list[int]
    slot_index: Tensor | int
    column_index: Tensor | slice
    """With `slot_index` a number and a slice for a single text, whose new keys are copied in one piece."""
    source: tuple[Tensor, Tensor] | None
    """Rows and positions to take from the new keys (N each); None: all of them."""
    read: slice | Tensor
    """The slots of the batch rows: a slice is read without a copy."""
    columns: int


class UnknownState(ValueError):
    """A model keeps a recurrent or other state besides keys and values, or keeps those in a way of its own."""


def layer_shapes(run: Callable[[Cache], object]) -> dict[int, LayerShape]:
    """The shape of each attention layer's keys and values, by its number, as seen in a forward pass over one token.

    Args:
        run: A forward pass over one token of one sequence, with a cache that is empty before.

    Raises:
        UnknownState: the model keeps something else, or nothing at all.
    """
    cache = DynamicCache()
    try:
        run(cache)
    except Exception as error:  # a model that wants another kind of cache stumbles over this one somewhere
        raise UnknownState(f"a forward pass with a cache of keys and values failed: {_in_one_line(error)}") from error
    found = {}
    for number, layer in enumerate(cache.layers):
        if type(layer) is not DynamicLayer:
            raise UnknownState(f"layer {number} keeps a {type(layer).__name__}")
        if layer.is_initialized:
            assert layer.keys is not None
            assert layer.values is not None
            key_size, value_size = layer.keys.shape[3], layer.values.shape[3]
            found[number] = LayerShape(heads=layer.keys.shape[1], key_size=key_size, value_size=value_size)
    if not found:
        raise UnknownState("no layer keeps keys and values")
    return found


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def check_attention(config: PreTrainedConfig) -> None:
    """ValueError for an attention whose masks `_mask_of` does not make."""
    attention = config.get_text_config(decoder=True)._attn_implementation
    if attention not in _MASKS:
        raise ValueError(f"attn_implementation must be sdpa or eager, got {attention}")


class _Positions(int):
    """Positions of the queries of a pass, passed through transformers in place of the first query's position."""

    ids_BT: Tensor


def _mask_of(original: Callable[..., Tensor | None], *, is_added: bool) -> Callable[..., Tensor | None]:
    """transformers' `sdpa_mask` or `eager_mask`, but in a pass of a `SlotCache` over each slot's own positions.

    Returns:
        Boolean B x 1 x T x L, True where a query sees a column; with `is_added` numbers to add to the scores.
    """

    def mask(*arguments: Any, **options: Any) -> Tensor | None:
        positions = options.get("q_offset")
        if not isinstance(positions, _Positions):
            return original(*arguments, **options)
        rule = options.get("mask_function", causal_mask_function)
        ids_BT, columns = positions.ids_BT, options["kv_length"]
        batch, width = ids_BT.shape
        device = ids_BT.device
        batch_B111 = torch.arange(batch, device=device)[:, None, None, None]
        columns_L = torch.arange(columns, device=device)[None, None, None]
        visible = rule(batch_B111, torch.zeros_like(columns_L[..., :1]), ids_BT[:, None, :, None], columns_L)
        visible_B1TL: Tensor = visible.expand(batch, 1, width, columns)
        if not is_added:
            return visible_B1TL
        dtype = options.get("dtype", torch.float32)
        lowest = torch.finfo(dtype).min
        return torch.zeros(visible_B1TL.shape, dtype=dtype, device=device).masked_fill_(~visible_B1TL, lowest)

    return mask


_MASKS = {
    "sdpa": _mask_of(sdpa_mask, is_added=False),
    row_attention.NAME: _mask_of(sdpa_mask, is_added=False),
    "eager": _mask_of(eager_mask, is_added=True),
}
for _name, _mask in _MASKS.items():
    AttentionMaskInterface.register(_name, _mask)


class SlotCache(Cache):
    """Keys and values of several texts. Storage grows with its use: one slot at a time, columns by buckets.

    Args:
        layers: The shape of each attention layer, by its number in the whole model (`layer_shapes`).
        slots: The most texts held at once.
        bucket: Columns are allocated, and attended to, in multiples of this.
        limit_bytes: The most that keys and values may take together.
        dtype: The model's.
        device: The model's.
        exact: Give every pass this shape, and allocate it all now. None: each pass as large as it must be.

    Storage is one rectangle of slots x columns in each layer, so that a pass reads it without a copy. Reservations fit
    if the rectangle does that the slots in use would need at their full lengths.

    Raises:
        CacheFull: the exact shape, or one bucket of one text, does not fit into the limit.
    """

    def __init__(
        self,
        layers: Mapping[int, LayerShape],
        *,
        slots: int,
        bucket: int,
        limit_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
        exact: ExactShape | None,
    ) -> None:
        super().__init__(layers=[])
        if slots < 1:
            raise ValueError(f"slots must be at least 1, got {slots}")
        if bucket < 1:
            raise ValueError(f"bucket must be at least 1, got {bucket}")
        self.lengths = [0] * slots
        """Positions held by each slot. Assign a smaller number to rewind."""
        self._shapes = dict(layers)
        self.bucket, self._limit_bytes = bucket, limit_bytes
        self._dtype, self._device = dtype, device
        self._exact = exact
        self._promised = [0] * slots
        """The most positions that each slot will hold; 0: it is free."""
        self._written = [0] * slots
        self._keys = {number: self._empty(shape.heads, shape.key_size, 0, 0) for number, shape in layers.items()}
        self._values = {number: self._empty(shape.heads, shape.value_size, 0, 0) for number, shape in layers.items()}
        self._slots = self._columns = 0
        self._positions_now = _Positions(0)
        self._writes: _Writes | None = None
        if exact is not None:
            self._allocate(slots, exact.columns)
        elif not self.longest:
            raise CacheFull(f"the KV cache is full: {self._needs(1, bucket)}")

    # Slots

    @property
    def longest(self) -> int:
        """The most positions that one slot can be promised: those that fit when no other slot is in use."""
        return self._fit(1)

    def acquire(self, most: int) -> int:
        """Take a free slot, with length 0, and reserve `most` positions for it.

        Raises:
            ValueError: `most` is below 1.
            CacheFull: all slots are taken, or what is promised already leaves no room for so many positions.
        """
        if most < 1:
            raise ValueError(f"a slot must be promised at least 1 position, got {most}")
        if 0 not in self._promised:
            raise CacheFull(f"all {len(self._promised)} slots of the KV cache are taken")
        slot = self._promised.index(0)
        self._promise(slot, most)
        return slot

    def reserve(self, slot: int, most: int) -> None:
        """Change the reservation of a slot that is taken; what it holds beyond `most` positions is wiped.

        Raises:
            ValueError: `most` is below 1.
            CacheFull: there is no room for so many positions; the slot is as it was.
        """
        if most < 1:
            raise ValueError(f"a slot must be promised at least 1 position, got {most}")
        assert self._promised[slot], f"slot {slot} is not acquired"
        if most > self._promised[slot]:
            self._promise(slot, most)
            return
        self._wipe(slot, most)
        self._promised[slot], self.lengths[slot] = most, min(self.lengths[slot], most)

    def _promise(self, slot: int, most: int) -> None:
        """Reserve more positions than a slot has. Raises `CacheFull`."""
        slots = max(self._slots_in_use, slot + 1)
        fits = self._fit(slots)
        longest = max(most, *self._promised)
        if longest > fits:
            # The slots in use may fit only without another one; then there is no room at all.
            fits = 0 if max(self._promised) > fits else fits
            raise CacheFull(
                f"the KV cache is full: {self._needs(slots, self._rounded(longest))}; room for a sequence of {fits} "
                f"positions is left, got {most}"
            )
        self._promised[slot] = most

    def release(self, slot: int) -> None:
        """Give a slot back, wiped: the next text in it can neither see nor inherit the old one (a masked
        column still multiplies its value by zero, and zero times infinity is not zero)."""
        self._wipe(slot, 0)
        self._promised[slot], self.lengths[slot] = 0, 0

    def _wipe(self, slot: int, start: int) -> None:
        for stored in self._stored():
            stored[slot : slot + 1, :, start : self._written[slot]].zero_()
        self._written[slot] = min(self._written[slot], start)

    @property
    def _slots_in_use(self) -> int:
        """Slots up to the last one in use."""
        return max((slot + 1 for slot, promised in enumerate(self._promised) if promised), default=0)

    def _fit(self, slots: int) -> int:
        """Positions that each of `slots` slots can hold."""
        if self._exact is not None:
            return self._exact.columns
        return self._limit_bytes // (slots * self.bytes_per_position) // self.bucket * self.bucket

    def _needs(self, slots: int, columns: int) -> str:
        return (
            f"{slots} sessions x {columns} positions need {slots * columns * self.bytes_per_position} bytes, "
            f"the limit is {self._limit_bytes}"
        )

    @property
    def layer_numbers(self) -> Sequence[int]:
        """The layers whose keys and values it holds: those of a slice have their numbers in the whole model."""
        return list(self._shapes)

    # Bytes

    @property
    def bytes_per_position(self) -> int:
        """Keys and values of one position in all layers."""
        return sum(shape.numbers for shape in self._shapes.values()) * self._dtype.itemsize

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the storage as it is allocated now."""
        return sum(stored.nbytes for stored in self._stored())

    # A pass

    @torch.inference_mode()
    def begin(self, slots: Sequence[int], counts: Sequence[int]) -> PassPlan:
        """Prepare to append ``counts[i]`` positions to ``slots[i]``, each at its own length.

        Raises:
            ValueError: a slot twice, a count that does not fit the exact shape, a length set beyond what was written,
                more positions than were promised.
        """
        self._check(slots, counts)
        self._make_room([self.lengths[slot] + count for slot, count in zip(slots, counts, strict=True)])
        batch = sorted(slots) if self._exact is None else list(range(len(self.lengths)))
        row_of = {slot: row for row, slot in enumerate(batch)}
        count_of = dict(zip(slots, counts, strict=True))
        positions_BT = self._positions(batch, [count_of.get(slot, 0) for slot in batch])
        self._writes = self._plan_writes(batch, count_of, positions_BT)
        self._positions_now = _Positions(int(max(self.lengths[slot] for slot in slots)))
        self._positions_now.ids_BT = positions_BT
        return PassPlan([row_of[slot] for slot in slots], positions_BT)

    @torch.inference_mode()
    def begin_rows(self, slots: Sequence[int], counts: Sequence[int]) -> int:
        """Prepare as `begin` does, for code that writes to `stored` by itself. Returns the columns that it may see."""
        self._check(slots, counts)
        ends = [self.lengths[slot] + count for slot, count in zip(slots, counts, strict=True)]
        self._make_room(ends)
        for slot, end in zip(slots, ends, strict=True):
            self._written[slot] = max(self._written[slot], end)
        columns = self._rounded(max(ends))
        self._writes = _Writes(list(slots), list(counts), 0, slice(0), None, slice(0), columns)
        return columns

    def stored(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, of all slots and columns: S x H x L x D each."""
        return self._keys[layer], self._values[layer]

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
        """End a pass that went through all layers: its positions are held now."""
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

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Positions of the queries of this pass, for `_mask_of`."""
        assert self._writes is not None, "get_query_offset() outside of a pass: call begin() first"
        return self._positions_now

    def __len__(self) -> int:
        return len(self._shapes)

    def fill_with_noise(self, length: int, seed: int) -> None:
        """Take every slot and fill all of them with the same random keys and values, for a probe of exact shapes."""
        generator = torch.Generator(self._device).manual_seed(seed)
        for stored in self._stored():
            noise = torch.randn(stored[:1].shape, generator=generator, device=self._device, dtype=torch.float32)
            stored.copy_(noise.to(self._dtype))
        for slot in range(len(self.lengths)):
            self._promised[slot], self.lengths[slot], self._written[slot] = self._columns, length, self._columns

    def _check(self, slots: Sequence[int], counts: Sequence[int]) -> None:
        if len(set(slots)) < len(slots):
            raise ValueError(f"slots must be different from each other, got {list(slots)}")
        if self._exact is not None and max(counts) > self._exact.rows:
            raise ValueError(f"counts must be at most {self._exact.rows} in exact shapes, got {max(counts)}")
        for slot, count in zip(slots, counts, strict=True):
            assert self._promised[slot], f"slot {slot} is not acquired"
            if self.lengths[slot] + count > self._promised[slot]:
                raise ValueError(
                    f"positions must be at most the {self._promised[slot]} that were promised, "
                    f"got {self.lengths[slot]} + {count}"
                )
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

    # Storage

    def _rounded(self, columns: int) -> int:
        return -(-columns // self.bucket) * self.bucket

    def _make_room(self, ends: list[int]) -> None:
        """Grow to the slots and columns in use. The columns of a long text that was released are freed on this
        occasion."""
        need_slots = self._slots_in_use
        if need_slots <= self._slots and max(ends) <= self._columns:
            return
        # What is held now, and no more than what is promised: the columns of a text that has gone are not kept.
        self._allocate(need_slots, self._rounded(max(*ends, *self.lengths)))

    def _allocate(self, slots: int, columns: int) -> None:
        if slots * columns * self.bytes_per_position > self._limit_bytes:
            assert self._exact is not None, f"promised too much: {self._needs(slots, columns)}"
            raise CacheFull(f"the KV cache is full: {self._needs(slots, columns)}")
        # Where memory runs out on the way, some layers are of the new shape: all of them hold this much.
        self._written = [min(written, columns) for written in self._written]
        self._slots, self._columns = min(self._slots, slots), min(self._columns, columns)
        for layer, shape in self._shapes.items():  # layer by layer: the peak is one layer above the sum
            keys = self._empty(shape.heads, shape.key_size, slots, columns)
            self._keys[layer] = self._moved(self._keys[layer], keys)
            values = self._empty(shape.heads, shape.value_size, slots, columns)
            self._values[layer] = self._moved(self._values[layer], values)
        self._slots, self._columns = slots, columns

    def tensors(self) -> dict[str, Tensor]:
        """All that is stored, S x H x L x D each, as `keys of layer 3`."""
        keys = {f"keys of layer {number}": stored for number, stored in self._keys.items()}
        return keys | {f"values of layer {number}": stored for number, stored in self._values.items()}

    def _stored(self) -> list[Tensor]:
        return [*self._keys.values(), *self._values.values()]

    def _empty(self, heads: int, size: int, slots: int, columns: int) -> Tensor:
        with torch.inference_mode(False):  # a normal tensor, so that passes with and without inference mode can write
            return torch.zeros(slots, heads, columns, size, dtype=self._dtype, device=self._device)

    @staticmethod
    def _moved(old_SHLD: Tensor, new_SHLD: Tensor) -> Tensor:
        slots, columns = (min(old_SHLD.shape[dim], new_SHLD.shape[dim]) for dim in (0, 2))
        new_SHLD[:slots, :, :columns] = old_SHLD[:slots, :, :columns]
        return new_SHLD
