"""Which client holds which documents. Decided from names and sizes alone, so no client opens another's text."""

from __future__ import annotations

from fl.settings import PartitionBy
from lab.data import Document, Source


def partition(documents: list[Document], num_clients: int, by: PartitionBy, seed: int) -> list[list[Document]]:
    """Deals `documents` to `num_clients` clients, every client at least one; the same for the same arguments."""
    raise NotImplementedError


def client_documents(source: Source, index: int, num_clients: int, by: PartitionBy, seed: int) -> list[Document]:
    """The documents of client `index` (from 0) of `num_clients`; reads no text."""
    return partition(source.documents(), num_clients, by, seed)[index]
