"""Adapters on disk: after every round a PEFT folder that any program with peft can load, whole or not there at all."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig

from fl.adapters import Adapter


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """The model an adapter belongs to."""

    name: str
    """What `from_pretrained` would be given: a hub id or a folder."""
    digest: str
    """Of its tensors; equal digests mean equal models, whatever their names."""


class AdapterFolders:
    """`root/round-0000`, `root/round-0001`, ...: one PEFT folder a round. The highest is the latest.

    commit: of the program that wrote it. data_source: what the clients trained on, for the model card.
    """

    def __init__(
        self, root: Path, *, lora: LoraConfig, base: BaseModel, data_source: str, num_clients: int, commit: str
    ) -> None:
        raise NotImplementedError

    def write(self, server_round: int, adapter: Adapter, metrics: Mapping[str, float]) -> Path:
        """Write one round's folder and return its absolute path. FileExistsError when the round is there already."""
        raise NotImplementedError


def latest_adapter(root: Path) -> Path | None:
    """The folder of the highest round under root; None when there is none."""
    raise NotImplementedError


def load_adapter(folder: Path, base: BaseModel) -> dict[str, torch.Tensor]:
    """The tensors of a PEFT folder, for a warm start on `base`. ValueError naming both when it is of another model."""
    raise NotImplementedError
