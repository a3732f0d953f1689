"""The server's end of the link: what each site has, what compression rounded away, and replies back into adapters.

Sites start a round from what was *sent*, so the adapter of a round is that: the one before plus the decoded update.
What the update's codec rounded away is added to the update of the next round.
"""

import secrets
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from flwr.app import ArrayRecord, RecordDict

from fl.adapters import AdapterIndex, PackedAdapter
from fl.compression.codec import Bytes, Coder, Float32
from fl.compression.messages import about_run, plus, to_update_records, update_of
from fl.messages import ARRAYS, INDEX, from_records, to_index_record
from fl.settings import Codec, CompressionSettings

RUN_BYTES = 8


class ServerLink:
    """The link of a run, with its state between rounds."""

    def __init__(self, compression: CompressionSettings) -> None:
        self._compression = compression
        self._run = secrets.token_hex(RUN_BYTES)
        self._folded: list[int] = []
        """Last round of each site, by its number, whose reply was folded in."""
        self._site_of: dict[int, int] = {}
        """Numbers of the sites by their nodes, as far as nodes have replied."""
        self._error: Float32 | None = None
        self._update: tuple[int, Bytes] | None = None
        """The last update, and the round whose adapter it is against."""

    def content(
        self, node_id: int, arrays: ArrayRecord, index: AdapterIndex
    ) -> tuple[RecordDict, dict[str, str | int | list[int]]]:
        """A message's adapter for one node, and what CONFIG must say about it."""
        site = self._site_of.get(node_id)
        if self._update is None or site is None or self._folded[site] != self._update[0]:
            content = RecordDict({ARRAYS: arrays, INDEX: to_index_record(index)})
            return content, about_run(self._run, self._folded, None)
        base, payload = self._update
        return to_update_records(payload, index), about_run(self._run, self._folded, base)

    def decode(self, content: RecordDict, expected: AdapterIndex, sent: PackedAdapter) -> PackedAdapter:
        """The adapter in a reply to `sent`. ValueError for a reply that is not of the expected index."""
        if self._compression.uplink is Codec.none:
            return from_records(content, expected)
        update = update_of(content, self._coder(self._compression.uplink), expected)
        state = sent.unpack()
        return plus(PackedAdapter.pack({name: state[name] for name in expected.names}, expected), update)

    def advance(
        self, server_round: int, sent: PackedAdapter, following: PackedAdapter, folded: Iterable[tuple[int, int | None]]
    ) -> PackedAdapter:
        """The next adapter, as sites will receive it; `folded` are the nodes and sites whose replies it comes from."""
        for node_id, site in folded:
            if site is not None:
                self._folded += [0] * (site + 1 - len(self._folded))
                self._folded[site] = server_round
                self._site_of[node_id] = site
        if self._compression.downlink is Codec.none:
            return following
        coder = self._coder(self._compression.downlink)
        update = following.to_float32() - sent.to_float32()
        if self._error is not None:
            update = update + self._error
        payload = coder.encode(update)
        decoded = coder.decode(payload, sent.index.size)
        self._error, self._update = update - decoded, (server_round, payload)
        return plus(sent, decoded)

    def state(self) -> dict[str, torch.Tensor]:
        """What a run that goes on must know; it sends its first adapter whole."""
        state = {
            "run": torch.frombuffer(bytearray(bytes.fromhex(self._run)), dtype=torch.uint8),
            "folded": torch.tensor(self._folded, dtype=torch.int64),
        }
        return state if self._error is None else state | {"error": torch.from_numpy(self._error.copy())}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `state` returned."""
        self._run = bytes(state["run"].tolist()).hex()
        self._folded = state["folded"].tolist()
        self._error = state["error"].numpy().astype(np.float32) if "error" in state else None

    def _coder(self, codec: Codec) -> Coder:
        return Coder(codec, self._compression.topk_fraction)
