import sys
from collections import Counter
from collections.abc import Iterator
from itertools import chain

import pytest
from datasets import Dataset
from flwr_datasets import partitioner as flower
from hypothesis import given, settings
from hypothesis import strategies as st

from fl.partition import _by_flower, client_documents, partition
from fl.settings import PartitionBy, PartitionRule
from lab.learning.data import Document
from lab.learning.records import Record, Text
from lab.settings import UserError

PACKAGE, IID = PartitionBy.package, PartitionBy.iid
OWN = (PACKAGE, IID)
"""Those that deal documents themselves."""


def rule_of(by: PartitionBy, alpha: float = 0.5, shards: int = 2) -> PartitionRule:
    return PartitionRule(by=by, alpha=alpha, shards=shards)


@st.composite
def corpora(draw: st.DrawFn) -> list[Document]:
    units = draw(st.lists(st.integers(0, 8), min_size=1, max_size=30))
    sizes = draw(st.lists(st.integers(0, 10**6), min_size=len(units), max_size=len(units)))
    return [Document(name=f"{i}.py", unit=f"u{u}", size_bytes=s) for i, (u, s) in enumerate(zip(units, sizes))]


def shares(documents: list[Document], by: PartitionBy) -> int:
    return len({document.unit for document in documents}) if by is PACKAGE else len(documents)


def size(documents: list[Document]) -> int:
    return sum(document.size_bytes for document in documents)


@given(corpora(), st.integers(1, 30), st.sampled_from(OWN), st.integers(0, 2**31 - 1))
@settings(max_examples=200, deadline=None)
def test_every_document_goes_to_one_client_and_every_client_has_one(
    documents: list[Document], num_clients: int, by: PartitionBy, seed: int
) -> None:
    if num_clients > shares(documents, by):
        with pytest.raises(UserError, match=rf"project\.num_clients must be in \[1, \d+\].*got {num_clients}$"):
            partition(documents, num_clients, rule_of(by), seed)
        return
    clients = partition(documents, num_clients, rule_of(by), seed)
    assert len(clients) == num_clients
    assert all(clients)
    assert sorted((d for client in clients for d in client), key=documents.index) == documents
    assert all(client == sorted(client, key=documents.index) for client in clients)
    assert clients == partition(documents, num_clients, rule_of(by), seed)


@given(corpora(), st.integers(1, 9), st.sampled_from(OWN))
@settings(max_examples=100, deadline=None)
def test_sizes_differ_by_at_most_one_share(documents: list[Document], num_clients: int, by: PartitionBy) -> None:
    if num_clients > shares(documents, by):
        return
    sizes = [size(client) for client in partition(documents, num_clients, rule_of(by), 0)]
    units = {d.unit if by is PACKAGE else d.name: 0 for d in documents}
    for document in documents:
        units[document.unit if by is PACKAGE else document.name] += document.size_bytes
    assert max(sizes) - min(sizes) <= max(units.values())


@given(corpora(), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_by_package_a_unit_is_never_torn(documents: list[Document], num_clients: int) -> None:
    if num_clients > shares(documents, PACKAGE):
        return
    owners: dict[str, set[int]] = {}
    for index, client in enumerate(partition(documents, num_clients, rule_of(PACKAGE), 0)):
        for document in client:
            owners.setdefault(document.unit, set()).add(index)
    assert all(len(clients) == 1 for clients in owners.values())


def two_packages() -> list[Document]:
    return [Document(name=f"{unit}/{i}.py", unit=unit, size_bytes=100) for unit in "ab" for i in range(50)]


def test_the_largest_unit_is_dealt_first() -> None:
    sizes = {"a": 1, "b": 1, "c": 1, "d": 1, "e": 4}
    documents = [Document(name=unit, unit=unit, size_bytes=size) for unit, size in sizes.items()]
    assert sorted(size(client) for client in partition(documents, 2, rule_of(PACKAGE), 0)) == [4, 4]


@pytest.mark.parametrize("by", OWN)
def test_documents_of_unknown_size_are_dealt_evenly(by: PartitionBy) -> None:
    documents = [Document(name=f"{i}", unit=f"{i}", size_bytes=0) for i in range(6)]
    assert [len(client) for client in partition(documents, 3, rule_of(by), 0)] == [2, 2, 2]


def test_iid_mixes_units_where_package_keeps_them() -> None:
    """Control for the test above: iid does tear units."""
    mixed = partition(two_packages(), 2, rule_of(IID), 0)
    whole = partition(two_packages(), 2, rule_of(PACKAGE), 0)
    assert all({document.unit for document in client} == {"a", "b"} for client in mixed)
    assert [{document.unit for document in client} for client in whole] == [{"a"}, {"b"}]


def test_the_seed_matters_to_iid_alone() -> None:
    assert partition(two_packages(), 2, rule_of(IID), 0) != partition(two_packages(), 2, rule_of(IID), 1)
    assert partition(two_packages(), 2, rule_of(PACKAGE), 0) == partition(two_packages(), 2, rule_of(PACKAGE), 1)


@pytest.mark.parametrize(("by", "limit", "what"), [(PACKAGE, 2, "units"), (IID, 100, "documents")])
def test_more_clients_than_there_is_to_deal(by: PartitionBy, limit: int, what: str) -> None:
    with pytest.raises(UserError) as caught:
        partition(two_packages(), limit + 1, rule_of(by), 0)
    rule = f"in [1, {limit}], the {what} of project.data with partition_by={by.name}"
    assert str(caught.value) == f"project.num_clients must be {rule}, got {limit + 1}"


class CountingSource:
    """A source that remembers which texts were opened."""

    def __init__(self) -> None:
        self.opened: list[str] = []

    def documents(self) -> list[Document]:
        return two_packages()

    def read(self, document: Document) -> Iterator[Record]:
        self.opened.append(document.name)
        yield Text(document.name)


@pytest.mark.parametrize("by", OWN)
def test_a_client_opens_its_own_documents_only(by: PartitionBy) -> None:
    opened = []
    for index in range(2):
        source = CountingSource()
        mine = client_documents(source, index, 2, rule_of(by), seed=0)
        assert source.opened == [], "the partition itself reads nothing"
        assert len(list(chain.from_iterable(map(source.read, mine)))) == len(mine)
        opened.append(set(source.opened))
    assert not opened[0] & opened[1]
    assert opened[0] | opened[1] == {document.name for document in two_packages()}


@pytest.mark.parametrize("index", [-1, 2])
def test_a_partition_that_does_not_exist(index: int) -> None:
    with pytest.raises(UserError, match=rf"partition-id must be in \[0, 2\), got {index}"):
        client_documents(CountingSource(), index, 2, rule_of(IID), seed=0)


def labelled(labels: str) -> list[Document]:
    return [Document(name=f"{place}", unit=label, size_bytes=1) for place, label in enumerate(labels)]


LABELS = "abcd" * 50
FLOWERS = tuple(by for by in PartitionBy if by not in OWN)


@pytest.mark.parametrize("by", FLOWERS)
def test_flowers_partitions_give_a_document_to_one_client_and_are_the_same_again(by: PartitionBy) -> None:
    documents = labelled(LABELS)
    clients = partition(documents, 4, rule_of(by), 0)
    dealt = [document for client in clients for document in client]
    assert len(set(dealt)) == len(dealt) == len(documents), "all of them: 200 is a multiple of 8 shards"
    assert all(client == sorted(client, key=documents.index) for client in clients)
    _by_flower.cache_clear()
    assert clients == partition(documents, 4, rule_of(by), 0)
    assert (clients == partition(documents, 4, rule_of(by), 1)) == (by is PartitionBy.natural)


def units_of(clients: list[list[Document]]) -> list[Counter[str]]:
    return [Counter(document.unit for document in client) for client in clients]


def test_natural_is_a_client_for_each_unit() -> None:
    assert units_of(partition(labelled("abacabc"), 3, rule_of(PartitionBy.natural), 0)) == [
        {"a": 3},
        {"b": 2},
        {"c": 2},
    ]
    for wrong in (2, 4):
        said = f"must be 3, the units of project.data with partition_by=natural, got {wrong}"
        with pytest.raises(UserError, match=said):
            partition(labelled("abacabc"), wrong, rule_of(PartitionBy.natural), 0)


def test_the_smaller_alpha_the_fewer_clients_share_a_unit() -> None:
    def largest_share(alpha: float) -> float:
        clients = units_of(partition(labelled(LABELS), 4, rule_of(PartitionBy.dirichlet, alpha), 0))
        return max(count / 50 for units in clients for count in units.values())

    assert largest_share(1000.0) < 0.35 < 0.9 < largest_share(0.05)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_client_of_few_shards_has_few_units(shards: int) -> None:
    clients = units_of(partition(labelled(LABELS), 4, rule_of(PartitionBy.shards, shards=shards), 0))
    assert [units.total() for units in clients] == [50] * 4
    assert max(map(len, clients)) <= shards


def test_linear_sizes_grow_by_client_and_mix_the_units() -> None:
    clients = units_of(partition(labelled("a" * 100 + "b" * 100), 4, rule_of(PartitionBy.linear), 0))
    assert [units.total() for units in clients] == [20, 40, 60, 80]
    assert all(min(units["a"], units["b"]) > 0.3 * units.total() for units in clients)


def test_it_is_the_split_of_the_whole_dataset() -> None:
    """As a paper that uses flwr-datasets has it, over rows with all their columns."""
    rows = Dataset.from_dict({"text": [f"text {n}" for n in range(len(LABELS))], "label": [*LABELS]})
    theirs = flower.DirichletPartitioner(5, "label", 0.3, min_partition_size=1, seed=7)
    theirs.dataset = rows
    ours = partition(labelled(LABELS), 5, rule_of(PartitionBy.dirichlet, 0.3), 7)
    texts = [sorted(theirs.load_partition(client)["text"]) for client in range(5)]
    assert [sorted(f"text {document.name}" for document in client) for client in ours] == texts


@pytest.mark.parametrize(
    ("by", "clients", "said"),
    [
        (
            PartitionBy.dirichlet,
            9,
            "project.num_clients must be in [1, 8], the documents of project.data with partition_by=dirichlet, got 9",
        ),
        (
            PartitionBy.shards,
            5,
            "project.num_clients must be in [1, 4], the documents for 2 shards each of project.data with",
        ),
        (PartitionBy.linear, 8, "project.partition_by must be one that deals these documents, got 'linear': "),
        (PartitionBy.dirichlet, 8, "project.partition_by must be one that deals these documents, got 'dirichlet': "),
    ],
)
def test_a_client_without_documents_is_refused(by: PartitionBy, clients: int, said: str) -> None:
    with pytest.raises(UserError) as caught:
        partition(labelled("abababab"), clients, rule_of(by, alpha=0.01), 0)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_without_flowers_package_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flwr_datasets", None)
    with pytest.raises(
        UserError, match=r"^project\.partition_by must be package or iid here, got 'shards': pip install"
    ):
        partition(labelled("ab"), 2, rule_of(PartitionBy.shards), 0)
