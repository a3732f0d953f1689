"""Messages of a federated round: their records, and how an adapter is packed into them.

One message per client and round. The server sends the adapter (records ARRAYS and INDEX) and CONFIG (SERVER_ROUND, and
what the caller of Flower's `start()` adds). A client replies
    to a train message with the adapter it trained (ARRAYS, INDEX), METRICS (WEIGHT = its training examples or their
        answer tokens, PARTITION, figures of the training) and, if it has a held-out part, EVALUATE (WEIGHT = the same
        of that part, figures of the adapter it *received*);
    to an evaluate message with EVALUATE if it has a held-out part, and optionally METRICS (PARTITION);
    to a query message (sent only when `fraction` < 1) with METRICS (PARTITION);
    and to the first two optionally with DATA: `lab.learning.counts.Counts` of its lines, in whole numbers.
"""

import re
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import InflatableObject

from fl.adapters import AdapterIndex, FlatArray, PackedAdapter

ARRAYS = "arrays"
"""ArrayRecord with the packed adapter as its one array ADAPTER."""
ADAPTER = "adapter"
INDEX = "index"
"""ConfigRecord with the encoded `AdapterIndex` of that array as its one value INDEX."""
CONFIG = "config"
SERVER_ROUND = "server-round"
METRICS = "metrics"
PARTITION = "partition-id"
MOST_PARTITIONS = 2**20
"""A list by partition travels in every message."""
EVALUATE = "evaluate"
WEIGHT = "weight"
DATA = "data"

NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([^']{1,8})', 'fortran_order': False, 'shape': \(([0-9]{1,18}),\), \} *\n",
    re.DOTALL,
)
"""Start of a version 1.0 .npy file of one dimension, as numpy.save writes it (numpy.lib.format)."""


def to_array_record(packed: PackedAdapter) -> ArrayRecord:
    """The one-array record in which a packed adapter travels."""
    return ArrayRecord({ADAPTER: Array(packed.array)})


def to_index_record(index: AdapterIndex) -> ConfigRecord:
    """The record with the index that is needed to read it."""
    return ConfigRecord({INDEX: index.encode()})


def to_records(packed: PackedAdapter) -> RecordDict:
    """A message's content with the adapter (ARRAYS) and its index (INDEX); add metrics or a config to it."""
    return RecordDict({ARRAYS: to_array_record(packed), INDEX: to_index_record(packed.index)})


def from_records(content: RecordDict, expected: AdapterIndex | None = None) -> PackedAdapter:
    """The packed adapter of a message, read-only and not copied.

    ValueError when a record is missing, when the index does not decode or is not the expected one, or when the array's
    type, size or serialisation do not match the index.
    """
    index = index_of(content)
    if expected and (difference := expected.difference(index)) is not None:
        raise ValueError(difference)
    return PackedAdapter(index, read_array(content, index.dtype.numpy, index.size))


def index_of(content: RecordDict) -> AdapterIndex:
    """The index of a message. ValueError when it is missing or does not decode."""
    # Not content.array_records: that view refers to itself, and keeps the whole reply until the garbage collector runs.
    record = content.get(INDEX)
    data = record.get(INDEX) if isinstance(record, ConfigRecord) else None
    if not isinstance(data, bytes):
        raise ValueError(f"{INDEX} must be a ConfigRecord with bytes under {INDEX!r}, got {_names(content)}")
    return AdapterIndex.decode(data)


def read_array(content: RecordDict, dtype: np.dtype[Any], size: int) -> FlatArray:
    """The one array of a message, read-only and not copied. ValueError unless it is flat, of this type and size."""
    arrays = content.get(ARRAYS)
    if not isinstance(arrays, ArrayRecord) or list(arrays) != [ADAPTER]:
        raise ValueError(f"{ARRAYS} must be an ArrayRecord with the one array {ADAPTER!r}, got {_names(content)}")
    return _read_npy(arrays[ADAPTER], dtype, size)


def metrics_of(content: RecordDict, name: str) -> dict[str, object]:
    """A copy of one MetricRecord; empty if there is none."""
    record = content.get(name)  # not content.metric_records: see from_records
    return {**record} if isinstance(record, MetricRecord) else {}


def partition_of(value: object) -> int | None:
    """`value` of PARTITION, if it is a partition's number or None; ValueError otherwise."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise ValueError(f"{METRICS}.{PARTITION} must be a whole number from 0 on, got {value!r}")
    if value is not None and value >= MOST_PARTITIONS:
        raise ValueError(f"{METRICS}.{PARTITION} must be below {MOST_PARTITIONS}, got {value}")
    return value


def message_bytes(message: InflatableObject) -> int:
    """Bytes of the message as Flower serialises it, including headers of nested objects and metadata.

    Flower sends an array in chunks of 5 MiB, each with about 90 bytes of names around it (the environment variable
    FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE, read when flwr is imported, makes them larger).
    """
    return len(message.deflate()) + sum(map(message_bytes, (message.children or {}).values()))


def _read_npy(array: Array, dtype: np.dtype[Any], size: int) -> FlatArray:
    """Flower's Array (one .npy file) as numpy: no copy and, unlike numpy's own reader, no evaluation of its header."""
    where = f"{ARRAYS}.{ADAPTER}"
    header = NPY_HEADER.match(array.data)
    if array.stype != "numpy.ndarray" or header is None:
        raise ValueError(f"{where} must be a flat numpy array, got {array.dtype} {array.shape} {array.stype}")
    expected = (dtype.str, str(size))
    found = (header[1].decode("latin-1"), header[2].decode("latin-1"))
    if found != expected:
        raise ValueError(f"{where} must be {' x '.join(expected)}, got {' x '.join(found)}")
    if (data_bytes := len(array.data) - header.end()) != size * dtype.itemsize:
        raise ValueError(f"{where} must hold {size * dtype.itemsize} bytes, got {data_bytes}")
    packed: FlatArray = np.frombuffer(array.data, dtype, offset=header.end())
    return packed


def _names(content: RecordDict) -> str:
    return ", ".join(f"{key}: {type(record).__name__}({', '.join(record)})" for key, record in content.items())
