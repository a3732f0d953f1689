"""A site's end of the link: an adapter out of a message, and what was trained into its reply."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from flwr.app import RecordDict

from fl.adapters import Adapter, AdapterIndex, PackedAdapter
from fl.aggregation.parts import of_halves, sent_halves
from fl.compression.codec import Coder, Float32
from fl.compression.memory import ERROR, PERSONAL, SENT, SiteMemory
from fl.compression.messages import base_round, folded_round, plus, run_of, to_update_records, update_of
from fl.messages import from_records, index_of, to_records
from fl.settings import Codec, FederatedProjectSettings, Share, WireDtype
from lab.files import path_of
from lab.settings import UserError


@dataclass(eq=False)
class SiteLink:
    """One message and its reply."""

    project: FederatedProjectSettings
    site: int
    content: RecordDict
    sent: PackedAdapter = field(init=False)
    """The adapter that was sent. UserError when its update is against an adapter that this site no longer has."""
    _had: dict[int, torch.Tensor] = field(default_factory=dict, init=False)
    """The adapter that the message's update is against, by its round."""

    def __post_init__(self) -> None:
        base = base_round(self.content)
        self.sent = from_records(self.content) if base is None else self._updated(base)

    @property
    def received(self) -> dict[str, torch.Tensor]:
        """The adapter to evaluate and to train: what was sent, with what the site keeps to itself.

        UserError when the site has lost that.
        """
        state = self.sent.unpack()
        if self.project.share is Share.both:
            return state
        folded = folded_round(self.content, self.site)
        kept = self._memory().vector(PERSONAL, folded)
        if kept is None and folded:  # never silently another B than the one that was trained
            rule = f"project.site_folder must hold the B of site {self.site} after round {folded}"
            raise UserError(f"{rule}, got {str(self.folder)!r} without it")
        return state if kept is None else state | self._own(_state(kept, self.sent.index))

    def reply(self, trained: Adapter, server_round: int) -> RecordDict:
        """The content of a reply to a train message, with the part of the trained tensors that travels."""
        travelling = of_halves(trained, sent_halves(self.project.aggregation, self.project.share, server_round))
        index = AdapterIndex.of(travelling, self.sent.index.dtype)
        packed = PackedAdapter.pack(travelling, index)
        if not self.project.remembers:
            return to_records(packed)
        memory, kept = self._memory(), {SENT: dict(self._had)}  # the message may be sent again
        if self.project.compression.downlink is not Codec.none:
            kept[SENT][server_round] = _vector(self.sent)
        folded = folded_round(self.content, self.site)
        if self.project.share is not Share.both:
            before = PackedAdapter.pack(self.received, _exact(self.sent.index))
            after = PackedAdapter.pack({**self.received, **trained}, before.index)
            kept[PERSONAL] = {folded: _vector(before), server_round: _vector(after)}
        if self.project.compression.uplink is Codec.none:
            memory.write(kept)
            return to_records(packed)
        coder, error = self._coder(self.project.compression.uplink), memory.error_after(folded, self.sent.index.size)
        errors = _state(error, self.sent.index)
        update = packed.to_float32() - _part(self.sent.unpack(), index) + _part(errors, index)
        payload = coder.encode(update)
        left = PackedAdapter(index, update - coder.decode(payload, index.size)).unpack()
        kept[ERROR] = {folded: error, server_round: _vector(PackedAdapter.pack(errors | left, self.sent.index))}
        memory.write(kept)
        return to_update_records(payload, index)

    @property
    def folder(self) -> Path:
        """The folder of the site's memory of this run."""
        return self._memory().folder

    def _own(self, state: Adapter) -> dict[str, torch.Tensor]:
        shared = of_halves(state, sent_halves(self.project.aggregation, self.project.share, 1))
        return {name: tensor for name, tensor in state.items() if name not in shared}

    def _updated(self, base: int) -> PackedAdapter:
        index, had = index_of(self.content), self._memory().vector(SENT, base)
        if had is None or had.shape != (index.size,):
            rule = f"hold the adapter of round {base}, which was sent to site {self.site}"
            raise UserError(f"project.site_folder must {rule}, got none: the server sends it whole next time")
        self._had = {base: had}
        update = update_of(self.content, self._coder(self.project.compression.downlink), index)
        return plus(PackedAdapter(index, had.numpy()), update)

    def _coder(self, codec: Codec) -> Coder:
        return Coder(codec, self.project.compression.topk_fraction)

    def _memory(self) -> SiteMemory:
        folder = path_of(self.project.site_folder, "project.site_folder")
        return SiteMemory(folder, run_of(self.content), self.site, self.project.site_keep_days)


def _exact(index: AdapterIndex) -> AdapterIndex:
    return AdapterIndex(index.names, index.shapes, WireDtype.float32)


def _state(vector: torch.Tensor, index: AdapterIndex) -> dict[str, torch.Tensor]:
    return PackedAdapter(_exact(index), vector.numpy()).unpack()


def _part(state: Adapter, index: AdapterIndex) -> Float32:
    return PackedAdapter.pack({name: state[name] for name in index.names}, index).to_float32()


def _vector(packed: PackedAdapter) -> torch.Tensor:
    return torch.from_numpy(packed.to_float32().copy())
