"""The sites of a run over its rounds: which fail, which are late, and which are left out for a while.

Knows nothing about messages: it is told what became of each site's reply.
"""

import logging
from collections.abc import Collection, Iterable, Sequence

import msgspec

log = logging.getLogger(__name__)


class SiteRecord(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What became of one site's rounds so far."""

    node_id: int
    """Number of its node in this run; another run gives it another one."""
    partition: int | None = None
    """Number of its partition, if it has ever named it."""
    failures_in_row: int = 0
    failures: int = 0
    """Rounds in which it gave no good reply."""
    late: int = 0
    """Replies that came after their round had ended, and were dropped."""
    left_out_until: int = 0
    """Last round in which it is not asked."""

    @property
    def name(self) -> str:
        """Name for people."""
        return f"node {self.node_id}" if self.partition is None else f"client {self.partition}"


class SiteRecords:
    """The records of all sites that were ever asked.

    most_failures: a site that fails this many rounds in a row is left out of the next `pause_rounds` rounds.
    """

    def __init__(self, most_failures: int, pause_rounds: int, known: Iterable[SiteRecord] = ()) -> None:
        self._most_failures, self._pause_rounds = most_failures, pause_rounds
        self._earlier = {record.partition: record for record in known if record.partition is not None}
        """Of a run that is continued: nodes have other numbers now."""
        self._by_node = {record.node_id: record for record in known if record.partition is None}

    def of(self, node_id: int, partition: int | None = None) -> SiteRecord:
        """The record of a node, whose partition may be known by now."""
        record = self._by_node.setdefault(node_id, SiteRecord(node_id=node_id))
        if partition is not None and record.partition is None:
            earlier = self._earlier.pop(partition, None) or self._taken_over(partition)
            if earlier is not None:
                record = self._by_node[node_id] = earlier
                record.node_id = node_id
            record.partition = partition
        return record

    def _taken_over(self, partition: int) -> SiteRecord | None:
        """The record of a partition whose node has started again, under another number."""
        found = next((node for node, record in self._by_node.items() if record.partition == partition), None)
        return None if found is None else self._by_node.pop(found)

    def succeeded(self, node_id: int, partition: int | None) -> None:
        """Note a good reply."""
        self.of(node_id, partition).failures_in_row = 0

    def failed(self, node_id: int, server_round: int) -> None:
        """Note a round without a good reply; one warning when the site is left out from now on."""
        record = self.of(node_id)
        record.failures += 1
        record.failures_in_row += 1
        if record.failures_in_row >= self._most_failures:
            record.left_out_until = server_round + self._pause_rounds
            log.warning(
                "%s failed %d rounds in a row and is left out of the next %d",
                *(record.name, record.failures_in_row, self._pause_rounds),
            )
            record.failures_in_row = 0  # afterwards it may fail as often again

    def was_late(self, node_id: int) -> None:
        """Note a reply to an earlier round, which is dropped."""
        record = self.of(node_id)
        record.late += 1
        log.info("a late reply of %s was dropped (%d so far)", record.name, record.late)

    def present(self, nodes: Sequence[int], server_round: int, needed: int) -> list[int]:
        """The nodes that are not left out of a round; those left out come back, the longest left out first, where
        fewer than `needed` would remain."""
        out = sorted(
            (node for node in nodes if self.of(node).left_out_until >= server_round),
            key=lambda node: (self.of(node).left_out_until, self.of(node).partition or 0),
        )
        back = {*out[: max(0, needed - (len(nodes) - len(out)))]}
        return [node for node in nodes if node not in out or node in back]

    def left_out(self, server_round: int, asked: Collection[int]) -> list[str]:
        """Names of the sites that a round leaves out; `asked` are its nodes, some of which came back for the quorum."""
        out = [record for record in self.records if record.left_out_until >= server_round]
        return sorted(record.name for record in out if record.node_id not in asked)

    @property
    def needs_partitions(self) -> bool:
        """Whether sites of a continued run are left out whose nodes are not known yet."""
        return any(record.left_out_until or record.failures_in_row for record in self._earlier.values())

    @property
    def records(self) -> list[SiteRecord]:
        """All records, by partition, then by node."""
        everyone = [*self._by_node.values(), *self._earlier.values()]
        return sorted(everyone, key=lambda record: (record.partition is None, record.partition or 0, record.node_id))
