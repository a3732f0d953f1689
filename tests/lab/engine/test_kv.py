"""SlotCache alone: slots, lengths, masks, growth and limits. Its numbers in a model are in test_engine.py."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import torch
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from lab.engine.kv import (
    _MASKS,
    CacheFull,
    ExactShape,
    LayerShape,
    PassPlan,
    SlotCache,
    UnknownState,
    check_attention,
    layer_shapes,
)
from tests.random_models import random_model

HEADS, SIZE = 2, 4
BYTES_PER_POSITION = 2 * 2 * HEADS * SIZE * 4  # keys and values, two layers, float32


def _cache(*, slots: int = 3, limit_bytes: int = 10**6, exact: ExactShape | None = None) -> SlotCache:
    shape = LayerShape(heads=HEADS, key_size=SIZE, value_size=SIZE)
    return SlotCache(
        {0: shape, 1: shape},
        slots=slots,
        bucket=8,
        limit_bytes=limit_bytes,
        dtype=torch.float32,
        device=torch.device("cpu"),
        exact=exact,
    )


def _run(cache: SlotCache, slots: list[int], counts: list[int], value: float) -> torch.Tensor:
    """One pass that writes one value everywhere it may; what the first layer then reads, B x H x L x D."""
    plan = cache.begin(slots, counts)
    batch, width = plan.position_ids_BT.shape
    new_BHTD = torch.full((batch, HEADS, width, SIZE), value)
    keys, _ = cache.update(new_BHTD, -new_BHTD, 0)
    cache.update(new_BHTD, -new_BHTD, 1)
    cache.commit()
    return keys


def _mask(cache: SlotCache, plan: PassPlan, rule: Any = causal_mask_function, kind: str = "sdpa") -> torch.Tensor:
    """What a model gets that makes its mask by `rule`, as transformers asks for it."""
    batch, width = plan.position_ids_BT.shape
    mask = _MASKS[kind](
        batch_size=batch,
        q_length=width,
        kv_length=cache.get_mask_sizes(width, 0)[0],
        q_offset=cache.get_query_offset(),
        mask_function=rule,
        dtype=torch.float32,
    )
    assert mask is not None
    return mask


def _column_values(keys_BHLD: torch.Tensor, row: int) -> list[float]:
    values: list[float] = keys_BHLD[row, 0, :, 0].tolist()
    return values


def test_each_slot_writes_at_its_own_position_and_padding_is_not_written() -> None:
    cache = _cache()
    first, second = cache.acquire(24), cache.acquire(24)
    _run(cache, [first], [3], 1.0)
    padded = cache.begin([first, second], [1, 4]).position_ids_BT
    assert padded.tolist() == [[3, 3, 3, 3], [0, 1, 2, 3]], "padding must not look like a position beyond the context"
    keys = _run(cache, [first, second], [1, 4], 2.0)
    assert _column_values(keys, 0) == [1, 1, 1, 2, 0, 0, 0, 0]
    assert _column_values(keys, 1) == [2, 2, 2, 2, 0, 0, 0, 0]
    assert cache.lengths[:2] == [4, 4]


def test_rewinding_is_an_assignment() -> None:
    cache = _cache()
    slot = cache.acquire(24)
    _run(cache, [slot], [6], 1.0)
    cache.lengths[slot] = 2
    plan = cache.begin([slot], [2])
    assert plan.position_ids_BT.tolist() == [[2, 3]]
    assert _mask(cache, plan)[0, 0].int().tolist() == [[1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]]
    assert _column_values(_run(cache, [slot], [2], 5.0), 0) == [1, 1, 5, 5, 1, 1, 0, 0]


def test_a_position_beyond_what_was_written_is_refused() -> None:
    cache = _cache()
    slot = cache.acquire(24)
    _run(cache, [slot], [3], 1.0)
    cache.lengths[slot] = 4
    with pytest.raises(ValueError, match=r"position must be in \[0, 3\].*got 4"):
        cache.begin([slot], [1])


def test_masks_are_those_of_the_definition() -> None:
    cache = _cache()
    slots = [cache.acquire(24), cache.acquire(24), cache.acquire(24)]
    _run(cache, slots, [5, 0, 1], 1.0)
    plan = cache.begin(slots, [2, 4, 3])
    causal, sliding = _mask(cache, plan), _mask(cache, plan, sliding_window_causal_mask_function(3))
    added = _mask(cache, plan, kind="eager")
    assert torch.equal(added == 0, causal)
    assert added.min() == torch.finfo(torch.float32).min
    for row, length in enumerate([5, 0, 1]):
        for step in range([2, 4, 3][row]):
            position = length + step
            past = [column <= position for column in range(8)]
            window = [position - 3 < column <= position for column in range(8)]
            assert causal[row, 0, step].tolist() == past
            assert sliding[row, 0, step].tolist() == window


def test_slots_that_are_not_side_by_side_keep_their_order() -> None:
    cache = _cache()
    slots = [cache.acquire(24), cache.acquire(24), cache.acquire(24)]
    for slot in slots:
        _run(cache, [slot], [2], float(slot + 1))
    plan = cache.begin([2, 0], [1, 1])
    assert plan.rows == [1, 0]
    keys = _run(cache, [2, 0], [1, 1], 9.0)
    assert _column_values(keys, plan.rows[0])[:3] == [3, 3, 9]
    assert _column_values(keys, plan.rows[1])[:3] == [1, 1, 9]


def test_growing_keeps_what_was_written() -> None:
    cache = _cache()
    first = cache.acquire(24)
    _run(cache, [first], [7], 1.0)
    assert cache.allocated_bytes == 8 * BYTES_PER_POSITION
    second = cache.acquire(24)
    keys = _run(cache, [first, second], [4, 9], 2.0)
    assert _column_values(keys, 0) == [1.0] * 7 + [2.0] * 4 + [0.0] * 5
    assert cache.allocated_bytes == 2 * 16 * BYTES_PER_POSITION
    assert [cache.lengths[slot] for slot in (first, second)] == [11, 9]
    assert cache.bytes_per_position == BYTES_PER_POSITION


def test_a_full_cache_refuses_and_nothing_changes() -> None:
    cache = _cache(limit_bytes=3 * 16 * BYTES_PER_POSITION)
    first, second = cache.acquire(16), cache.acquire(4)
    _run(cache, [first, second], [15, 3], 1.0)
    with pytest.raises(ValueError, match=r"positions must be at most the 4 that were promised, got 3 \+ 2"):
        cache.begin([first, second], [1, 2])
    needed = 3 * 24 * BYTES_PER_POSITION
    with pytest.raises(CacheFull, match=f"need {needed} bytes.*a sequence of 16 positions is left, got 17"):
        cache.acquire(17)
    assert cache.lengths[:2] == [15, 3]
    assert _column_values(_run(cache, [first, second], [1, 1], 2.0), 0) == [1.0] * 15 + [2.0]
    cache.acquire(16)
    with pytest.raises(CacheFull, match="all 3 slots"):
        cache.acquire(1)


def test_a_long_promise_leaves_no_room_for_one_more() -> None:
    cache = _cache(limit_bytes=3 * 16 * BYTES_PER_POSITION)
    assert cache.longest == 48
    with pytest.raises(CacheFull, match="room for a sequence of 48 positions is left, got 49"):
        cache.acquire(49)
    long = cache.acquire(40)
    with pytest.raises(CacheFull, match="room for a sequence of 0 positions is left, got 1"):
        cache.acquire(1)
    cache.release(long)
    assert [cache.acquire(16), cache.acquire(16), cache.acquire(16)] == [0, 1, 2]
    with pytest.raises(ValueError, match="at least 1 position, got 0"):
        cache.acquire(0)


def test_what_was_promised_is_there() -> None:
    """Texts of random lengths come, grow in random steps and go: no promise is broken, and the limit is kept."""
    generator = random.Random(8)
    cache = _cache(slots=4, limit_bytes=100 * BYTES_PER_POSITION)
    promised: dict[int, int] = {}
    refused = 0
    for _ in range(400):
        try:
            most = generator.randint(1, 96)
            promised[cache.acquire(most)] = most
        except CacheFull as full:
            refused += 1
            if room := re.search(r"room for a sequence of ([1-9]\d*) positions", str(full)):
                promised[cache.acquire(int(room[1]))] = int(room[1])
        grown = {slot: generator.randint(0, most - cache.lengths[slot]) for slot, most in promised.items()}
        if grown and max(grown.values()):
            _run(cache, list(grown), list(grown.values()), 1.0)
        assert cache.allocated_bytes <= 100 * BYTES_PER_POSITION
        for slot in [slot for slot, most in promised.items() if cache.lengths[slot] == most]:
            cache.release(slot)
            del promised[slot]
    assert refused > 50


def test_memory_that_runs_out_while_the_storage_grows_spoils_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = _cache()
    first = cache.acquire(24)
    _run(cache, [first], [20], 1.0)
    cache.lengths[first] = 5  # what is held now is less: the storage of two slots has fewer columns
    second = cache.acquire(8)
    empty, made = SlotCache._empty, 0

    def run_out(*arguments: Any) -> torch.Tensor:
        nonlocal made
        made += 1
        if made == 2:
            raise MemoryError
        return empty(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(SlotCache, "_empty", run_out)
        with pytest.raises(MemoryError):
            _run(cache, [second], [2], 2.0)
    assert _column_values(_run(cache, [first], [15], 3.0), 0) == [1.0] * 5 + [3.0] * 15 + [0.0] * 4
    assert _column_values(_run(cache, [second], [2], 2.0), 0)[:2] == [2.0] * 2


def test_a_long_text_that_has_gone_gives_its_columns_back() -> None:
    cache = _cache(limit_bytes=3 * 8 * BYTES_PER_POSITION)
    long = cache.acquire(24)
    _run(cache, [long], [24], 1.0)
    cache.release(long)
    slots = [cache.acquire(8), cache.acquire(8), cache.acquire(8)]
    _run(cache, slots, [8, 8, 8], 2.0)
    assert cache.allocated_bytes == 3 * 8 * BYTES_PER_POSITION


def test_a_reused_slot_holds_nothing_of_the_text_before() -> None:
    cache = _cache()
    slot = cache.acquire(24)
    _run(cache, [slot], [6], float("inf"))
    cache.lengths[slot] = 1  # a rewind must not hide the rest from the wiping
    cache.release(slot)
    assert cache.acquire(24) == slot
    assert _column_values(_run(cache, [slot], [2], 3.0), 0) == [3, 3, 0, 0, 0, 0, 0, 0]


def test_exact_shapes_are_always_the_same() -> None:
    cache = _cache(exact=ExactShape(rows=4, columns=10))
    allocated = cache.allocated_bytes
    slots = [cache.acquire(7), cache.acquire(10)]
    for asked, counts in (([slots[1]], [1]), (slots, [4, 2]), ([slots[0]], [3])):
        plan = cache.begin(asked, counts)
        assert plan.position_ids_BT.shape == (3, 4)
        assert plan.rows == asked
        assert _mask(cache, plan).shape == (3, 1, 4, 10)
        assert _run(cache, asked, counts, 1.0).shape == (3, HEADS, 10, SIZE)
    assert cache.lengths == [7, 3, 0]
    assert cache.allocated_bytes == allocated == 3 * 10 * BYTES_PER_POSITION
    with pytest.raises(ValueError, match="counts must be at most 4"):
        cache.begin([slots[0]], [5])
    with pytest.raises(CacheFull, match="room for a sequence of 10 positions is left, got 11"):
        cache.acquire(11)
    with pytest.raises(CacheFull):
        _cache(exact=ExactShape(rows=4, columns=10), limit_bytes=10)


def test_shapes_are_seen_in_a_forward_pass() -> None:
    model: Any = random_model("gemma3", torch.float32)
    one = torch.ones(1, 1, dtype=torch.long)
    shapes = layer_shapes(lambda cache: model(input_ids=one, past_key_values=cache, use_cache=True))
    assert shapes == {number: LayerShape(heads=2, key_size=16, value_size=16) for number in range(4)}
    assert shapes[0].numbers == 2 * (16 + 16)


def test_a_model_that_keeps_nothing_or_something_else_is_refused() -> None:
    with pytest.raises(UnknownState, match="no layer keeps keys and values"):
        layer_shapes(lambda cache: None)
    with pytest.raises(UnknownState, match=r"failed: AttributeError: .*'DynamicLayer' object has no attribute 'conv'"):
        layer_shapes(lambda cache: (cache.update(*torch.zeros(2, 1, 1, 1, 1), 0), cache.layers[0].conv))


def test_what_it_cannot_serve_is_refused() -> None:
    config = random_model("llama", torch.float32).config
    config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="attn_implementation must be sdpa or eager, got flex_attention"):
        check_attention(config)
    cache = _cache()
    slot = cache.acquire(24)
    with pytest.raises(ValueError, match="slots must be different"):
        cache.begin([slot, slot], [1, 1])
    with pytest.raises(ValueError, match="slots must be at least 1, got 0"):
        _cache(slots=0)
