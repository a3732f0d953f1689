"""Assignment of documents to clients, by names and sizes alone, so that no client reads another's text."""

import heapq
import random
import warnings
from collections.abc import Iterable
from functools import lru_cache
from itertools import groupby
from operator import attrgetter
from typing import Any

from fl.settings import PartitionBy, PartitionRule
from lab.learning.data import Document, Source
from lab.settings import UserError


def partition(documents: list[Document], num_clients: int, rule: PartitionRule, seed: int) -> list[list[Document]]:
    """Give `documents` to `num_clients` clients, at least one to each; the same for the same arguments.

    by=package: whole units, the largest first, each to the client with the fewest bytes so far: text of different
    units, so not identically distributed, and `seed` plays no part. by=iid: single documents, in an order drawn by
    `seed`, each to the client with the fewest bytes so far. The others, see `PartitionBy`, are those of flwr-datasets;
    with by=shards some documents may be left over. A client keeps its documents in their first order.
    UserError if there are more clients than shares, for a partition in which a client has nothing, and without
    flwr-datasets.
    """
    place = {document: index for index, document in enumerate(documents)}
    if rule.by in (PartitionBy.package, PartitionBy.iid):
        shares = _units(documents) if rule.by is PartitionBy.package else _shuffled(documents, seed)
        what = "units" if rule.by is PartitionBy.package else "documents"
        _check_clients(num_clients, f"in [1, {len(shares)}], the {what}", rule.by, 1 <= num_clients <= len(shares))
        clients = _deal(shares, num_clients)
    else:
        places = _by_flower(tuple(document.unit for document in documents), num_clients, rule, seed)
        clients = [[documents[at] for at in own] for own in places]
    return [sorted(client, key=place.__getitem__) for client in clients]


def client_documents(source: Source, index: int, num_clients: int, rule: PartitionRule, seed: int) -> list[Document]:
    """The documents of client `index` (from 0) of `num_clients`; reads no text."""
    if not 0 <= index < num_clients:
        raise UserError(f"partition-id must be in [0, {num_clients}), got {index}")
    return partition(source.documents(), num_clients, rule, seed)[index]


def _check_clients(num_clients: int, what: str, by: PartitionBy, holds: bool) -> None:
    if not holds:
        rule = f"{what} of project.data with partition_by={by.name}"
        raise UserError(f"project.num_clients must be {rule}, got {num_clients}")


@lru_cache(maxsize=1)  # a worker of a simulation asks for one client after the other
def _by_flower(units: tuple[str, ...], num_clients: int, rule: PartitionRule, seed: int) -> list[list[int]]:
    """The partition of flwr-datasets over a table of the documents' units alone: each client's places in it."""
    try:
        from datasets import Dataset
        from flwr_datasets import partitioner as flower
    except ModuleNotFoundError:
        remedy = "pip install distributed-llm-lab[hub]"
        raise UserError(f"project.partition_by must be package or iid here, got {rule.by.name!r}: {remedy}") from None
    order, count, what = [*range(len(units))], len(units), "documents"
    made: Any
    match rule.by:
        case PartitionBy.natural:
            count = len(set(units))
            _check_clients(num_clients, f"{count}, the units", rule.by, num_clients == count)
            made = flower.NaturalIdPartitioner(partition_by="unit")
        case PartitionBy.dirichlet:
            made = flower.DirichletPartitioner(num_clients, "unit", rule.alpha, min_partition_size=1, seed=seed)
        case PartitionBy.shards:
            count, what = count // rule.shards, f"documents for {rule.shards} shards each"
            made = flower.ShardPartitioner(num_clients, "unit", num_shards_per_partition=rule.shards, seed=seed)
        case _:
            random.Random(seed).shuffle(order)  # it takes them as they come
            made = flower.LinearPartitioner(num_clients)
    _check_clients(num_clients, f"in [1, {count}], the {what}", rule.by, 1 <= num_clients <= count)
    try:
        with warnings.catch_warnings(action="ignore"):  # Dirichlet's, of each try that left a client without documents
            made.dataset = Dataset.from_dict({"unit": units, "place": order})
            return [[*made.load_partition(client)["place"]] for client in range(num_clients)]
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"project.partition_by must be one that deals these documents, got {rule.by.name!r}: {reason}"
        ) from None


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
