"""Compressed adapters in messages: the update against what the receiver has.

A message to a site holds the adapter whole, or (BASE in CONFIG) the update against the adapter of the round BASE. A
reply holds the update against what the site was sent. CONFIG also has RUN, by which a site tells runs apart, and
FOLDED: for each site, by its number, the last round whose reply was folded in.
"""

from collections.abc import Sequence

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fl.adapters import AdapterIndex, PackedAdapter
from fl.compression.codec import Bytes, Coder, Float32
from fl.messages import ADAPTER, ARRAYS, CONFIG, INDEX, index_of, read_array, to_index_record

BASE = "base-round"
RUN = "run"
FOLDED = "folded-rounds"


def to_update_records(payload: Bytes, index: AdapterIndex) -> RecordDict:
    """A message's content with an update of the tensors of `index`."""
    return RecordDict({ARRAYS: ArrayRecord({ADAPTER: Array(payload)}), INDEX: to_index_record(index)})


def update_of(content: RecordDict, coder: Coder, expected: AdapterIndex) -> Float32:
    """The update in a message, as float32 [expected.size]. ValueError when it is no update of these tensors."""
    if (difference := expected.difference(index_of(content))) is not None:
        raise ValueError(difference)
    return coder.decode(read_array(content, np.dtype(np.uint8), coder.size_of(expected.size)), expected.size)


def plus(base: PackedAdapter, update: Float32) -> PackedAdapter:
    """The adapter after an update: one float32 addition for each value, the same bits on every machine."""
    return PackedAdapter(base.index, base.to_float32() + update)


def base_round(content: RecordDict) -> int | None:
    """The round whose adapter a message's update is against; None for a whole adapter."""
    value = config_of(content).get(BASE)
    return value if isinstance(value, int) else None


def run_of(content: RecordDict) -> str:
    """The run's own name. ValueError where it is no name of a folder."""
    value = config_of(content).get(RUN)
    if not isinstance(value, str) or not value.isalnum():
        raise ValueError(f"{CONFIG}.{RUN} must be letters and digits, got {value!r}")
    return value


def folded_round(content: RecordDict, site: int) -> int:
    """The last round of a site's that the server has folded in; 0 for none."""
    value = config_of(content).get(FOLDED)
    return int(value[site]) if isinstance(value, list) and site < len(value) else 0


def config_of(content: RecordDict) -> ConfigRecord:
    """A message's CONFIG; empty if there is none."""
    record = content.get(CONFIG)
    return record if isinstance(record, ConfigRecord) else ConfigRecord()


def about_run(run: str, folded: Sequence[int], base: int | None) -> dict[str, str | int | list[int]]:
    """What CONFIG says of compression."""
    about: dict[str, str | int | list[int]] = {RUN: run, FOLDED: list(folded)}
    return about if base is None else about | {BASE: base}
