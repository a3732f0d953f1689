"""A site's end of the link: an adapter out of a message, and what was trained into its reply."""

from dataclasses import dataclass, field

import torch
from flwr.app import RecordDict

from fl.adapters import Adapter, AdapterIndex, PackedAdapter
from fl.compression.codec import Coder, Float32
from fl.compression.memory import SiteMemory
from fl.compression.messages import base_round, folded_round, plus, run_of, to_update_records, update_of
from fl.messages import from_records, index_of, to_records
from fl.settings import Codec, CompressionSettings
from lab.files import path_of
from lab.settings import UserError


@dataclass(eq=False)
class SiteLink:
    """One message and its reply."""

    compression: CompressionSettings
    site: int
    content: RecordDict
    received: PackedAdapter = field(init=False)
    """The adapter that was sent. UserError when its update is against an adapter that this site no longer has."""

    _had: dict[int, torch.Tensor] = field(default_factory=dict, init=False)
    """The adapter that the message's update is against, by its round."""

    def __post_init__(self) -> None:
        base = base_round(self.content)
        self.received = from_records(self.content) if base is None else self._updated(base)

    def reply(self, trained: Adapter, server_round: int) -> RecordDict:
        """The content of a reply with these tensors of the received adapter, as they are after training."""
        index = AdapterIndex.of(trained, self.received.index.dtype)
        packed = PackedAdapter.pack(trained, index)
        if not self.compression.is_on:
            return to_records(packed)
        sent = dict(self._had)  # the message may be sent again
        if self.compression.downlink is not Codec.none:
            sent[server_round] = _tensor(self.received)
        if self.compression.uplink is Codec.none:
            self._memory().write({}, sent)
            return to_records(packed)
        coder, memory = self._coder(self.compression.uplink), self._memory()
        folded = folded_round(self.content, self.site)
        before = memory.error_after(folded, self.received.index.size)
        errors = PackedAdapter(self.received.index, before.numpy()).unpack()
        update = packed.to_float32() - _part(self.received.unpack(), index) + _part(errors, index)
        payload = coder.encode(update)
        left = PackedAdapter(index, update - coder.decode(payload, index.size)).unpack()
        after = PackedAdapter.pack(errors | left, self.received.index)
        memory.write({folded: before, server_round: _tensor(after)}, sent)
        return to_update_records(payload, index)

    def _updated(self, base: int) -> PackedAdapter:
        index, had = index_of(self.content), self._memory().sent_in(base)
        if had is None or had.shape != (index.size,):
            raise UserError(f"project.compression.folder must hold the adapter of round {base}, which was sent to site "
                            f"{self.site}, got none: the server sends it whole next time")  # fmt: skip
        self._had = {base: had}
        update = update_of(self.content, self._coder(self.compression.downlink), index)
        return plus(PackedAdapter(index, had.numpy()), update)

    def _coder(self, codec: Codec) -> Coder:
        return Coder(codec, self.compression.topk_fraction)

    def _memory(self) -> SiteMemory:
        folder = path_of(self.compression.folder, "project.compression.folder")
        return SiteMemory(folder, run_of(self.content), self.site, self.compression.keep_days)


def _part(state: Adapter, index: AdapterIndex) -> Float32:
    return PackedAdapter.pack({name: state[name] for name in index.names}, index).to_float32()


def _tensor(packed: PackedAdapter) -> torch.Tensor:
    return torch.from_numpy(packed.to_float32().copy())
