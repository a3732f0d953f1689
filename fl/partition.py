"""Assignment of documents to clients, by names and sizes alone, so that no client reads another's text."""

import heapq
import random
from collections.abc import Iterable
from itertools import groupby
from operator import attrgetter

from fl.settings import PartitionBy
from lab.learning.data import Document, Source
from lab.settings import UserError


def partition(documents: list[Document], num_clients: int, by: PartitionBy, seed: int) -> list[list[Document]]:
    """Deal `documents` to `num_clients` clients, at least one to each; the same for the same arguments.

    by=package: whole units, the largest first, each to the client with the fewest bytes so far: text of different
    units, so not identically distributed, and `seed` plays no part. by=iid: single documents, in an order drawn by
    `seed`, each to the client with the fewest bytes so far. A client keeps its documents in their first order.
    UserError if there are more clients than shares.
    """
    shares = _units(documents) if by is PartitionBy.package else _shuffled(documents, seed)
    if not 1 <= num_clients <= len(shares):
        what = "units" if by is PartitionBy.package else "documents"
        rule = f"in [1, {len(shares)}], the {what} of project.data with partition_by={by.name}"
        raise UserError(f"project.num_clients must be {rule}, got {num_clients}")
    place = {document: index for index, document in enumerate(documents)}
    return [sorted(client, key=place.__getitem__) for client in _deal(shares, num_clients)]


def client_documents(source: Source, index: int, num_clients: int, by: PartitionBy, seed: int) -> list[Document]:
    """The documents of client `index` (from 0) of `num_clients`; reads no text."""
    if not 0 <= index < num_clients:
        raise UserError(f"partition-id must be in [0, {num_clients}), got {index}")
    return partition(source.documents(), num_clients, by, seed)[index]


def _units(documents: Iterable[Document]) -> list[list[Document]]:
    """Documents of the same unit together; the largest unit first, equal ones by name."""
    unit = attrgetter("unit")
    units = [list(members) for _, members in groupby(sorted(documents, key=unit), unit)]
    return sorted(units, key=lambda members: (-_size(members), members[0].unit))


def _shuffled(documents: Iterable[Document], seed: int) -> list[list[Document]]:
    shares = [[document] for document in documents]
    random.Random(seed).shuffle(shares)
    return shares


def _deal(shares: Iterable[list[Document]], num_clients: int) -> list[list[Document]]:
    """Give each share to the client with the fewest bytes, then the fewest shares, so that no client stays empty."""
    clients: list[list[Document]] = [[] for _ in range(num_clients)]
    heap = [(0, 0, index) for index in range(num_clients)]
    for share in shares:
        size, count, index = heap[0]
        clients[index] += share
        heapq.heapreplace(heap, (size + _size(share), count + 1, index))
    return clients


def _size(documents: Iterable[Document]) -> int:
    return sum(document.size_bytes for document in documents)
